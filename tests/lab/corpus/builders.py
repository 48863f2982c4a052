"""Tiny archives and formats of packages, made in memory."""

import gzip
import hashlib
import io
import struct
import tarfile
import zipfile
import zlib
from pathlib import Path
from typing import Any

from lowlat_lab.corpus.recipe import Source


def tar_bytes(files: dict[str, bytes], mode: str = "w:xz") -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode) as archive:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return out.getvalue()


def make_tgz(path: Path, files: dict[str, bytes]) -> Path:
    # Without a time of its own, so that the same files are the same bytes a second later.
    path.write_bytes(gzip.compress(tar_bytes(files, "w"), mtime=0))
    return path


def make_deb(path: Path, files: dict[str, bytes], data_name: str = "data.tar.xz") -> Path:
    """An `ar` archive of the three parts of a Debian package, each padded to an even length."""
    parts = {
        "debian-binary": b"2.0\n",
        "control.tar.xz": tar_bytes({"./control": b"Package: tiny\n"}),
        data_name: tar_bytes({f"./{name}": data for name, data in files.items()}),
    }
    out = b"!<arch>\n"
    for name, data in parts.items():
        out += f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(data):<10}`\n".encode()
        out += data + b"\n" * (len(data) % 2)
    path.write_bytes(out)
    return path


def make_wheel(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def sword_files(blocks: list[list[str]], *, wide: bool = False) -> dict[str, bytes]:
    """Index of verses, index of blocks and blocks of one testament; a verse a string."""
    verses, places, packed = b"", b"", b""
    for number, texts in enumerate(blocks):
        block = b""
        for text in texts:
            data = text.encode()
            form = "<III" if wide else "<IIH"
            verses += struct.pack(form, number, len(block), len(data))
            block += data
        squeezed = zlib.compress(block)
        places += struct.pack("<III", len(packed), len(squeezed), len(block))
        packed += squeezed
    return {"ot.bzv": verses, "ot.bzs": places, "ot.bzz": packed}


def r_database(texts: dict[str, list[str]]) -> tuple[bytes, bytes]:
    """The .rdx and .rdb of character vectors, as R's version 3 of XDR serialisation has them."""
    database, places = b"", []
    for lines in texts.values():
        plain = _r_header() + _r_strings(lines)
        record = struct.pack(">i", len(plain)) + zlib.compress(plain)
        places.append((len(database), len(record)))
        database += record
    variables = _r_list(
        [struct.pack(">ii", 13, 2) + struct.pack(">ii", *place) for place in places], list(texts)
    )
    nothing = struct.pack(">i", 254)
    index = _r_header() + _r_list([variables, nothing], ["variables", "references"])
    squeezer = zlib.compressobj(wbits=31)
    return squeezer.compress(index) + squeezer.flush(), database


def _r_header() -> bytes:
    return b"X\n" + struct.pack(">iii", 3, 0, 0) + struct.pack(">i", 5) + b"UTF-8"


def _r_strings(lines: list[str]) -> bytes:
    out = struct.pack(">ii", 16, len(lines))
    for line in lines:
        data = line.encode()
        out += struct.pack(">ii", 9 | 8 << 12, len(data)) + data
    return out


def _r_list(items: list[bytes], names: list[str]) -> bytes:
    """A list with its names as attribute; the symbol comes in full, as it does the first time."""
    out = struct.pack(">ii", 19 | 1 << 9, len(items)) + b"".join(items)
    symbol = struct.pack(">i", 1) + struct.pack(">ii", 9 | 8 << 12, 5) + b"names"
    return (
        out + struct.pack(">i", 2 | 1 << 10) + symbol + _r_strings(names) + struct.pack(">i", 254)
    )


def make_source(archive: Path, package: str, **fields: Any) -> Source:
    """A source of a recipe for an archive that a test has made."""
    data = archive.read_bytes()
    given = {
        "name": "tiny",
        "about": "A tiny source.",
        "package": package,
        "sha256": hashlib.sha256(data).hexdigest(),
        "bytes": len(data),
        "licence": {"name": "public domain", "says": "here"},
        "members": ["*.txt"],
        "min_chars": 1,
    }
    return Source.model_validate({**given, **fields})
