"""Split GGUF models in the layout of llama.cpp's converter and gguf-split: any part opens all."""

import re
import shutil
import struct
from pathlib import Path

import pytest
import torch

from lowlat.checkpoint.fetch.model_names import resolve
from lowlat.checkpoint.gguf.split import open_parts
from lowlat.checkpoint.hf_folder import open_checkpoint, weight_files
from lowlat.checkpoint.load import load_model
from lowlat.text.gguf_vocab import has_vocabulary
from lowlat.utils.errors import UserError

from .builders import FAMILIES, bits, random_model
from .gguf_files import write_gguf
from .test_gguf_file import SIX, TEXT, U32, gguf, info, key, text

U16, I32 = 2, 5


def parts_of(folder: Path) -> list[Path]:
    return sorted(folder.glob("m-*.gguf"))


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    config = FAMILIES["deepseek_v3"]
    return write_gguf(tmp_path / "m.gguf", config, random_model(config).state_dict())


@pytest.mark.parametrize("small_first", [False, True])
def test_any_part_opens_all(tmp_path: Path, small_first: bool) -> None:
    """Every part's name gives the weights of the whole file, bit for bit."""
    config = FAMILIES["deepseek_v3"]
    parameters = random_model(config, dtype=torch.float32).state_dict()
    write_gguf(tmp_path / "m.gguf", config, parameters, split=9, small_first=small_first)
    parts = parts_of(tmp_path)
    assert len(parts) > 2
    for path in parts:
        loaded = load_model(path)
        assert (loaded.config, loaded.path) == (config, parts[0])
        for name, value in loaded.model.state_dict().items():
            assert torch.equal(bits(value), bits(parameters[name])), name
        assert weight_files(path) == parts
        names = [version.split()[0] for version in loaded.model.weight_files]
        assert names == [part.name for part in parts]
        assert resolve(str(path)) == parts[0]
        assert has_vocabulary(path)  # which only the first part has


def test_released_tensors_are_read_again_from_their_part(tmp_path: Path) -> None:
    config = FAMILIES["deepseek_v3"]
    write_gguf(tmp_path / "m.gguf", config, random_model(config).state_dict(), split=9)
    source = open_checkpoint(parts_of(tmp_path)[0])
    for name in source.names():
        before = source.read(name).clone()
        source.release(name)
        assert torch.equal(source.read(name), before), name
    places = {tensor.where.partition(": ")[0] for tensor in source.tensors.values()}
    assert places == {str(path) for path in parts_of(tmp_path)}


def test_a_file_of_one_part_may_have_any_name(whole: Path) -> None:
    """Also one whose name looks like a part's: the keys decide, as in llama.cpp."""
    odd = whole.rename(whole.with_name("m-00002-of-00003.gguf"))
    assert load_model(odd).path == odd


def test_a_file_that_was_merged_from_parts(tmp_path: Path) -> None:
    """gguf-split --merge leaves the parts' keys in it, with a count of 0."""
    path = tmp_path / "m-00001-of-00002.gguf"
    path.write_bytes(gguf(split_keys(0, 0, 1), (info("a"),), SIX))
    assert open_parts(path).read("a").tolist() == [[0, 1, 2], [3, 4, 5]]


def split_keys(number: int, count: int = 2, tensors: int | None = 2) -> tuple[bytes, ...]:
    keys = [
        key("split.no", U16, struct.pack("<H", number)),
        key("split.count", U16, struct.pack("<H", count)),
    ]
    if tensors is not None:
        keys.append(key("split.tensors.count", I32, struct.pack("<i", tensors)))
    return tuple(keys)


def part(number: int, name: str, count: int = 2, tensors: int | None = 2) -> bytes:
    return gguf(split_keys(number, count, tensors), (info(name),), SIX)


def pair(folder: Path, first: bytes | None, second: bytes | None) -> list[Path]:
    """Two files under their right names."""
    paths = [folder / f"m-{number:05d}-of-00002.gguf" for number in (1, 2)]
    for path, content in zip(paths, (first, second), strict=True):
        if content is not None:
            path.write_bytes(content)
    return paths


def test_two_parts_of_bytes(tmp_path: Path) -> None:
    for path in pair(tmp_path, part(0, "a"), part(1, "b")):
        file = open_parts(path)
        assert list(file.tensors) == ["a", "b"]
        assert file.read("b").tolist() == [[0, 1, 2], [3, 4, 5]]
        assert file.path_of("b").name == "m-00002-of-00002.gguf"


A, B = part(0, "a"), part(1, "b")
OTHER_ARCH = key("general.architecture", TEXT, text("llama"))
FIRST_ARCH = key("general.architecture", TEXT, text("deepseek2"))

MALFORMED: dict[str, tuple[bytes | None, bytes | None, int, str]] = {
    # first part, second part, number of the part at fault, message
    "second missing": (A, None, 2, "this part is missing"),
    "first missing": (None, B, 1, "this part is missing"),
    "second truncated": (A, B[:-1], 2, "truncated"),
    "second no GGUF file": (A, b"x" * 99, 2, "not a GGUF file"),
    "second empty": (A, b"", 2, "is empty"),
    "first twice": (A, A, 2, "'split.no' is 0, not 1"),
    "of three": (A, part(1, "b", 3), 2, "'split.count' is 3, but 2 in"),
    "other tensor count": (A, part(1, "b", 2, 7), 2, "'split.tensors.count' is 7, but 2 in"),
    "no keys": (A, gguf((), (info("b"),), SIX), 2, "'split.no' is missing, not 1"),
    "no tensor count": (A, part(1, "b", 2, None), 2, "'split.tensors.count' is missing, but 2"),
    "same tensor": (A, part(1, "a"), 2, "tensor 'a' is also in"),
    "other architecture": (
        gguf((*split_keys(0), FIRST_ARCH), (info("a"),), SIX),
        gguf((*split_keys(1), OTHER_ARCH), (info("b"),), SIX),
        2,
        "'general.architecture' is 'llama', but 'deepseek2' in",
    ),
    "a tensor too few": (part(0, "a", 2, 3), part(1, "b", 2, 3), 1, "'split.tensors.count' is 3"),
}


@pytest.mark.parametrize("kind", MALFORMED)
def test_malformed_parts(tmp_path: Path, kind: str) -> None:
    """One line that begins with the part at fault."""
    first, second, fault, message = MALFORMED[kind]
    paths = pair(tmp_path, first, second)
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        open_parts(paths[1] if first is None else paths[0])
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(str(paths[fault - 1]))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("renamed.gguf", B, "is part 2 of 2.*rename it to NAME-00002-of-00002.gguf"),
        ("m-00001-of-00002.gguf", B, "is part 2 of 2.*rename it"),
        ("m-00001-of-00003.gguf", A, "is part 1 of 2.*rename it"),
        ("m-00001-of-00002.gguf", part(5, "a"), "'split.no' is 5, but there are 2 parts"),
        ("m.gguf", gguf((key("split.count", U32, b"\xff" * 4),)), "is 4294967295, not a valid"),
        ("m.gguf", gguf((key("split.count", TEXT, text("x" * 9999)),)), "not a valid count"),
        ("m.gguf", gguf((key("split.count", 7, b"\1"),)), "'split.count' is True"),
        ("m.gguf", gguf((key("split.count", 6, struct.pack("<f", 2)),)), "'split.count' is 2.0"),
    ],
)
def test_malformed_keys_and_names(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        open_parts(path)
    assert str(caught.value).startswith(str(path)) and len(str(caught.value)) < 500


@pytest.mark.parametrize("number", range(3))
def test_a_part_of_another_model(tmp_path: Path, number: int) -> None:
    """Parts of the same file with other layers in them: a tensor is there twice, or the count of
    tensors differs.
    """
    config = FAMILIES["deepseek_v3"]
    for folder, split in (("a", 12), ("b", 13)):
        (tmp_path / folder).mkdir()
        parameters = random_model(config).state_dict()
        write_gguf(tmp_path / folder / "m.gguf", config, parameters, split=split)
    ours, theirs = parts_of(tmp_path / "a"), parts_of(tmp_path / "b")
    assert len(ours) == len(theirs) == 3
    shutil.copy(theirs[number], ours[number])
    with pytest.raises(UserError, match=r"m-0000\d-of-.*(is also in|tensors; one is damaged)"):
        open_checkpoint(ours[0])
