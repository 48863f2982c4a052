"""Encoding of log records as lines of strict JSON.

NaN and infinities, which JSON lacks, are the strings "NaN", "Infinity" and "-Infinity"; null means
"unknown".
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from typing import Any

from lowlat.train.metrics.record import (
    EvalRecord,
    ExpertRecord,
    NoteRecord,
    Record,
    StartRecord,
    StepRecord,
)
from lowlat.utils.errors import UserError
from lowlat.utils.strict_json import parse_object

_KINDS = {StartRecord: "start", StepRecord: "step", EvalRecord: "evaluation", NoteRecord: "note"}
_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
OPTIONAL = ("divergence", "layer_error", "targets")
"""Fields that are omitted if unknown."""
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
        return _read(raw)
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
    if isinstance(value, StartRecord | StepRecord | EvalRecord | NoteRecord | ExpertRecord):
        known = {field.name: getattr(value, field.name) for field in fields(value)}
        return {n: plain(v) for n, v in known.items() if v is not None or n not in OPTIONAL}
    return value


def _name(value: float) -> str:
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _read(raw: dict[str, Any]) -> Record:
    match raw.pop("kind", None):
        case "start":
            return StartRecord(**_checked(raw, _START))
        case "step":
            return StepRecord(**_checked(raw, _STEP))
        case "evaluation":
            return EvalRecord(**_checked(raw, _EVALUATION))
        case "note":
            return NoteRecord(**_checked(raw, _NOTE))
        case kind:
            raise ValueError(f"kind is {kind!r}")


FieldParser = Callable[[Any], Any]


def _checked(raw: Mapping[str, Any], parsers: Mapping[str, FieldParser]) -> dict[str, Any]:
    """Typed fields of a record: exactly those of `parsers`, except missing OPTIONAL ones."""
    spared = {name for name in OPTIONAL if name in parsers and name not in raw}
    if odd := sorted((raw.keys() ^ parsers.keys()) - spared):
        raise ValueError(f"'{odd[0]}' is {'unknown' if odd[0] in raw else 'missing'}")
    values = {}
    for name, parser in parsers.items():
        if name not in raw:
            continue
        try:
            values[name] = parser(raw[name])
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


def _number_or_none(value: Any) -> float | None:
    return None if value is None else _number(value)


def _numbers(value: Any) -> tuple[float, ...]:
    if not isinstance(value, list):
        raise ValueError("is no list")
    return tuple(map(_number, value))


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("is no text")
    return value


def _facts(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError("is no object")
    return value


def _experts(value: Any) -> tuple[ExpertRecord, ...]:
    if not isinstance(value, list) or not all(isinstance(layer, dict) for layer in value):
        raise ValueError("is no list of objects")
    return tuple(ExpertRecord(**_checked(layer, _EXPERT)) for layer in value)


_EXPERT: dict[str, FieldParser] = {
    "layer": _integer,
    "load": _numbers,
    "max_violation": _number,
    "entropy": _number,
    "bias_min": _number,
    "bias_max": _number,
}
_STEP: dict[str, FieldParser] = {
    "step": _integer,
    "phase": _text,
    "tokens": _integer,
    "seconds": _number,
    "loss": _number_or_none,
    "mtp_losses": _numbers,
    "z_loss": _number,
    "sequence_loss": _number,
    "grad_norm": _number,
    "learning_rate": _number,
    "batch_tokens": _integer,
    "tokens_per_second": _number,
    "mfu": _number_or_none,
    "memory_bytes": _integer,
    "experts": _experts,
    "divergence": _number_or_none,
    "layer_error": _number_or_none,
}
_EVALUATION: dict[str, FieldParser] = {
    "step": _integer,
    "tokens": _integer,
    "split": _text,
    "loss": _number,
    "bits_per_byte": _number_or_none,
    "mtp_losses": _numbers,
    "divergence": _number_or_none,
    "targets": _text,
}
_START: dict[str, FieldParser] = {
    "step": _integer,
    "name": _text,
    "total_steps": _integer,
    "tokens_total": _integer,
    "facts": _facts,
    "time": _text,
}
_NOTE: dict[str, FieldParser] = {"step": _integer, "text": _text}
