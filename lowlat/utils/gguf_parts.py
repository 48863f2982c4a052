"""File names of split GGUF models: NAME-00001-of-00006.gguf, as llama.cpp's gguf-split writes them.

Only names: `checkpoint.gguf.split` opens and checks the parts.
"""

import re
from dataclasses import dataclass
from pathlib import Path

_NAME = re.compile(r"(.+)-(\d{5})-of-(\d{5})(\.gguf)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class PartName:
    """A parsed file name."""

    stem: str
    number: int
    """From 1 on."""
    count: int
    suffix: str

    def sibling(self, number: int) -> str:
        """The file name of part `number`."""
        return f"{self.stem}-{number:05d}-of-{self.count:05d}{self.suffix}"


def parse_part(name: str) -> PartName | None:
    """The parts of a file name; None if it is not that of a part."""
    match = _NAME.fullmatch(name)
    if match is None or not 1 <= int(match[2]) <= int(match[3]):
        return None
    return PartName(match[1], int(match[2]), int(match[3]), match[4])


def first_part(path: Path) -> Path:
    """The first part, which holds the metadata, if `path` names a part and the first one exists;
    else `path`.
    """
    part = parse_part(path.name)
    first = path if part is None else path.with_name(part.sibling(1))
    return first if first.exists() else path


def existing_parts(path: Path) -> list[Path]:
    """The parts of the model at `path` that exist, in order; `path` alone if it is no part."""
    part = parse_part(path.name)
    if part is None:
        return [path]
    paths = (path.with_name(part.sibling(number + 1)) for number in range(part.count))
    return [sibling for sibling in paths if sibling.exists()] or [path]
