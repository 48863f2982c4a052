"""Readers of records: JSON Lines, Parquet tables and datasets of the Hugging Face `datasets`
library.

A record with the text field is a text, a record with `messages` a chat; --field decides for records
with both. `text_files` reads plain text.
"""

import json
import re
from codecs import BOM_UTF8
from collections.abc import Iterator, Mapping
from io import BufferedIOBase
from pathlib import Path
from typing import Any

from lowlat.data.documents import (
    BadDocument,
    ChatDocument,
    Document,
    ReadOptions,
    TextDocument,
)
from lowlat.data.text_files import READ_ERRORS, open_binary, unreadable
from lowlat.text.pieces import text_pieces
from lowlat.utils.errors import UserError

MAX_LINE = 1 << 30
"""Longest line of JSON in bytes."""
ROWS = 256
"""Rows of a table in memory at once."""
OUTER_COLON = re.compile(r":(?![^\[]*\])")
"""Colon between the parts of a dataset's name, but not inside train[:1%]."""
INSTALL = "pip install 'lowlat[data]'"
MESSAGES, TOOLS = "messages", "tools"

Read = Document | BadDocument


def read_json_lines(path: Path, options: ReadOptions) -> Iterator[Read]:
    """Documents of a JSON Lines file, one object per line; yields a BadDocument for a bad line."""
    try:
        with open_binary(path) as file:
            for number, line in _lines(file, path):
                line = line.removeprefix(BOM_UTF8) if number == 1 else line
                origin = f"{path}: line {number}"
                try:
                    record = _parsed(line, origin, options)
                    if record is not None:
                        yield document_of(record, origin, options, len(line))
                except BadDocument as error:
                    yield error
    except READ_ERRORS as error:
        raise unreadable(path, error) from error


def _lines(file: BufferedIOBase, path: Path) -> Iterator[tuple[int, bytes]]:
    number = 0
    while line := file.readline(MAX_LINE + 1):
        number += 1
        if len(line) > MAX_LINE:
            what = f"line {number} is longer than {MAX_LINE} bytes"
            raise UserError(f"{path}: {what}; put this document into its own text file")
        yield number, line


def _parsed(line: bytes, origin: str, options: ReadOptions) -> Mapping[str, Any] | None:
    """The JSON object in `line`; None for a blank line."""
    errors = "replace" if options.invalid == "replace" else "strict"
    try:
        text = line.decode("utf-8", errors)
    except UnicodeDecodeError as error:
        what = f"byte {error.start} is not UTF-8 text"
        raise BadDocument(
            f"{origin}: {what}; convert the file, or pass --invalid skip or replace"
        ) from error
    if not text.strip():
        return None
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        # `origin` has the line number of the file; the text of a JSONDecodeError has its own.
        what = getattr(error, "msg", None) or str(error)
        column = f" at character {error.pos + 1}" if isinstance(error, json.JSONDecodeError) else ""
        raise BadDocument(
            f"{origin}: not valid JSON ({what}{column}); fix the line, or pass --invalid skip"
        ) from error
    if not isinstance(record, dict):
        raise BadDocument(f"{origin}: must be a JSON object, not {type(record).__name__}")
    return record


def read_parquet(path: Path, options: ReadOptions) -> Iterator[Read]:
    """Documents of a Parquet file, one per row. Raises UserError without pyarrow."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise UserError(f"{path}: parquet files need pyarrow; {INSTALL}") from error
    try:
        file = parquet.ParquetFile(path)
        names = [name for name in file.schema_arrow.names if name in _columns(options)]
        if not names:
            raise _no_document(str(path), file.schema_arrow.names, options)
        row = 0
        for batch in file.iter_batches(batch_size=ROWS, columns=names):
            for record in batch.to_pylist():
                yield _checked(record, f"{path}: row {row}", options)
                row += 1
    except (OSError, pyarrow.ArrowException) as error:
        raise unreadable(path, error) from error


def read_dataset(spec: str, options: ReadOptions) -> Iterator[Read]:
    """Rows of `NAME[:CONFIG[:SPLIT[:COLUMN]]]`, loaded by the `datasets` library; empty parts have
    their defaults. Raises UserError if the library is missing or fails.
    """
    try:
        import datasets  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError(f"datasets:{spec} needs datasets; {INSTALL}") from error
    parts = OUTER_COLON.split(spec)
    name, config, split, column = (*parts, "", "", "")[:4]
    if not name or len(parts) > 4:
        raise UserError(f"'datasets:{spec}': write datasets:NAME[:CONFIG[:SPLIT[:COLUMN]]]")
    if column:
        options = ReadOptions(field=column, invalid=options.invalid)
    try:
        table = datasets.load_dataset(name, config or None, split=split or "train")
    except Exception as error:  # the library raises its own and other libraries' errors
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"'datasets:{spec}' cannot be loaded ({reason}); check the name") from error
    if not isinstance(table, datasets.Dataset):
        raise UserError(f"'datasets:{spec}' has several splits; name one")
    names = [name for name in table.column_names if name in _columns(options)]
    if not names:
        raise _no_document(f"datasets:{spec}", table.column_names, options)
    for row, record in enumerate(table.select_columns(names)):
        yield _checked(dict(record), f"datasets:{spec}: row {row}", options)


def document_of(
    record: Mapping[str, Any], origin: str, options: ReadOptions, source_bytes: int
) -> Document:
    """The document of a record. Raises BadDocument if it has none, and UserError if it has both a
    text and messages and `options.field` does not decide.
    """
    text, messages = record.get(options.text_field), record.get(MESSAGES)
    if isinstance(text, str) and messages is not None and options.field is None:
        raise UserError(
            f"{origin}: has both a text in '{options.text_field}' and '{MESSAGES}'; choose with "
            f"--field {options.text_field} or --field {MESSAGES}"
        )
    if isinstance(text, str):
        text = _valid(text, origin, options)
        return TextDocument(
            origin=origin, pieces=lambda: text_pieces([text]), source_bytes=source_bytes
        )
    if messages is None and options.text_field in record:
        kind = "null" if text is None else type(text).__name__
        what = f"'{options.text_field}' is {kind}, not a text"
        raise BadDocument(f"{origin}: {what}; fix it, or pass --invalid skip")
    if messages is None:
        raise _no_document(origin, list(record), options)
    messages, tools = _valid(messages, origin, options), _valid(record.get(TOOLS), origin, options)
    if not _are_objects(messages) or not all(isinstance(m.get("role"), str) for m in messages):
        raise BadDocument(f"{origin}: '{MESSAGES}' must be objects with a role; fix the line")
    if tools is not None and not _are_objects(tools):
        raise BadDocument(f"{origin}: '{TOOLS}' must be a list of objects; fix the line")
    return ChatDocument(origin=origin, messages=messages, tools=tools, source_bytes=source_bytes)


def _checked(record: Mapping[str, Any], origin: str, options: ReadOptions) -> Read:
    """`document_of`, with BadDocument returned instead of raised."""
    try:
        text = record.get(options.text_field)
        return document_of(record, origin, options, len(text) if isinstance(text, str) else 0)
    except BadDocument as error:
        return error


def _columns(options: ReadOptions) -> tuple[str, ...]:
    return (options.text_field, MESSAGES, TOOLS)


def _no_document(origin: str, names: list[str], options: ReadOptions) -> BadDocument:
    known = ", ".join(names[:8]) or "none"
    what = f"has neither a text in '{options.text_field}' nor '{MESSAGES}' (fields: {known})"
    return BadDocument(f"{origin}: {what}; name the field with --field")


def _are_objects(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, dict) for item in value)


def _valid(value: Any, origin: str, options: ReadOptions) -> Any:
    """Check `value` for lone surrogates, which JSON can spell and UTF-8 cannot; replace or raise as
    `options.invalid` says.
    """
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            if options.invalid == "replace":
                return value.encode("utf-8", "surrogatepass").decode("utf-8", "replace")
            what = f"character {error.start} of a text is half of a surrogate pair"
            raise BadDocument(
                f"{origin}: {what}; fix it, or pass --invalid skip or replace"
            ) from error
        return value
    if isinstance(value, list):
        return [_valid(item, origin, options) for item in value]
    if isinstance(value, dict):
        # Tables pad absent fields of a message with nulls, which templates would treat as present.
        return {
            _valid(key, origin, options): _valid(item, origin, options)
            for key, item in value.items()
            if item is not None
        }
    return value
