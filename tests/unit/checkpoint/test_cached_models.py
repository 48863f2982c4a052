"""Models in the cache: what `lowlat models` lists and `rm` removes."""

import hashlib
import json
from pathlib import Path

import pytest

from lowlat.checkpoint.fetch import cached_models as module
from lowlat.checkpoint.fetch.cached_models import cached_models, remove_models
from lowlat.checkpoint.fetch.model_names import MODEL_PRESETS
from lowlat.cli.models import models
from lowlat.utils.errors import UserError
from lowlat.utils.file_lock import try_lock

OLD, NEW = "a" * 40, "b" * 40
PARTS = [f"UD-Q2_K_XL/m-UD-Q2_K_XL-{number:05d}-of-00002.gguf" for number in (1, 2)]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LOWLAT_CACHE", str(tmp_path))
    return tmp_path


def link(cache: Path, revision: str, name: str, content: bytes, repo: str = "org--name") -> Path:
    """A file of a snapshot, as huggingface_hub stores it."""
    store = cache / "hub" / f"models--{repo}"
    blob = store / "blobs" / hashlib.sha256(content).hexdigest()
    blob.parent.mkdir(parents=True, exist_ok=True)
    blob.write_bytes(content)
    path = store / "snapshots" / revision / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(blob)
    (store / "refs").mkdir(exist_ok=True)
    (store / "refs" / "main").write_text(NEW)
    return blob


def rows() -> dict[str, tuple[str, int]]:
    return {model.name: (model.source, model.size) for model in cached_models()}


def test_everything_is_listed(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert rows() == {}
    for name in PARTS:
        link(cache, NEW, name, name.encode())
    link(cache, NEW, "m-Q8_0.gguf", b"8" * 80)
    link(cache, OLD, "m-Q8_0.gguf", b"8" * 70)
    link(cache, NEW, "config.json", b"{}", "org--folder")
    link(cache, NEW, "model.safetensors", b"x" * 9, "org--folder")
    (cache / "hub" / "models--org--name" / "blobs" / "d.lowlat.incomplete").write_bytes(b"half")
    file = cache / "pypi" / "pack" / "1.0" / "pack" / "m.gguf"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"gguf")
    file.with_name("m.gguf.lowlat.json").write_text("{}")
    folder = MODEL_PRESETS["default"].folder()
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"mla")
    assert rows() == {
        "org/name:UD-Q2_K_XL": ("hub", sum(map(len, PARTS))),
        "org/name:Q8_0": ("hub", 80),
        f"org/name@{OLD}:Q8_0": ("hub", 70),
        "org/folder": ("hub", 11),
        "org/name": ("incomplete", 4),
        "pypi:pack==1.0/pack/m.gguf": ("pypi", 4),
        "default": ("converted", 3),
    }
    models(as_json=True)
    printed = json.loads(capsys.readouterr().out)["models"]
    assert {row["name"] for row in printed} == set(rows())
    models()
    table = capsys.readouterr().out
    assert all(name in table for name in rows())
    for name in ("default", "pypi:pack==1.0/pack/m.gguf"):
        remove_models(name)
    assert not folder.exists() and list(file.parent.iterdir()) == []
    assert len(rows()) == 5


def test_removal_keeps_shared_blobs(cache: Path) -> None:
    """Of two revisions with the same file, one stays complete."""
    shared = link(cache, NEW, "m-Q8_0.gguf", b"same")
    (cache / "hub/models--org--name/snapshots" / OLD).mkdir()
    (cache / "hub/models--org--name/snapshots" / OLD / "m-Q8_0.gguf").symlink_to(shared)
    only = link(cache, NEW, "m-Q4_0.gguf", b"four")
    remove_models("org/name:q4_0")
    assert not only.exists()
    remove_models(f"org/name@{OLD}:Q8_0")
    assert shared.exists() and rows() == {"org/name:Q8_0": ("hub", 4)}
    remove_models("org/name")
    assert not shared.exists() and rows() == {}


def test_all_parts_and_their_folder_go(cache: Path) -> None:
    blobs = [link(cache, NEW, name, name.encode()) for name in PARTS]
    remove_models("org/name:UD-Q2_K_XL")
    assert not any(blob.exists() for blob in blobs)
    assert list((cache / "hub/models--org--name/snapshots").glob("*/*")) == []


def test_a_download_under_way_stays(cache: Path) -> None:
    link(cache, NEW, "m-Q8_0.gguf", b"8")
    part = cache / "hub" / "models--org--name" / "blobs" / "d.lowlat.incomplete"
    part.write_bytes(b"half")
    lock = cache / "hub" / ".locks" / "models--org--name" / "d.lowlat.lock"
    lock.parent.mkdir(parents=True)
    with lock.open("a") as handle:
        assert try_lock(handle.fileno())
        with pytest.raises(UserError, match="'org/name' is being downloaded by another process"):
            remove_models("org/name")
        assert len(rows()) == 2
    remove_models("org/name")
    assert rows() == {} and not part.exists()


def test_an_interrupted_removal_is_completed(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = MODEL_PRESETS["default"].folder()
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module.shutil, "rmtree", interrupted)
        with pytest.raises(KeyboardInterrupt):
            remove_models("default")
    assert not folder.exists()  # never half a model
    assert rows() == {} and list(folder.parent.iterdir()) == []


@pytest.mark.parametrize("name", ["org/nam", "org", "", "Q8_0", "org/name:Q4_0", "../hub"])
def test_unknown_names_remove_nothing(cache: Path, name: str) -> None:
    link(cache, NEW, "m-Q8_0.gguf", b"8")
    with pytest.raises(UserError, match="is not in the cache, which holds: org/name:Q8_0"):
        remove_models(name)
    assert len(rows()) == 1
