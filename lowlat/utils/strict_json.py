"""Strict JSON: no duplicate keys, no NaN, no lone surrogates, bounded size and depth.

For files of untrusted model folders. Owns parsing only; callers interpret the values.
"""

import json
import math
import re
from typing import Any, NoReturn

from lowlat.utils.errors import UserError

MAX_JSON_BYTES = 32 * 2**20
"""Largest JSON text accepted. Kimi-K2's index, about 70,000 tensors, takes 7 MB."""

_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def parse_object(data: bytes, where: str, *, limit: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """The JSON object in `data` (UTF-8, at most `limit` bytes). Raises UserError starting with
    `where` for anything else.
    """
    if len(data) > limit:
        raise UserError(f"{where}: the JSON text is {len(data)} bytes long, more than {limit}")
    try:
        value = json.loads(
            data.decode("utf-8"), object_pairs_hook=_unique_keys, parse_constant=_refuse_constant
        )
        if _SURROGATE.search(data):
            _refuse_halves(value)
    except RecursionError as error:
        raise UserError(f"{where}: the JSON text is nested too deeply") from error
    except ValueError as error:
        raise UserError(f"{where}: not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise UserError(f"{where}: must hold a JSON object, not {type(value).__name__}")
    return value


def finite(value: float) -> float | None:
    """`value`, or None if it is not finite, which JSON cannot express."""
    return value if math.isfinite(value) else None


def quoted(name: str) -> str:
    """`name` for an error message: on one line, escaped, shortened."""
    return repr(name if len(name) <= 120 else name[:117] + "...")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"key {quoted(key)} appears twice")
        result[key] = value
    return result


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a JSON number")


def _refuse_halves(value: object) -> None:
    """Raise ValueError if a string in `value` cannot be encoded as UTF-8."""
    text = json.dumps(value, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):04x}"
        raise ValueError(f"{half} is half of a surrogate pair") from error
