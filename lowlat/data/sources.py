"""Sources of `lowlat data build`: files, folders and Hugging Face datasets, in a fixed order.

A file is JSON Lines (.jsonl, .ndjson), a Parquet table (.parquet), or else text; .gz files are
decompressed. A folder is its files that are not hidden, sorted by path. datasets:NAME is loaded by
the `datasets` library.
"""

import fnmatch
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from lowlat.data.documents import ReadOptions
from lowlat.data.records import Read, read_dataset, read_json_lines, read_parquet
from lowlat.data.text_files import read_text
from lowlat.utils.errors import UserError

DATASETS = "datasets:"
RECORDS = (".jsonl", ".ndjson", ".parquet")


def read_sources(sources: Sequence[str], options: ReadOptions) -> Iterator[Read]:
    """Documents of all `sources`; yields a BadDocument for each invalid one.

    Raises UserError for a source that is missing, has no files, or cannot be read.
    """
    for source in sources:
        if source.startswith(DATASETS):
            yield from read_dataset(source.removeprefix(DATASETS), options)
        else:
            for path in files_of(source, options):
                yield from _read_file(path, options)


def size_of(sources: Sequence[str], options: ReadOptions) -> int | None:
    """Bytes of all `sources`; None if unknown before reading."""
    total = 0
    for source in sources:
        if source.startswith(DATASETS):
            return None
        for path in files_of(source, options):
            if path.suffix in (".gz", ".parquet"):
                return None
            total += path.stat().st_size
    return total


def files_of(source: str, options: ReadOptions) -> list[Path]:
    """The file `source`, or the files below the folder `source`. Raises UserError for none."""
    path = Path(source)
    if path.is_file():
        return [path]
    if not path.is_dir():
        what = "is not a regular file" if os.path.lexists(path) else "does not exist"
        raise UserError(f"source '{source}' {what}; give a file, a folder or datasets:NAME")
    found = [
        Path(folder, name)
        for folder, folders, names in os.walk(path, onerror=_raise)
        for name in _visible(folders, names)
    ]
    wanted = [file for file in found if file.is_file() and _matches(file.name, options.patterns)]
    if not wanted:
        what = f"of the form {', '.join(options.patterns)}" if options.patterns else "to read"
        raise UserError(f"source '{source}' has no files {what}; give another folder or --only")
    return sorted(wanted, key=lambda file: file.relative_to(path).parts)


def check_used(sources: Sequence[str], options: ReadOptions) -> None:
    """Raises UserError for an option that applies to no source, and as `files_of`."""
    paths = [source for source in sources if not source.startswith(DATASETS)]
    if options.patterns and not any(Path(path).is_dir() for path in paths):
        raise UserError("--only applies to folders, and no source is one; leave it out")
    files = [file for path in paths for file in files_of(path, options)]
    has_records = len(paths) < len(sources) or any(map(is_records, files))
    if options.field is not None and not has_records:
        raise UserError(
            "--field applies to JSON lines and tables, and no source is one; leave it out"
        )
    if options.separator is not None and all(map(is_records, files)):
        raise UserError("--separator applies to text files, and no source is one; leave it out")


def is_records(path: Path) -> bool:
    """Whether the suffix of `path` is that of a file with fields or columns."""
    return _kind(path) in RECORDS


def _kind(path: Path) -> str:
    return (path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix).lower()


def _read_file(path: Path, options: ReadOptions) -> Iterator[Read]:
    match _kind(path):
        case ".jsonl" | ".ndjson":
            yield from read_json_lines(path, options)
        case ".parquet":
            yield from read_parquet(path, options)
        case _:
            yield from read_text(path, options)


def _visible(folders: list[str], names: list[str]) -> list[str]:
    """The names that are not hidden; removes hidden folders from the walk."""
    folders[:] = [name for name in folders if not name.startswith(".")]
    return [name for name in names if not name.startswith(".")]


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return not patterns or any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _raise(error: OSError) -> None:
    raise UserError(f"{error.filename}: cannot be read ({error.strerror})") from error
