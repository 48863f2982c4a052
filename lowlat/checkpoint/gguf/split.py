"""Open GGUF models, whole or split: any part's name opens all parts as one `GGUFFile`.

llama.cpp's layout: the first part holds the metadata, every part its own tensors and the keys
`split.no` (from 0), `split.count` and `split.tensors.count`. `utils.gguf_parts` parses file names.
"""

from pathlib import Path

from lowlat.checkpoint.gguf.file import GGUFFile
from lowlat.utils.errors import UserError
from lowlat.utils.gguf_parts import PartName, parse_part
from lowlat.utils.strict_json import quoted

NUMBER, COUNT, TENSORS = "split.no", "split.count", "split.tensors.count"


def open_parts(path: Path) -> GGUFFile:
    """The GGUF model that `path` holds, alone or as one of its parts.

    Raises UserError naming the part that is missing, damaged or of another model.
    """
    given = GGUFFile(path)
    count = _integer(given, COUNT, 1)
    # gguf-split writes 0 into a file that it merged from parts
    if count <= 1:
        return given
    name = _part_name(given, count)
    paths = [path.with_name(name.sibling(number + 1)) for number in range(count)]
    _check_present(paths, path)
    whole = GGUFFile(paths[0])
    _check_part(whole, whole, 0)
    for number in range(1, count):
        part = GGUFFile(paths[number])
        _check_part(part, whole, number)
        whole.add_part(part)
    total = _integer(whole, TENSORS, len(whole.tensors))
    if total != len(whole.tensors):
        raise UserError(
            f"{paths[0]}: key {TENSORS!r} is {total}, but its {count} parts hold "
            f"{len(whole.tensors)} tensors; one is damaged or of another model, download them again"
        )
    return whole


def _integer(file: GGUFFile, key: str, default: int) -> int:
    value = file.metadata.get(key, default)
    if type(value) is not int or value < 0 or (key == COUNT and value >= 2**16):
        raise UserError(
            f"{file.path}: key {key!r} is {_shown(value)}, not a valid count; "
            "download the file again"
        )
    return value


def _part_name(file: GGUFFile, count: int) -> PartName:
    """The parsed name of a part. Raises UserError if it does not agree with the file's keys."""
    number = _integer(file, NUMBER, 0)
    if number >= count:
        raise UserError(
            f"{file.path}: key {NUMBER!r} is {number}, but there are {count} parts; the file is "
            "damaged, download it again"
        )
    name = parse_part(file.path.name)
    if name is None or (name.number, name.count) != (number + 1, count):
        raise UserError(
            f"{file.path}: is part {number + 1} of {count} of a split model; rename it to "
            f"NAME-{number + 1:05d}-of-{count:05d}.gguf, next to the other parts"
        )
    return name


def _check_present(paths: list[Path], given: Path) -> None:
    missing = [path for path in paths if not path.exists()]
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise UserError(
            f"{missing[0]}: this part{more} is missing; {given} is one of {len(paths)} parts, put "
            "all of them into one folder"
        )


def _check_part(part: GGUFFile, first: GGUFFile, number: int) -> None:
    """Raise UserError unless `part` is part `number`, from 0 on, of the model of `first`."""
    if part.metadata.get(NUMBER) != number:
        raise UserError(
            f"{part.path}: key {NUMBER!r} is {_shown(part.metadata.get(NUMBER))}, not "
            f"{number}; the file is not this part, download it again"
        )
    for key in (COUNT, TENSORS, *part.metadata):
        value, expected = part.metadata.get(key), first.metadata.get(key)
        # later parts hold no metadata of the model; what they do hold must agree
        if key == NUMBER or key not in first.metadata or value == expected:
            continue
        is_same = key in part.metadata and part.entry(key) == first.entry(key)  # NaN
        if not is_same:
            raise UserError(
                f"{part.path}: key {key!r} is {_shown(value)}, but {_shown(expected)} in "
                f"{first.path}; the part is of another model, download it again"
            )


def _shown(value: object) -> str:
    if value is None:
        return "missing"
    return quoted(value) if isinstance(value, str) else str(value)
