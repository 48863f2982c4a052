"""The bytes of a GGUF file: values, alignment, and every kind of malformed header."""

import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType, GGUFValueType

from lowlat.checkpoint.gguf.file import GGUFFile, SkippedArray
from lowlat.utils.errors import UserError

from .builders import assert_refused

F32, Q8_0 = int(GGMLQuantizationType.F32), int(GGMLQuantizationType.Q8_0)
U32, TEXT, ARRAY = 4, 8, 9


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def key(name: str | bytes, kind: int, payload: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + payload


def info(
    name: str | bytes = "w",
    dims: tuple[int, ...] = (3, 2),
    kind: int = F32,
    offset: int = 0,
    rank: int | None = None,
) -> bytes:
    sizes = struct.pack(f"<{len(dims)}Q", *dims)
    rank = len(dims) if rank is None else rank
    return text(name) + struct.pack("<I", rank) + sizes + struct.pack("<IQ", kind, offset)


def gguf(
    keys: tuple[bytes, ...] = (),
    infos: tuple[bytes, ...] = (),
    data: bytes = b"",
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    counts: tuple[int, int] | None = None,
    alignment: int = 32,
) -> bytes:
    counts = counts or (len(infos), len(keys))
    head = magic + struct.pack("<IQQ", version, *counts) + b"".join(keys) + b"".join(infos)
    return head + bytes(-len(head) % alignment) + data if data else head


SIX = struct.pack("<6f", *range(6))
GOOD = gguf((key("k", U32, struct.pack("<I", 7)),), (info(),), SIX)
ALIGNMENT = "general.alignment"

MALFORMED: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "empty"),
    "three bytes": (b"GGU", "ends within the magic"),
    "wrong magic": (gguf(magic=b"GGML"), "not a GGUF file"),
    "magic backwards": (gguf(magic=b"FUGG"), "not a GGUF file"),
    "cut in the version": (GOOD[:6], "ends within the version"),
    "version 1": (gguf(version=1), "version 1 is not supported"),
    "version 0": (gguf(version=0), "version 0 is not supported"),
    "version 4": (gguf(version=4), "version 4 is not supported"),
    "big-endian": (gguf(version=3 << 24), "big-endian"),
    "cut in the counts": (GOOD[:20], "ends within the key count"),
    "2^64 - 1 tensors": (gguf(counts=(2**64 - 1, 0)), "too many"),
    "2^40 keys": (gguf(counts=(0, 2**40)), "too many"),
    "more keys than there are": (gguf(counts=(0, 9)), "ends within a key"),
    "more tensors than there are": (gguf(counts=(9, 0)), "ends within a tensor's name"),
    "key longer than the file": (gguf((struct.pack("<Q", 60000) + b"k",)), "ends within a key"),
    "key of 2^63 bytes": (gguf((struct.pack("<Q", 2**63),)), "is too long"),
    "key not UTF-8": (gguf((key(b"\xff\xfe", U32, bytes(4)),)), "not UTF-8"),
    "key twice": (gguf((key("k", U32, bytes(4)),) * 2), "'k' appears twice"),
    "value type unknown": (gguf((key("k", 13, bytes(4)),)), "key 'k': value type 13"),
    "value type 2^32 - 1": (gguf((key("k", 2**32 - 1, b""),)), "value type 4294967295"),
    "value cut off": (gguf((key("k", U32, bytes(3)),)), "ends within key 'k'"),
    "text cut off": (gguf((key("k", TEXT, text("long")[:-1]),)), "ends within key 'k'"),
    "text of 2^62 bytes": (gguf((key("k", TEXT, struct.pack("<Q", 2**62)),)), "too long"),
    "text not UTF-8": (gguf((key("k", TEXT, text(b"\xc3\x28")),)), "not UTF-8"),
    "array of unknown type": (gguf((key("k", ARRAY, struct.pack("<IQ", 99, 1)),)), "type 99"),
    "array of arrays": (gguf((key("k", ARRAY, struct.pack("<IQ", ARRAY, 1)),)), "of arrays"),
    "array of 2^60 numbers": (gguf((key("k", ARRAY, struct.pack("<IQ", U32, 2**60)),)), "many"),
    "array of 2^60 texts": (gguf((key("k", ARRAY, struct.pack("<IQ", TEXT, 2**60)),)), "many"),
    "array cut off": (
        gguf((key("k", ARRAY, struct.pack("<IQ", U32, 5) + bytes(19)),)),
        "ends within key 'k'",
    ),
    "texts cut off": (
        gguf((key("k", ARRAY, struct.pack("<IQ", TEXT, 2) + text("a") + b"\1"),)),
        "ends within key 'k'",
    ),
    "alignment of zero": (gguf((key(ALIGNMENT, U32, bytes(4)),)), f"'{ALIGNMENT}' is 0"),
    "alignment of 3": (gguf((key(ALIGNMENT, U32, b"\3" + bytes(3)),)), f"'{ALIGNMENT}' is 3"),
    "alignment of 2^31": (gguf((key(ALIGNMENT, U32, b"\0\0\0\x80"),)), "not a power"),
    "alignment a text": (gguf((key(ALIGNMENT, TEXT, text("x")),)), "not a power"),
    "alignment true": (gguf((key(ALIGNMENT, 7, b"\1"),)), "not a power"),
    "name not UTF-8": (gguf(infos=(info(b"\xff"),), data=SIX), "tensor's name"),
    "no dimensions": (gguf(infos=(info(dims=()),), data=SIX), "'w': 0 dimensions"),
    "five dimensions": (gguf(infos=(info(dims=(1,) * 5),), data=SIX), "'w': 5 dimensions"),
    "2^32 - 1 dimensions": (gguf(infos=(info(rank=2**32 - 1),), data=SIX), "dimensions"),
    "dimension of zero": (gguf(infos=(info(dims=(3, 0)),), data=SIX), "'w': shape [0, 3]"),
    "dimensions that overflow": (gguf(infos=(info(dims=(2**63, 2**63)),), data=SIX), "too large"),
    "2^40 experts": (gguf(infos=(info(dims=(1, 1, 2**40)),), data=SIX), "too large"),
    "tensor type unknown": (gguf(infos=(info(kind=999),), data=SIX), "'w': tensor type 999"),
    "tensor type retired": (gguf(infos=(info(kind=4),), data=SIX), "'w': tensor type 4"),
    "tensor of integers": (
        gguf(infos=(info(kind=26),), data=SIX),
        "type I32 cannot be dequantised",
    ),
    "rows of broken blocks": (gguf(infos=(info(kind=Q8_0),), data=SIX), "not whole Q8_0 blocks"),
    "offset not aligned": (gguf(infos=(info(offset=4),), data=SIX + bytes(8)), "offset 4 is wrong"),
    "offset leaves a gap": (gguf(infos=(info(offset=64),), data=bytes(99)), "offset 64 is wrong"),
    "offset of 2^64 - 32": (gguf(infos=(info(offset=2**64 - 32),), data=SIX), "'w': offset"),
    "offsets overlap": (gguf(infos=(info(), info("v")), data=bytes(99)), "'v': offset 0 is wrong"),
    "offsets swapped": (
        gguf(infos=(info(offset=32), info("v")), data=bytes(99)),
        "'w': offset 32 is wrong",
    ),
    "tensor twice": (gguf(infos=(info(), info(offset=32)), data=bytes(99)), "'w' appears twice"),
    "data cut by one byte": (GOOD[:-1], "'w': its data end"),
    "data missing": (gguf(infos=(info(),)), "'w': its data end"),
    "data larger than the file": (gguf(infos=(info(dims=(2**40,)),), data=SIX), "truncated"),
}


@pytest.mark.parametrize("kind", MALFORMED)
def test_malformed(tmp_path: Path, kind: str) -> None:
    """One line that names the file and, if one is at fault, the key or tensor."""
    content, message = MALFORMED[kind]
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    assert_refused(lambda: GGUFFile(path), path, message)


def test_every_cut_is_noticed(tmp_path: Path) -> None:
    """A file cut anywhere is an error, never a shorter model."""
    path = tmp_path / "m.gguf"
    for length in range(len(GOOD)):
        path.write_bytes(GOOD[:length])
        with pytest.raises(UserError, match=r"m\.gguf"):
            GGUFFile(path)


def test_values(tmp_path: Path) -> None:
    """Every value type; fp32 as the decimal that was meant."""
    numbers = {"<B": 0, "<b": 1, "<H": 2, "<h": 3, "<I": 4, "<i": 5, "<Q": 10, "<q": 11}
    keys = [key(code, kind, struct.pack(code, 77)) for code, kind in numbers.items()]
    keys.append(key("f", 6, struct.pack("<f", 1e-5)))
    keys.append(key("d", 12, struct.pack("<d", 0.1)))
    keys.append(key("t", 7, b"\1"))
    keys.append(key("s", TEXT, text("größe")))
    keys.append(key("a", ARRAY, struct.pack("<IQ3I", U32, 3, 5, 6, 7)))
    keys.append(key("texts", ARRAY, struct.pack("<IQ", TEXT, 2) + text("x") + text("")))
    keys.append(key("many", ARRAY, struct.pack("<IQ", U32, 257) + bytes(4 * 257)))
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf(tuple(keys)))
    expected: dict[str, Any] = dict.fromkeys(numbers, 77)
    expected |= {"f": 1e-05, "d": 0.1, "t": True, "s": "größe", "a": [5, 6, 7]}
    assert GGUFFile(path).metadata == expected | {
        "texts": SkippedArray(2),
        "many": SkippedArray(257),
    }
    assert len(GGUFValueType) == 13


def test_alignment(tmp_path: Path) -> None:
    """Data begin at a multiple of general.alignment, and so does every tensor."""
    path = tmp_path / "m.gguf"
    infos = (info("a", (3,)), info("b", (2, 1), offset=128))
    data = struct.pack("<3f", 1, 2, 3) + bytes(116) + struct.pack("<2f", 4, 5)
    path.write_bytes(gguf((key(ALIGNMENT, U32, b"\x80\0\0\0"),), infos, data, alignment=128))
    file = GGUFFile(path)
    assert file.read("a").tolist() == [1, 2, 3]
    assert file.read("b").tolist() == [[4, 5]]


def test_row_of_a_stack(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf(infos=(info(dims=(1, 3, 2)),), data=SIX))
    file = GGUFFile(path)
    assert file.rows("w", 3, 6).tolist() == [[3], [4], [5]]
    assert torch.equal(file.read("w")[1], file.rows("w", 3, 6))
