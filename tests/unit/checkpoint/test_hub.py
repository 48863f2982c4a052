"""Hub models, with the hub's library replaced where a network would be needed."""

from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import errors

from lowlat.checkpoint.fetch.hub import fetch_hub
from lowlat.utils.errors import UserError
from lowlat.utils.progress import PlainProgress, SilentProgress


class FakeHub:
    """One repository; `snapshot_download` copies what the patterns let through."""

    def __init__(self, folder: Path, names: list[str]) -> None:
        self.folder = folder
        self.names = names
        self.calls: list[dict] = []
        self.error: Exception | None = None

    def snapshot_download(self, repo: str, **options: object) -> str:
        self.calls.append({"repo": repo, **options})
        if self.error is not None:
            raise self.error
        allowed, ignored = options["allow_patterns"], options["ignore_patterns"]
        assert isinstance(allowed, list)
        assert isinstance(ignored, list)
        for name in self.names:
            taken = any(fnmatch(name, pattern) for pattern in allowed)
            if taken and not any(fnmatch(name, pattern) for pattern in ignored):
                target = self.folder / name
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(b"x")
        return str(self.folder)

    def model_info(self, repo: str, **_: object) -> SimpleNamespace:
        names = [SimpleNamespace(rfilename=name, size=1) for name in self.names]
        return SimpleNamespace(siblings=names)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    fake = FakeHub(tmp_path / "snapshot", [])
    fake.folder.mkdir()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake.snapshot_download)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: fake)
    monkeypatch.delenv("LOWLAT_CACHE", raising=False)
    return fake


def fetch(revision: str | None = None) -> Path:
    return fetch_hub("org/name", revision, SilentProgress())


def test_takes_no_pickles_and_no_code(hub: FakeHub) -> None:
    good = {
        "config.json",
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
        "chat_template.jinja",
        "merges.txt",
    }
    bad = {"pytorch_model.bin", "x.pt", "x.pkl", "modeling_x.py", "training_args.bin", "x.gguf"}
    twice = {"consolidated.safetensors", "original/model.safetensors", "onnx/config.json"}
    hub.names = sorted(good | bad | twice)
    assert fetch("v1.0") == hub.folder
    assert {path.name for path in hub.folder.rglob("*")} == good
    (call,) = hub.calls
    shared = Path(huggingface_hub.constants.HF_HUB_CACHE)
    assert (call["repo"], call["revision"], call["cache_dir"]) == ("org/name", "v1.0", shared)


def test_cache_moves_with_lowlat_cache(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    hub.names = ["config.json", "model.safetensors"]
    monkeypatch.setenv("LOWLAT_CACHE", str(tmp_path))
    fetch()
    assert hub.calls[0]["cache_dir"] == tmp_path / "hub"


def test_a_cache_that_is_a_file(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Found before the hub is asked, where it read as a hub that cannot be reached."""
    monkeypatch.setenv("LOWLAT_CACHE", str(hub.folder / "file"))
    (hub.folder / "file").touch()
    with pytest.raises(UserError, match=r"cannot use .*file/hub .*set LOWLAT_CACHE"):
        fetch()
    assert hub.calls == []


def test_progress_bars_of_the_library_follow_ours(hub: FakeHub) -> None:
    hub.names = ["config.json", "model.safetensors"]
    fetch()
    quiet = hub.calls[0]["tqdm_class"](total=3)
    assert quiet.disable
    fetch_hub("org/name", None, PlainProgress())
    assert hub.calls[1]["tqdm_class"] is None


def test_pickled_weights_only(hub: FakeHub) -> None:
    hub.names = ["config.json", "pytorch_model.bin"]
    with pytest.raises(UserError, match="neither safetensors nor GGUF"):
        fetch()


class ConnectError(errors.HTTPError):  # pyright: ignore[reportPrivateImportUsage]
    """What the HTTP client raises without a network; its base differs between client versions."""


def answer(status: int) -> dict:
    return {"response": SimpleNamespace(headers={}, request=None, status_code=status)}


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            errors.RepositoryNotFoundError("x", **answer(401)),
            "no folder 'org/name' here, and no mo",
        ),
        (errors.GatedRepoError("x", **answer(403)), "gated.*hf auth login"),
        (errors.RevisionNotFoundError("x", **answer(404)), "no revision 'v9'"),
        (errors.HFValidationError("bad -- id"), "not a valid hub id: bad -- id"),
        (errors.HfHubHTTPError("503 busy\nRequest", **answer(503)), r"reached \(503 busy\)"),
        (ConnectError("[Errno -2] Name or service not known"), r"Name.*connect to the network"),
        (errors.LocalEntryNotFoundError("nothing cached"), "or give the path of a model"),
        (OSError(28, "No space left on device"), "no space left on the disk.*LOWLAT_CACHE"),
        (PermissionError(13, "Permission denied", "/hub/x"), "cannot use /hub/x.*LOWLAT_CACHE"),
    ],
)
def test_faults_are_one_line(hub: FakeHub, error: Exception, words: str) -> None:
    hub.error = error
    with pytest.raises(UserError, match=words) as caught:
        fetch("v9")
    assert "\n" not in str(caught.value)


def test_offline_with_the_real_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Offline reuse is the library's: a snapshot in its cache is found, a missing one is an
    error."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("LOWLAT_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="no folder 'org/name' here, and the hub cannot be reached"):
        fetch()
    store = tmp_path / "hub" / "models--org--name"
    snapshot = store / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (store / "refs").mkdir()
    (store / "refs" / "main").write_text("a" * 40)
    (snapshot / "config.json").write_text("{}")
    (snapshot / "model.safetensors").write_bytes(b"")
    assert fetch() == snapshot
