"""Read plain text files named by options; errors name the option."""

from pathlib import Path

from lowlat.utils.bounded_read import read_bounded
from lowlat.utils.errors import UserError

MAX_TEXT_BYTES = 2**30
"""Largest text file read at once; larger texts go through `lowlat data build`."""
TABLES = (".json", ".csv", ".tsv")
"""File endings of tables, whose text is inside records."""
RECORDS = (".jsonl", ".ndjson", ".parquet", ".gz", *TABLES)
"""File endings of records and compressed files."""


def read_plain_text(path: Path, option: str) -> str:
    """The text of the UTF-8 file `path`, given as `option`, with its line ends unchanged.

    Raises UserError for a file that cannot be read, is no UTF-8 text or holds zero bytes. Also for
    file endings of records, whose braces and escapes would count as text.
    """
    where = f"{option} {path}"
    if path.name.lower().endswith(RECORDS):
        raise UserError(
            f"{where}: this is a file of records or compressed; give their text as a plain file"
        )
    try:
        text = read_bounded(path, MAX_TEXT_BYTES, where).decode("utf-8")
    except OSError as error:
        raise UserError(f"{where}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: is not UTF-8 text; give plain text") from error
    if "\0" in text:
        raise UserError(f"{where}: holds zero bytes, so it is not text")
    return text
