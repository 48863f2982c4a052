"""Which files make a checkpoint: shards against their index, links, paths, missing files."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lowlat.checkpoint.hf_folder import open_checkpoint
from lowlat.utils.errors import UserError

from .builders import assert_refused

A, B = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"


def sharded(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    save_file({"a": torch.zeros(3), "b": torch.ones(5)}, folder / A)
    save_file({"c": torch.full((2, 7), 2.0)}, folder / B)
    write_index(folder, {"a": A, "b": A, "c": B})
    return folder


def write_index(folder: Path, weight_map: object) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_sharded(tmp_path: Path) -> None:
    source = open_checkpoint(sharded(tmp_path / "model"))
    assert source.names() == ["a", "b", "c"]
    assert source.shape("c") == (2, 7) and source.dtype("c") == torch.float32
    assert torch.equal(source.read("c"), torch.full((2, 7), 2.0))
    assert source.hf_config == {"model_type": "llama"}
    assert source.where("c") == f"{tmp_path / 'model' / B}: tensor 'c'"
    files = [tmp_path / "model" / name for name in (A, B)]
    assert source.files == tuple(
        f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files
    )
    with pytest.raises(UserError, match="'d' is missing"):
        source.read("d")


def test_single_file_comes_first(tmp_path: Path) -> None:
    """As transformers does where a folder has both."""
    folder = sharded(tmp_path / "model")
    save_file({"z": torch.zeros(1)}, folder / "model.safetensors")
    assert open_checkpoint(folder).names() == ["z"]


def map_with(**changes: object) -> Callable[[Path], None]:
    return lambda folder: write_index(folder, {"a": A, "b": A, "c": B} | changes)


def text(name: str, content: bytes) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).write_bytes(content)

    return change


def without(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def cut(folder: Path) -> None:
    (folder / B).write_bytes((folder / B).read_bytes()[:-3])


def twice(folder: Path) -> None:
    save_file({"c": torch.zeros(2, 7), "b": torch.ones(5)}, folder / B)


def linked(name: str, target: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        outside = folder.parent / "outside"
        outside.mkdir()
        shutil.move(folder / name, outside / name)
        (folder / name).symlink_to(target.format(outside=outside, name=name))

    return change


def replaced(name: str, make: Callable[[Path], object]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return change


def loop(path: Path) -> None:
    path.symlink_to(path.name)


KINDS: dict[str, tuple[Callable[[Path], object], str]] = {
    "shard missing": (without(B), f"{B}: the file is missing"),
    "shard truncated": (cut, f"{B}: tensor 'c': its data end"),
    "shard empty": (text(B, b""), f"{B}: the file is empty"),
    "shard is a folder": (replaced(B, Path.mkdir), f"{B}: is not a regular file"),
    "tensor not in its shard": (map_with(d=B), "tensor 'd' is not in"),
    "tensor in another shard": (map_with(c=A), "tensor 'c' is not in"),
    "tensor the index leaves out": (
        lambda folder: write_index(folder, {"a": A, "c": B}),
        "'b' is here, but not according to",
    ),
    "tensor in two shards": (twice, "tensor 'b' is here, but not according to"),
    "path with a parent": (map_with(c="../outside.safetensors"), "not the plain name"),
    "absolute path": (map_with(c="/etc/x.safetensors"), "not the plain name"),
    "path below a folder": (map_with(c="sub/x.safetensors"), "not the plain name"),
    "path with backslashes": (map_with(c="..\\x.safetensors"), "not the plain name"),
    "hidden file": (map_with(c=".safetensors"), "not the plain name"),
    "name with a null byte": (map_with(c="x\0.safetensors"), "not the plain name"),
    "name with a line break": (map_with(c="x\n.safetensors"), "not the plain name"),
    "name of a pickle": (map_with(c="pytorch_model.bin"), "not the plain name"),
    "name that is empty": (map_with(c=""), "not the plain name"),
    "name that is a number": (map_with(c=7), "not the plain name"),
    "name that is null": (map_with(c=None), "not the plain name"),
    "name beyond 255 bytes": (map_with(c="x" * 300 + ".safetensors"), "not the plain name"),
    "index empty": (text(INDEX, b""), f"{INDEX}: the file is empty"),
    "index no JSON": (text(INDEX, b"{"), f"{INDEX}: not valid JSON"),
    "index a list": (text(INDEX, b"[]"), f"{INDEX}: must hold a JSON object"),
    "index without a map": (text(INDEX, b"{}"), f"{INDEX}: weight_map"),
    "map empty": (lambda folder: write_index(folder, {}), f"{INDEX}: weight_map"),
    "map a list": (lambda folder: write_index(folder, ["a"]), f"{INDEX}: weight_map"),
    "tensor named twice": (
        text(INDEX, b'{"weight_map": {"a": "x", "a": "y"}}'),
        "'a' appears twice",
    ),
    "index nested too deeply": (text(INDEX, b'{"weight_map":' * 40_000), "nested too deeply"),
    "index beyond the cap": (text(INDEX, b" " * (2**25 + 1)), "too many"),
    "shard linked out": (linked(B, "{outside}/{name}"), f"{B}: is a link to a place outside"),
    "shard linked out relatively": (linked(B, "../outside/{name}"), "outside the model folder"),
    "config linked out": (linked("config.json", "../outside/{name}"), "outside the model folder"),
    "index linked out": (linked(INDEX, "../outside/{name}"), "outside the model folder"),
    "shard linked to itself": (replaced(B, loop), f"{B}: "),
    "config missing": (without("config.json"), "config.json: the file is missing"),
    "config no JSON": (text("config.json", b"model_type: llama"), "config.json: not valid JSON"),
    "config with a duplicate": (text("config.json", b'{"a": 1, "a": 2}'), "'a' appears twice"),
    "config with NaN": (text("config.json", b'{"rope_theta": NaN}'), "NaN"),
    "no weights": (without(INDEX), "neither model.safetensors nor"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_malformed(tmp_path: Path, kind: str) -> None:
    folder = sharded(tmp_path / "model")
    change, message = KINDS[kind]
    change(folder)
    assert_refused(lambda: open_checkpoint(folder), folder, message)


def test_pickle_only(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "model")
    (folder / INDEX).rename(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="only pickle weights"):
        open_checkpoint(folder)


@pytest.mark.parametrize("name", ["absent", "text.txt"])
def test_not_a_checkpoint(tmp_path: Path, name: str) -> None:
    (tmp_path / "text.txt").write_text("x")
    with pytest.raises(UserError, match=f"{name}: (no such|is neither)"):
        open_checkpoint(tmp_path / name)


def hub_cache(root: Path) -> Path:
    """A snapshot as the hub's client lays it out: every file a link to a blob."""
    model = root / "models--org--name"
    snapshot = sharded(model / "snapshots" / "0123abcd")
    (model / "blobs").mkdir()
    for number, file in enumerate(sorted(snapshot.iterdir())):
        blob = model / "blobs" / f"hash{number}"
        file.rename(blob)
        file.symlink_to(f"../../blobs/{blob.name}")
    return snapshot


def test_hub_cache(tmp_path: Path) -> None:
    """Links into the blobs of the same model are the hub cache's normal layout."""
    snapshot = hub_cache(tmp_path)
    assert open_checkpoint(snapshot).names() == ["a", "b", "c"]
    (tmp_path / "short").symlink_to(snapshot)
    assert open_checkpoint(tmp_path / "short").names() == ["a", "b", "c"]


def test_hub_cache_of_another_model(tmp_path: Path) -> None:
    """A snapshot may not reach into the blobs of another repository."""
    snapshot = hub_cache(tmp_path)
    other = tmp_path / "models--org--other" / "blobs"
    shutil.copytree(snapshot.parent.parent / "blobs", other)
    target = (snapshot / A).readlink().name
    (snapshot / A).unlink()
    (snapshot / A).symlink_to(f"../../../models--org--other/blobs/{target}")
    with pytest.raises(UserError, match="outside the model folder"):
        open_checkpoint(snapshot)


def test_links_inside_the_folder(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "model")
    (folder / "data").mkdir()
    (folder / A).rename(folder / "data" / "x")
    (folder / A).symlink_to("data/x")
    assert open_checkpoint(folder).names() == ["a", "b", "c"]
