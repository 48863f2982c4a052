"""Files of plain text that options name, whole; or an error that says which option."""

from pathlib import Path

from lowlat.utils.errors import UserError

TABLES = (".json", ".csv", ".tsv")
"""Endings of files whose text is within records that nothing here reads."""
RECORDS = (".jsonl", ".ndjson", ".parquet", ".gz", *TABLES)
"""Endings of files whose text is within records or packed."""


def read_plain_text(path: Path, option: str) -> str:
    """The text of the UTF-8 file `path`, given as `option`, with its line ends as they are.

    Raises UserError for a file that cannot be read, is no UTF-8 text, or holds zero bytes, and for
    one that by its name holds records, whose braces and escapes would be taken for text.
    """
    where = f"{option} {path}"
    if path.name.lower().endswith(RECORDS):
        raise UserError(
            f"{where}: by its name it holds records or is packed; give their text as a plain file"
        )
    try:
        text = path.read_bytes().decode("utf-8")
    except OSError as error:
        raise UserError(f"{where}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: is not UTF-8 text; give plain text") from error
    if "\0" in text:
        raise UserError(f"{where}: holds zero bytes, so it is not text")
    return text
