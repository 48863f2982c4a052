"""What a disk may hold after a power cut, computed from the operations before it.

A file is sure to have the bytes it had at its last fsync, a folder the entries it had at its last
fsync; of everything later any part may be there or not, in any order. That is more than real file
systems lose, so what survives here survives there.
"""

import os
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .tracing import Operation


@dataclass
class File:
    """Bytes: as the programs saw them, and as they are sure to be on the disk."""

    seen: bytes = b""
    sure: bytes = b""


@dataclass
class Folder:
    """Entries: as the programs saw them, and as they are sure to be on the disk."""

    seen: "dict[str, File | Folder]" = field(default_factory=dict)
    sure: "dict[str, File | Folder]" = field(default_factory=dict)


class Disk:
    """Follows operations under `root`, of which all is on the disk at the start."""

    def __init__(self, before: Path, root: Path) -> None:
        """before: the tree as it was."""
        self._root = root
        self._top = _taken(before)

    def apply(self, operation: Operation) -> None:
        """One operation that was done."""
        folder, name = self._parent(operation.path)
        if operation.name == "open" and operation.creates:
            folder.seen.setdefault(name, File())
        elif operation.name == "mkdir":
            folder.seen.setdefault(name, Folder())
        elif operation.name in ("unlink", "rmdir"):
            folder.seen.pop(name, None)  # it may have been absent already
        elif operation.name == "rename":
            other, new = self._parent(operation.target)
            other.seen[new] = folder.seen.pop(name)
        elif operation.name == "write":
            node = folder.seen[name]
            assert isinstance(node, File)
            node.seen += operation.data
        elif operation.name == "fsync":
            node = folder.seen[name] if name else self._top
            if isinstance(node, File):
                node.sure = node.seen
            else:
                node.sure = dict(node.seen)

    def crash(self, to: Path, chance: random.Random | None) -> None:
        """Make in `to` what is found after a cut now.

        chance: which of the unsure things are there; None: none of them.
        """
        _put(self._top, to, chance)

    def _parent(self, path: str) -> tuple[Folder, str]:
        """The folder of a path and the name in it, "" for the root itself."""
        *parts, name = os.path.relpath(path, self._root).split(os.sep)
        if name == ".":
            return self._top, ""
        folder = self._top
        for part in parts:
            inner = folder.seen[part]
            assert isinstance(inner, Folder)
            folder = inner
        return folder, name


def after(before: Path, root: Path, operations: Sequence[Operation]) -> Disk:
    """The disk after `operations` under `root`, which began as a copy of `before`."""
    disk = Disk(before, root)
    for operation in operations:
        disk.apply(operation)
    return disk


def _taken(path: Path) -> Folder:
    entries: dict[str, File | Folder] = {}
    for entry in path.iterdir():
        if entry.is_dir():
            entries[entry.name] = _taken(entry)
        else:
            content = entry.read_bytes()
            entries[entry.name] = File(content, content)
    return Folder(dict(entries), dict(entries))


def _put(node: File | Folder, path: Path, chance: random.Random | None) -> None:
    if isinstance(node, File):
        path.write_bytes(_bytes_left(node, chance))
        return
    path.mkdir()
    for name in sorted(node.seen.keys() | node.sure.keys()):
        seen, sure = node.seen.get(name), node.sure.get(name)
        kept = sure if chance is None or seen is sure else chance.choice([seen, sure])
        if kept is not None:
            _put(kept, path / name, chance)


def _bytes_left(file: File, chance: random.Random | None) -> bytes:
    """Sure bytes, and of the others some, all or, where the length was kept alone, zeros."""
    if chance is None or file.seen == file.sure:
        return file.sure
    left = file.seen[: chance.randint(len(file.sure), len(file.seen))]
    zeros = bytes(len(file.seen) - len(file.sure))
    return chance.choice([left, file.sure + zeros, file.seen])
