"""Encoding of log records as lines of strict JSON.

NaN and infinities, which JSON lacks, are the strings "NaN", "Infinity" and "-Infinity"; null means
"unknown".
"""

import json
import math
from collections.abc import Callable
from dataclasses import MISSING, Field, fields, is_dataclass, replace
from typing import Any

from lowlat.train.metrics.record import (
    EvalRecord,
    ExpertRecord,
    IndexerRecord,
    NoteRecord,
    PassAtKRecord,
    Record,
    RolloutRecord,
    StartRecord,
    StepRecord,
)
from lowlat.utils.errors import UserError
from lowlat.utils.strict_json import parse_object

_KINDS = {StartRecord: "start", StepRecord: "step", EvalRecord: "evaluation", NoteRecord: "note"}
_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
_LOAD_DIGITS = 4
"""Significant digits of expert loads, enough for plots at a third of the bytes."""


def encode(record: Record) -> bytes:
    """Encode `record` as a line of UTF-8 with a line feed; loads are rounded to four digits."""
    if isinstance(record, StepRecord):
        record = replace(record, experts=tuple(_rounded(layer) for layer in record.experts))
    raw = {"kind": _KINDS[type(record)], **plain(record)}
    text = json.dumps(raw, allow_nan=False, ensure_ascii=False, separators=(",", ":"))
    return text.encode() + b"\n"


def decode(line: bytes, where: str) -> Record:
    """Decode the record in `line`. Raises UserError that starts with `where`."""
    raw = parse_object(line, where)
    try:
        kind = raw.pop("kind", None)
        for record, name in _KINDS.items():
            if kind == name:
                return record(**_checked(raw, record))
        raise ValueError(f"kind is {kind!r}")
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{where}: not a record of a training run ({error})") from error


def _rounded(layer: ExpertRecord) -> ExpertRecord:
    return replace(layer, load=tuple(float(f"{x:.{_LOAD_DIGITS}g}") for x in layer.load))


def plain(value: Any) -> Any:
    """`value` as strict JSON: records as objects, strings for NaN and infinities."""
    if isinstance(value, float):
        return value if math.isfinite(value) else _name(value)
    if isinstance(value, tuple | list):
        return [plain(item) for item in value]
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if is_dataclass(value):
        known = [(field, getattr(value, field.name)) for field in fields(value)]
        return {f.name: plain(v) for f, v in known if not _is_optional(f) or v not in (None, ())}
    return value


def _name(value: float) -> str:
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _is_optional(field: Field[Any]) -> bool:
    """Whether records omit the field if it is unknown."""
    return field.default is not MISSING


def _checked(raw: dict[str, Any], record: type[Any]) -> dict[str, Any]:
    """Typed fields of a record class: exactly its fields, except missing optional ones."""
    known = {field.name: field for field in fields(record)}
    spared = {name for name, field in known.items() if _is_optional(field)} - raw.keys()
    if odd := sorted((raw.keys() ^ known.keys()) - spared):
        raise ValueError(f"'{odd[0]}' is {'unknown' if odd[0] in raw else 'missing'}")
    values = {}
    for name in [name for name in known if name in raw]:
        try:
            values[name] = _PARSERS[known[name].type](raw[name])
        except (TypeError, ValueError) as error:
            raise ValueError(f"'{name}' {error}") from error
    return values


def _integer(value: Any) -> int:
    if type(value) is not int:
        raise ValueError("is no integer")
    return value


def _number(value: Any) -> float:
    if isinstance(value, str) and value in _NOT_FINITE:
        return _NOT_FINITE[value]
    if type(value) not in (int, float):
        raise ValueError("is no number")
    return float(value)


def _numbers(value: Any) -> tuple[float, ...]:
    if not isinstance(value, list):
        raise ValueError("is no list")
    return tuple(map(_number, value))


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("is no text")
    return value


def _object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError("is no object")
    return value


def _layers(kind: type[Any]) -> Callable[[Any], tuple[Any, ...]]:
    """Parser of a tuple of records of one layer each."""

    def parse(value: Any) -> tuple[Any, ...]:
        if not isinstance(value, list) or not all(isinstance(layer, dict) for layer in value):
            raise ValueError("is no list of objects")
        return tuple(kind(**_checked(layer, kind)) for layer in value)

    return parse


def _nested(kind: type[Any]) -> Callable[[Any], Any]:
    """Parser of a record within another."""
    return lambda value: kind(**_checked(_object(value), kind))


def _numbers_by_name(value: Any) -> dict[str, float]:
    return {name: _number(number) for name, number in _object(value).items()}


_PARSERS: dict[Any, Callable[[Any], Any]] = {
    int: _integer,
    float: _number,
    float | None: lambda value: None if value is None else _number(value),
    str: _text,
    str | None: _text,
    tuple[float, ...]: _numbers,
    tuple[ExpertRecord, ...]: _layers(ExpertRecord),
    tuple[IndexerRecord, ...]: _layers(IndexerRecord),
    RolloutRecord | None: _nested(RolloutRecord),
    PassAtKRecord | None: _nested(PassAtKRecord),
    dict[str, float]: _numbers_by_name,
    dict[str, str | int | float | bool | None]: _object,
}
"""Parsers of fields by their type; each raises ValueError or TypeError."""
