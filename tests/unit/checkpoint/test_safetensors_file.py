"""Reading one safetensors file: data types, alignment, views, every kind of malformed header."""

import os
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lowlat.checkpoint.safetensors.reader import DTYPES, SafetensorsFile
from lowlat.utils.errors import UserError

from .builders import assert_refused, bits, raw_safetensors

Header = dict[str, Any]


def entry(dtype: Any = "F32", shape: Any = (2, 3), offsets: Any = (0, 24), **more: Any) -> Header:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}


def one(**fields: Any) -> bytes:
    """A file with a single tensor 'w' and 24 bytes of data."""
    return raw_safetensors({"w": entry(**fields)}, bytes(24))


def two(first: Header, second: Header, size: int) -> bytes:
    return raw_safetensors({"a": first, "b": second}, bytes(size))


HALF = {"shape": (3,)}

MALFORMED: dict[str, tuple[bytes, str]] = {
    "empty file": (b"", "empty"),
    "seven bytes": (bytes(7), "no safetensors file"),
    "header length of all ones": (b"\xff" * 8 + bytes(99), "header length"),
    "header length with the sign bit": (struct.pack("<Q", 2**63) + bytes(99), "header length"),
    "header longer than the file": (raw_safetensors({}, length=500), "truncated"),
    "header length one short": (raw_safetensors(b'{"w":{}}', length=7), "not valid JSON"),
    "header length zero": (raw_safetensors(b"", b"{}"), "not valid JSON"),
    "header is no JSON": (raw_safetensors(b"not json at all"), "not valid JSON"),
    "header is not UTF-8": (raw_safetensors(b'{"\xff\xfe": 1}'), "not valid JSON"),
    "header is a list": (raw_safetensors(b"[1, 2]"), "JSON object"),
    "header is a number": (raw_safetensors(b"7"), "JSON object"),
    "header is nested too deeply": (raw_safetensors(b'{"w":' * 50_000), "nested too deeply"),
    "header has arrays nested too deeply": (raw_safetensors(b'{"w":' + b"[" * 99_000), "nested"),
    "header has text after it": (raw_safetensors(b"{} {}"), "not valid JSON"),
    "header is UTF-16": (raw_safetensors('{"w": 1}'.encode("utf-16")), "not valid JSON"),
    "duplicate tensor": (
        raw_safetensors(b'{"w": {"dtype": "F32"}, "w": {"dtype": "F32"}}'),
        "'w' appears twice",
    ),
    "duplicate field": (
        raw_safetensors(b'{"w": {"dtype": "F32", "dtype": "F16"}}'),
        "'dtype' appears twice",
    ),
    "NaN in the header": (raw_safetensors(b'{"w": NaN}'), "NaN"),
    "infinite offset": (raw_safetensors(b'{"w": {"data_offsets": [0, Infinity]}}'), "Infinity"),
    "number of 5000 digits": (raw_safetensors(b'{"w": ' + b"9" * 5000 + b"}"), "not valid JSON"),
    "metadata is a list": (raw_safetensors({"__metadata__": ["x"]}), "__metadata__"),
    "metadata holds a number": (raw_safetensors({"__metadata__": {"x": 1}}), "__metadata__"),
    "entry is null": (raw_safetensors({"w": None}), "'w'"),
    "entry is a list": (raw_safetensors({"w": [1]}), "'w'"),
    "entry without dtype": (raw_safetensors({"w": {"shape": [], "data_offsets": [0, 4]}}), "'w'"),
    "entry without shape": (
        raw_safetensors({"w": {"dtype": "F32", "data_offsets": [0, 4]}}),
        "'w'",
    ),
    "entry without offsets": (raw_safetensors({"w": {"dtype": "F32", "shape": []}}), "'w'"),
    "entry with one more field": (one(stride=[1]), "'w'"),
    "dtype unknown": (one(dtype="F128"), "dtype 'F128' is unknown"),
    "dtype is a number": (one(dtype=32), "dtype"),
    "dtype is a list": (one(dtype=["F32"]), "dtype"),
    "dtype of 4 bits": (one(dtype="F4"), "dtype"),
    "shape is a text": (one(shape="2,3"), "shape"),
    "shape is null": (one(shape=None), "shape"),
    "shape with a negative size": (one(shape=(-2, -3)), "not negative"),
    "shape with a fraction": (one(shape=(2.0, 3)), "whole numbers"),
    "shape with true": (one(shape=(True, 6)), "whole numbers"),
    "shape with a text": (one(shape=("2", 3)), "whole numbers"),
    "shape that overflows 64 bits": (one(shape=(2**32, 2**32)), "too large"),
    "shape that overflows beside a zero": (one(shape=(0, 2**62, 4), offsets=(0, 0)), "too large"),
    "shape with an absurd size": (one(shape=(10**300, 1)), "too large"),
    "shape of 9 axes": (one(shape=(1,) * 7 + (2, 3)), "too large"),
    "shape of 100 axes": (one(shape=(1,) * 100), "short list"),
    "shape larger than the extent": (one(shape=(2, 4)), "takes 32 bytes"),
    "shape smaller than the extent": (one(shape=(2, 2)), "takes 16 bytes"),
    "dtype wider than the extent": (one(dtype="F64"), "takes 48 bytes"),
    "offsets reversed": (one(offsets=(24, 0)), "begin <= end"),
    "one offset": (one(offsets=(24,)), "begin <= end"),
    "three offsets": (one(offsets=(0, 12, 24)), "begin <= end"),
    "negative offset": (one(offsets=(-24, 0)), "not negative"),
    "offset with true": (one(offsets=(False, 24)), "whole numbers"),
    "offset is a float": (one(offsets=(0.0, 24.0)), "whole numbers"),
    "offsets beyond the file": (one(offsets=(1000, 1024)), "truncated"),
    "offsets that wrap around 64 bits": (one(offsets=(2**64 - 24, 2**64)), "truncated"),
    "data cut by one byte": (one()[:-1], "truncated"),
    "data missing": (one()[:-24], "truncated"),
    "data one byte too many": (one() + b"x", "1 bytes follow"),
    "first tensor not at the start": (one(shape=(5,), offsets=(4, 24)), "gap"),
    "tensors overlap": (
        two(entry(**HALF, offsets=(0, 12)), entry(**HALF, offsets=(8, 20)), 20),
        "overlaps",
    ),
    "tensors share their data": (
        two(entry(**HALF, offsets=(0, 12)), entry(**HALF, offsets=(0, 12)), 12),
        "overlaps",
    ),
    "gap between tensors": (
        two(entry(**HALF, offsets=(0, 12)), entry(**HALF, offsets=(16, 28)), 28),
        "gap",
    ),
    "name with a line break": (raw_safetensors({"w\nx": None}), r"'w\nx'"),
    "name of a megabyte": (raw_safetensors({"w" * 2**20: None}), "www..."),
    "name with half a surrogate": (raw_safetensors(b'{"\\ud800": null}'), "ud800"),
}


@pytest.mark.parametrize("kind", MALFORMED)
def test_malformed(tmp_path: Path, kind: str) -> None:
    """One line that names the file and, if one is at fault, the tensor."""
    content, message = MALFORMED[kind]
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    assert_refused(lambda: SafetensorsFile(path), path, message)


def test_kinds_are_many() -> None:
    assert len(MALFORMED) >= 60


def test_header_beyond_the_cap(tmp_path: Path) -> None:
    """The cap holds even where the file is long enough; the hole costs no disk."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", 2**30))
    os.truncate(path, 2**30 + 8)
    with pytest.raises(UserError, match="header length 1073741824 exceeds"):
        SafetensorsFile(path)


@pytest.mark.parametrize(
    "make",
    [lambda path: path.mkdir(), lambda path: os.mkfifo(path), lambda path: None],
    ids=["folder", "pipe", "absent"],
)
def test_not_a_file(tmp_path: Path, make: Any) -> None:
    """A pipe must not make the reader wait for a writer."""
    path = tmp_path / "model.safetensors"
    make(path)
    with pytest.raises(UserError, match=r"model\.safetensors: (is not a regular|cannot be)"):
        SafetensorsFile(path)


@pytest.mark.parametrize("code", DTYPES)
def test_dtypes(tmp_path: Path, code: str) -> None:
    """Every data type comes out with the bits the reference library put in."""
    raw = torch.randint(0, 2 if code == "BOOL" else 256, (5, 3, 8), dtype=torch.uint8)
    tensor = raw.view(DTYPES[code]) if code != "BOOL" else raw.bool()
    save_file({"first": torch.zeros(7, dtype=torch.uint8), "w": tensor}, tmp_path / "x")
    file = SafetensorsFile(tmp_path / "x")
    assert file.extents["w"].shape == tensor.shape
    assert file.read("w").dtype == tensor.dtype
    assert torch.equal(bits(file.read("w")), bits(tensor))


def test_unaligned_and_empty_tensors(tmp_path: Path) -> None:
    """A tensor at an odd offset is copied, because views of wider types need alignment."""
    header = {
        "odd": entry("U8", (1,), (0, 1)),
        "w": entry("F32", (2,), (1, 9)),
        "none": entry("F32", (0, 5), (9, 9)),
        "scalar": entry("F64", (), (9, 17)),
    }
    data = b"\x07" + struct.pack("<ff", 1.5, -2.0) + struct.pack("<d", 0.25)
    (tmp_path / "x").write_bytes(raw_safetensors(header, data))
    file = SafetensorsFile(tmp_path / "x")
    assert file.read("w").tolist() == [1.5, -2.0]
    assert file.read("none").shape == (0, 5)
    assert file.read("scalar").item() == 0.25


def test_views_are_private(tmp_path: Path) -> None:
    """Writing to a loaded tensor neither crashes nor reaches the file; reading copies nothing."""
    path = tmp_path / "x"
    save_file({"w": torch.arange(5000.0)}, path)
    file = SafetensorsFile(path)
    view = file.read("w")
    assert view.data_ptr() == file.read("w").data_ptr()
    view.mul_(0)
    assert torch.equal(SafetensorsFile(path).read("w"), torch.arange(5000.0))


def test_release_keeps_values(tmp_path: Path) -> None:
    """Released pages come back from the file; neighbours' pages are not touched."""
    path = tmp_path / "x"
    save_file({"a": torch.arange(5000.0), "b": torch.arange(3001.0)}, path)
    file = SafetensorsFile(path)
    changed = file.read("b").add_(1)
    file.release("a")
    assert torch.equal(file.read("a"), torch.arange(5000.0))
    assert torch.equal(changed, torch.arange(3001.0) + 1)


def test_file_cut_short_while_open(tmp_path: Path) -> None:
    """Touching a page beyond the end would be SIGBUS: the next read is refused instead."""
    path = tmp_path / "x"
    save_file({"w": torch.arange(5000.0)}, path)
    file = SafetensorsFile(path)
    os.truncate(path, 1000)
    with pytest.raises(UserError, match="cut short while in use"):
        file.read("w")


def test_replaced_file_stays_readable(tmp_path: Path) -> None:
    """The mapping keeps its own descriptor."""
    path = tmp_path / "x"
    save_file({"w": torch.arange(5.0)}, path)
    file = SafetensorsFile(path)
    path.unlink()
    path.write_bytes(b"something else")
    assert file.read("w").tolist() == [0, 1, 2, 3, 4]
