"""GGUF models of a local hub, by quantization tag, through HF_ENDPOINT in a process of its own."""

import hashlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from lowlat.checkpoint.fetch import gguf_variants as module
from lowlat.checkpoint.fetch import resumable_download
from lowlat.checkpoint.fetch.gguf_variants import choose_variant, gguf_variants
from lowlat.checkpoint.fetch.resumable_download import INCOMPLETE
from lowlat.utils.errors import UserError
from tests import forked

from .hub_server import COMMIT, HubServer, hub_server

CHUNK = 10 * 2**20
"""Of huggingface_hub: what was received before."""
DEEP = "UD-Q2_K_XL/V3-UD-Q2_K_XL"
FILES = {
    "README.md": b"a page",
    "config.json": b"{}",
    "V3-Q4_K_M.gguf": b"four" * 50_000,
    "V3-Q8_0.gguf": b"eight" * 50_000,
    f"{DEEP}-00001-of-00002.gguf": b"one" * 30_000,
    f"{DEEP}-00002-of-00002.gguf": b"two" * 30_000,
    "mmproj-F16.gguf": b"eyes",
    "imatrix_unsloth.gguf": b"importance",
}
CHILD = """
import sys
from lowlat.checkpoint.fetch.model_names import resolve
from lowlat.utils.errors import UserError
try:
    print(resolve(sys.argv[1]))
except UserError as error:
    print(f"error: {error}")
"""


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with hub_server(dict(FILES)) as server:
        yield server


def environment(hub: HubServer, cache: Path, **more: str) -> dict[str, str]:
    own = {"HF_ENDPOINT": hub.url, "LOWLAT_CACHE": str(cache), "HF_TOKEN": "hf_secret"}
    return {**os.environ, **own, **more}


def fetch(hub: HubServer, cache: Path, name: str, **more: str) -> str:
    """The path that `name` resolves to, below the snapshot; or the error."""
    command = [sys.executable, "-c", CHILD, name]
    done = forked.run(
        command, env=environment(hub, cache, **more), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    snapshot = cache / "hub" / "models--org--name" / "snapshots" / COMMIT
    return done.stdout.strip().removeprefix(f"{snapshot}/")


def test_only_the_tagged_parts_are_fetched(hub: HubServer, tmp_path: Path) -> None:
    assert fetch(hub, tmp_path, "org/name:UD-Q2_K_XL") == f"{DEEP}-00001-of-00002.gguf"
    assert hub.sent == [(f"{DEEP}-00001-of-00002.gguf", 0), (f"{DEEP}-00002-of-00002.gguf", 0)]
    folder = tmp_path / "hub" / "models--org--name" / "snapshots" / COMMIT
    assert {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    } == {name: FILES[name] for name in FILES if name.startswith("UD")}
    assert hub.tokens == {"Bearer hf_secret"}
    # once more: from the cache, also without the hub; in any spelling
    for name in ("hf.co/org/name:q2_k_xl", "org/name@main:UD-Q2_K_XL"):
        assert fetch(hub, tmp_path, name) == f"{DEEP}-00001-of-00002.gguf"
    offline = fetch(hub, tmp_path, "org/name:UD-Q2_K_XL", HF_HUB_OFFLINE="1")
    assert offline == f"{DEEP}-00001-of-00002.gguf"
    assert len(hub.sent) == 2


def test_no_tag_lists_what_there_is(hub: HubServer, tmp_path: Path) -> None:
    said = fetch(hub, tmp_path, "org/name")
    assert "holds 3 GGUF models; add a tag, as in org/name:Q8_0" in said
    assert "UD-Q2_K_XL 0.0 GB, Q4_K_M 0.0 GB, Q8_0 0.0 GB; Q8_0 is the largest that fits" in said
    assert not any(name.endswith(".gguf") for name, _ in hub.sent)


@pytest.fixture
def big(hub: HubServer) -> bytes:
    """A file of several of huggingface_hub's chunks of 10 MiB."""
    hub.files = {"V3-Q4_K_M.gguf": bytes(range(256)) * 100_000}
    return hub.files["V3-Q4_K_M.gguf"]


def check_fetched(tmp_path: Path, content: bytes) -> None:
    """The whole file is in the cache, and nothing else."""
    folder = tmp_path / "hub" / "models--org--name" / "blobs"
    (blob,) = folder.iterdir()
    assert blob.read_bytes() == content
    assert blob.name == hashlib.sha256(content).hexdigest()


def test_cut_connection_resumes(hub: HubServer, tmp_path: Path, big: bytes) -> None:
    hub.cut_after = 15 * 2**20
    assert fetch(hub, tmp_path, "org/name:Q4_K_M") == "V3-Q4_K_M.gguf"
    assert [first for _, first in hub.sent] == [0, CHUNK]
    check_fetched(tmp_path, big)


def test_killed_process_resumes(hub: HubServer, tmp_path: Path, big: bytes) -> None:
    """The second process requests only the bytes that the first did not write."""
    hub.cut_after = 15 * 2**20
    hub.stall.clear()
    command = [sys.executable, "-c", CHILD, "org/name:Q4_K_M"]
    folder = tmp_path / "hub" / "models--org--name" / "blobs"
    with forked.Popen(command, env=environment(hub, tmp_path)) as process:
        while not any(path.stat().st_size >= CHUNK for path in folder.glob("*.incomplete")):
            assert process.poll() is None
            time.sleep(0.05)
        process.kill()
    hub.cut_after = None
    hub.stall.set()
    assert fetch(hub, tmp_path, "org/name:Q4_K_M") == "V3-Q4_K_M.gguf"
    assert [first for _, first in hub.sent] == [0, CHUNK]
    check_fetched(tmp_path, big)


def test_two_processes_download_once(hub: HubServer, tmp_path: Path, big: bytes) -> None:
    command = [sys.executable, "-c", CHILD, "org/name:Q4_K_M"]
    both = [
        forked.Popen(command, env=environment(hub, tmp_path), stdout=subprocess.PIPE)
        for _ in range(2)
    ]
    answers = {process.communicate(timeout=120)[0] for process in both}
    assert len(answers) == 1 and b"V3-Q4_K_M.gguf" in answers.pop()
    assert len(hub.sent) == 1
    check_fetched(tmp_path, big)


def test_wrong_content_is_removed(hub: HubServer, tmp_path: Path, big: bytes) -> None:
    hub.corrupt = True
    said = fetch(hub, tmp_path, "org/name:Q4_K_M")
    assert said.startswith("error: V3-Q4_K_M.gguf is not the file expected: sha256 expected")
    hub.corrupt = False
    assert fetch(hub, tmp_path, "org/name:Q4_K_M") == "V3-Q4_K_M.gguf"
    check_fetched(tmp_path, big)


def test_partial_file_longer_than_the_whole(hub: HubServer, tmp_path: Path, big: bytes) -> None:
    folder = tmp_path / "hub" / "models--org--name" / "blobs"
    folder.mkdir(parents=True)
    digest = hashlib.sha256(big).hexdigest()
    (folder / f"{digest}{INCOMPLETE}").write_bytes(big + b"more")
    assert fetch(hub, tmp_path, "org/name:Q4_K_M") == "V3-Q4_K_M.gguf"
    check_fetched(tmp_path, big)


FULL_DISK = """
import huggingface_hub.file_download as library
def fails(url, stream, **_):
    stream.write(bytes(range(256)) * 1000)
    raise OSError(28, "No space left on device")
library.http_get = fails
"""


def test_disk_that_fills_up(hub: HubServer, tmp_path: Path, big: bytes) -> None:
    """One line; what was received stays, and the next run continues with it."""
    command = [sys.executable, "-c", FULL_DISK + CHILD, "org/name:Q4_K_M"]
    said = forked.run(
        command, env=environment(hub, tmp_path), capture_output=True, text=True, check=True
    ).stdout
    assert said.startswith("error: no space left on the disk of") and said.count("\n") == 1
    assert fetch(hub, tmp_path, "org/name:Q4_K_M") == "V3-Q4_K_M.gguf"
    assert [first for _, first in hub.sent] == [256_000]
    check_fetched(tmp_path, big)


def test_full_disk_is_noticed_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = SimpleNamespace(free=5_000_000_000)
    monkeypatch.setattr(resumable_download.shutil, "disk_usage", lambda _: usage)
    blobs = [resumable_download._Blob(name, "", tmp_path / name, 3 * 10**9) for name in "ab"]
    with pytest.raises(UserError, match=r"needs 6.0 GB.*has 5.0 GB left.*lowlat models rm"):
        resumable_download._check_space(blobs, tmp_path)
    (tmp_path / f"a{INCOMPLETE}").write_bytes(b"")
    os.truncate(tmp_path / f"a{INCOMPLETE}", 2 * 10**9)
    resumable_download._check_space(blobs, tmp_path)


# Tags


@pytest.mark.parametrize(
    ("path", "tag"),
    [
        ("Llama-3.2-1B-Instruct-Q4_K_M.gguf", "Q4_K_M"),
        ("tinyllama-1.1b-chat-v1.0.Q8_0.gguf", "Q8_0"),
        ("qwen2.5-0.5b-instruct-fp16.gguf", "FP16"),
        ("BF16/V3-BF16-00001-of-00030.gguf", "BF16"),
        ("UD-IQ1_S/R1-UD-IQ1_S-00001-of-00003.gguf", "UD-IQ1_S"),
        ("IQ4_XS/model.gguf", "IQ4_XS"),
        ("gpt-oss-20b-MXFP4.gguf", "MXFP4"),
        ("Q4-tuned-Q6_K.gguf", "Q6_K"),
        ("plain.gguf", "plain.gguf"),
    ],
)
def test_tags_of_names(path: str, tag: str) -> None:
    assert [variant.tag for variant in gguf_variants({path: 1})] == [tag]


def test_parts_are_one_model_in_order() -> None:
    names = [f"a/m-Q4_0-{number:05d}-of-00003.gguf" for number in (2, 1, 3)]
    (variant,) = gguf_variants(dict.fromkeys(names, 5))
    assert (variant.files, variant.size) == (tuple(sorted(names)), 15)


def test_a_shared_tag_gives_way_to_paths() -> None:
    variants = gguf_variants({"a-Q4_0.gguf": 1, "b-Q4_0.gguf": 2, "b-Q8_0.gguf": 3})
    assert [variant.tag for variant in variants] == ["a-Q4_0.gguf", "b-Q4_0.gguf", "Q8_0"]
    for tag in ("b-Q4_0.gguf", "B-q4_0"):
        assert choose_variant(variants, "o/n", tag).files == ("b-Q4_0.gguf",)
    with pytest.raises(UserError, match="no GGUF model with the tag 'Q4_0'; it has a-Q4_0"):
        choose_variant(variants, "o/n", "Q4_0")


def test_the_error_says_which_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "memory_limit", lambda: 24 * 10**9)
    monkeypatch.setattr(module, "is_larger_than_memory", lambda size: size > 24 * 10**9)
    sizes = {"m-Q2_K.gguf": 6 * 10**9, "m-Q6_K.gguf": 14 * 10**9, "m-BF16.gguf": 32 * 10**9}
    with pytest.raises(UserError) as caught:
        choose_variant(gguf_variants(sizes), "o/n", None)
    assert str(caught.value) == (
        "hub model 'o/n' holds 3 GGUF models; add a tag, as in o/n:Q6_K: Q2_K 6.0 GB, Q6_K 14.0 GB,"
        " BF16 32.0 GB; Q6_K is the largest that fits into this machine's 24.0 GB"
    )
    with pytest.raises(UserError, match=r"none fits into .* memory of 24\.0 GB"):
        choose_variant(gguf_variants({"m-F16.gguf": 10**12}), "o/n", "Q4")
