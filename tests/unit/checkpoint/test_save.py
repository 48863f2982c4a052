"""Writing checkpoints: all or nothing, shards, and files other programs read."""

import json
import os
import resource
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from lowlat.checkpoint import save
from lowlat.checkpoint.hf_folder import open_checkpoint
from lowlat.checkpoint.load import load_model
from lowlat.checkpoint.safetensors import writer
from lowlat.checkpoint.save import save_model, text_files, write_checkpoint
from lowlat.utils.errors import UserError
from tests import forked

from .builders import FAMILIES, assert_same_bits, random_model

Pairs = Iterator[tuple[str, torch.Tensor]]


def numbers(count: int = 7) -> Pairs:
    """Tensors of 4, 8, 12, ... bytes."""
    for index in range(count):
        yield f"t{index}", torch.arange(float(index + 1))


def assert_nothing_left(folder: Path) -> None:
    assert list(folder.iterdir()) == []


def test_single_file(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "m", {"x": 1}, numbers(), extra_files={"a.txt": b"hello"})
    names = {file.name for file in (tmp_path / "m").iterdir()}
    assert names == {"config.json", "model.safetensors", "a.txt"}
    assert json.loads((tmp_path / "m" / "config.json").read_text()) == {"x": 1}
    assert (tmp_path / "m" / "a.txt").read_bytes() == b"hello"
    with safe_open(tmp_path / "m" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert {name: len(file.get_tensor(name)) for name in file.keys()} == {
            f"t{index}": index + 1 for index in range(7)
        }
    assert {file.name for file in tmp_path.iterdir()} == {"m"}


def test_shards(tmp_path: Path) -> None:
    """A shard ends before the tensor that would overflow it; a tensor may exceed a shard."""
    write_checkpoint(tmp_path / "m", {}, numbers(), max_shard_bytes=20)
    index = json.loads((tmp_path / "m" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 4 * 28
    shards = [index["weight_map"][f"t{i}"] for i in range(7)]
    assert [int(name[6:11]) for name in shards] == [1, 1, 2, 3, 4, 5, 6]
    assert set(shards) == {f"model-{i:05}-of-00006.safetensors" for i in range(1, 7)}
    source = open_checkpoint(tmp_path / "m")
    assert all(torch.equal(source.read(name), value) for name, value in numbers())
    for shard in set(shards):
        with safe_open(tmp_path / "m" / shard, "pt") as file:
            assert file.keys()


def test_full_header_ends_a_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Very many small tensors: the space reserved for the header runs out before the shard's
    size."""
    monkeypatch.setattr(writer, "HEADER_ROOM", 2**10)
    write_checkpoint(tmp_path / "m", {}, numbers(40))
    source = open_checkpoint(tmp_path / "m")
    assert all(torch.equal(source.read(name), value) for name, value in numbers(40))
    assert len(list((tmp_path / "m").glob("model-*-of-*.safetensors"))) > 2


def test_reserved_header_stays_in_large_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Large files are not rewritten: spaces fill the header, which other readers accept."""
    monkeypatch.setattr(writer, "CLOSE_UP_BYTES", 0)
    write_checkpoint(tmp_path / "m", {}, numbers())
    with safe_open(tmp_path / "m" / "model.safetensors", "pt") as file:
        assert file.get_tensor("t6").tolist() == [0, 1, 2, 3, 4, 5, 6]
    source = open_checkpoint(tmp_path / "m")
    assert all(torch.equal(source.read(name), value) for name, value in numbers())


def test_views_and_empty_tensors(tmp_path: Path) -> None:
    """Strided, zero-dimensional and empty tensors are written as they read."""
    grid = torch.arange(35.0).view(5, 7)
    tensors = {"t": grid.T, "s": grid[1:4, ::2], "z": torch.tensor(3.5), "e": torch.empty(0, 3)}
    write_checkpoint(tmp_path / "m", {}, iter(tensors.items()))
    source = open_checkpoint(tmp_path / "m")
    assert all(torch.equal(source.read(name), value) for name, value in tensors.items())


def test_no_tensors(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "m", {}, iter(()))
    assert open_checkpoint(tmp_path / "m").names() == []


@pytest.mark.parametrize("kind", ["folder", "empty folder", "file", "dangling link"])
def test_existing_destination(tmp_path: Path, kind: str) -> None:
    """Nothing is overwritten, not even an empty folder, which a rename would replace."""
    dst = tmp_path / "m"
    if kind == "file":
        dst.write_text("precious")
    elif kind == "dangling link":
        dst.symlink_to("nowhere")
    else:
        dst.mkdir()
        if kind == "folder":
            (dst / "x").write_text("precious")
    with pytest.raises(UserError, match="m: exists already"):
        write_checkpoint(dst, {}, numbers())
    assert {file.name for file in tmp_path.iterdir()} == {"m"}


def test_destination_appears_meanwhile(tmp_path: Path) -> None:
    def racing() -> Pairs:
        yield from numbers()
        (tmp_path / "m").mkdir()

    with pytest.raises(UserError, match="m: exists already"):
        write_checkpoint(tmp_path / "m", {}, racing())
    assert list((tmp_path / "m").iterdir()) == []
    assert {file.name for file in tmp_path.iterdir()} == {"m"}


def test_parent_missing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="absent: is not a folder; create it first"):
        write_checkpoint(tmp_path / "absent" / "m", {}, numbers())
    assert_nothing_left(tmp_path)


@pytest.mark.parametrize("size", [0, -1])
def test_shard_size(tmp_path: Path, size: int) -> None:
    with pytest.raises(UserError, match="max_shard_bytes"):
        write_checkpoint(tmp_path / "m", {}, numbers(), max_shard_bytes=size)


@pytest.mark.parametrize("error", [UserError("bad source"), KeyboardInterrupt(), RuntimeError("x")])
def test_failing_tensors(tmp_path: Path, error: BaseException) -> None:
    """Whatever stops the work, also Ctrl-C, passes through and leaves nothing behind."""

    def failing() -> Pairs:
        yield from numbers()
        raise error

    with pytest.raises(type(error)):
        write_checkpoint(tmp_path / "m", {}, failing(), max_shard_bytes=9)
    assert_nothing_left(tmp_path)


def test_faults_at_every_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No space at the n-th fsync, for every n, and at the rename: one error line, nothing left."""
    real, calls = os.fsync, [0]

    def fsync(descriptor: int) -> None:
        calls[0] += 1
        if calls[0] == calls[1]:
            raise OSError(28, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    calls += [-1]
    write_checkpoint(tmp_path / "good", {}, numbers(), max_shard_bytes=20, extra_files={"a": b""})
    steps = calls[0]
    assert steps >= 6 + 4
    # the last fsync, of the parent folder, comes after the rename
    for step in range(1, steps):
        calls[0], calls[1] = 0, step
        with pytest.raises(UserError, match=r"cannot be written \(No space left on device\)"):
            write_checkpoint(
                tmp_path / "bad", {}, numbers(), max_shard_bytes=20, extra_files={"a": b""}
            )
        assert {file.name for file in tmp_path.iterdir()} == {"good"}, step


FULL = """
import resource, signal, sys
from pathlib import Path
import torch
from lowlat.checkpoint.save import write_checkpoint
from lowlat.utils.errors import UserError

resource.setrlimit(resource.RLIMIT_FSIZE, (1_500_000, 1_500_000))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
try:
    write_checkpoint(Path(sys.argv[1]), {}, ((f"t{i}", torch.ones(50_000)) for i in range(9)))
except UserError as error:
    print(error)
"""


def test_disk_takes_no_more(tmp_path: Path) -> None:
    """A real write that fails half-way (the system's file size limit stands in for a full disk)."""
    assert resource.RLIMIT_FSIZE is not None
    done = forked.run(
        [sys.executable, "-c", FULL, str(tmp_path / "m")],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{tmp_path / 'm'}: cannot be written (File too large)")
    assert done.stdout.count("\n") == 1
    assert_nothing_left(tmp_path)


def test_tokenizer_files_are_copied(tmp_path: Path) -> None:
    """Files that do not depend on the weights are copied; weights and index are not."""
    source = tmp_path / "source"
    source.mkdir()
    (source / "additional_chat_templates").mkdir()
    copied = {"tokenizer.json", "tiktoken.model", "chat_template.jinja"}
    copied.add("additional_chat_templates/tool_use.jinja")
    for name in (*copied, "model.safetensors.index.json", "x.py"):
        (source / name).write_text(name)
    assert set(text_files(source)) == copied
    config = FAMILIES["llama"]
    model = random_model(config)
    save_model(model, config, tmp_path / "m", source=source)
    assert all((tmp_path / "m" / name).read_text() == name for name in copied)
    assert not (tmp_path / "m" / "x.py").exists()
    raw = json.loads((tmp_path / "m" / "config.json").read_text())
    assert raw["dtype"] == "bfloat16" and raw["architectures"] == ["LlamaForCausalLM"]
    assert_same_bits(load_model(tmp_path / "m").model, model)


def test_relative_destination(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_checkpoint(Path("m"), {}, numbers())
    assert open_checkpoint(Path("m")).names() == [f"t{i}" for i in range(7)]
    assert save.MAX_SHARD_BYTES == 5_000_000_000
