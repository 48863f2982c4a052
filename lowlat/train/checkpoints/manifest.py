"""Manifest of a training checkpoint: names, sizes and SHA-256 of its files.

    {"files": {"facts.json": {"sha256": "...", "size": 311}, ...}, "format": 1, "sha256": "...",
     "step": 1000, "time": 1767225600.0}

"sha256" is the hash of the other fields in the same encoding: it protects the manifest, and the
manifest protects the folder.
"""

import hashlib
import json
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowlat.train.checkpoints.errors import CorruptCheckpointError, reading
from lowlat.utils.atomic_files import CHUNK, FileDigest
from lowlat.utils.errors import UserError
from lowlat.utils.progress import Task
from lowlat.utils.strict_json import MAX_JSON_BYTES, parse_object, quoted

MANIFEST_FILE = "manifest.json"
FORMAT = 1
"""Version of a checkpoint's files; raise it when they change."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """The files of a checkpoint, without the manifest itself."""

    step: int
    """Optimizer steps done."""
    time: float
    """When it was written, in seconds since 1970."""
    files: Mapping[str, FileDigest]
    """By file name."""

    def encode(self) -> bytes:
        files = {name: {"size": r.size, "sha256": r.sha256} for name, r in self.files.items()}
        fields = {"format": FORMAT, "step": self.step, "time": self.time, "files": files}
        return _encode({**fields, "sha256": _digest(fields)})


def read_manifest(folder: Path) -> Manifest:
    """The manifest of `folder`, checked in itself and against the folder's names and sizes.

    Reads no other file. Raises CorruptCheckpointError for any difference, and UserError for a
    checkpoint of another format.
    """
    manifest = _parse(_read_small(folder / MANIFEST_FILE), folder)
    present = _sizes(folder)
    present.pop(MANIFEST_FILE, None)
    for name in sorted(present.keys() - manifest.files.keys()):
        raise CorruptCheckpointError(f"{quoted(name)} does not belong to it")
    for name, digest in sorted(manifest.files.items()):
        if name not in present:
            raise CorruptCheckpointError(f"{quoted(name)} is missing")
        if present[name] != digest.size:
            raise CorruptCheckpointError(
                f"{quoted(name)} has {present[name]} bytes, not the {digest.size} written"
            )
    return manifest


def check_digest(path: Path, digest: FileDigest, task: Task) -> None:
    """Read a file and raise CorruptCheckpointError unless it has size and hash of `digest`."""
    found = hashlib.sha256()
    with reading(path), path.open("rb", buffering=0) as file:
        while piece := file.read(CHUNK):
            found.update(piece)
            task.advance(len(piece))
    if found.hexdigest() != digest.sha256:
        raise CorruptCheckpointError(
            f"{quoted(path.name)} is not what was written (sha256 differs)"
        )


def _parse(data: bytes, folder: Path) -> Manifest:
    try:
        fields = parse_object(data, MANIFEST_FILE)
        fields.pop("sha256", None)
        proven = _encode({**fields, "sha256": _digest(fields)}) == data
    except UserError as error:
        raise CorruptCheckpointError(str(error)) from error
    except (ValueError, RecursionError) as error:  # an infinity, or too deep to be encoded
        raise CorruptCheckpointError(
            f"{MANIFEST_FILE} is not what was written ({error})"
        ) from error
    if not proven:
        raise CorruptCheckpointError(f"{MANIFEST_FILE} is not what was written (sha256 differs)")
    if fields.get("format") != FORMAT:
        raise UserError(
            f"{folder}: has format {quoted(str(fields.get('format')))}, this lowlat reads format "
            f"{FORMAT}; continue with the version that wrote it"
        )
    return _manifest(fields)


def _manifest(fields: dict[str, Any]) -> Manifest:
    """Parse typed fields; a manifest with a valid hash may still be handmade."""
    try:
        files = {
            name: FileDigest(size=_whole(entry["size"]), sha256=str(entry["sha256"]))
            for name, entry in fields["files"].items()
        }
        return Manifest(step=_whole(fields["step"]), time=float(fields["time"]), files=files)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise CorruptCheckpointError(f"{MANIFEST_FILE} lacks a field or has a wrong one") from error


def _whole(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(value)
    return value


def _read_small(path: Path) -> bytes:
    with reading(path):
        if not stat.S_ISREG(os.lstat(path).st_mode):
            raise CorruptCheckpointError(f"{quoted(path.name)} is not a regular file")
        with path.open("rb") as file:
            return file.read(MAX_JSON_BYTES + 1)


def _sizes(folder: Path) -> dict[str, int]:
    """Size of every file in `folder`, which must contain only files."""
    sizes: dict[str, int] = {}
    with reading(folder), os.scandir(folder) as entries:
        for entry in entries:
            if not entry.is_file(follow_symlinks=False):
                raise CorruptCheckpointError(f"{quoted(entry.name)} is not a regular file")
            sizes[entry.name] = entry.stat(follow_symlinks=False).st_size
    return sizes


def _encode(fields: Mapping[str, Any]) -> bytes:
    return (json.dumps(fields, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()


def _digest(fields: Mapping[str, Any]) -> str:
    return hashlib.sha256(_encode(fields)).hexdigest()
