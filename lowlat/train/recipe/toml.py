"""TOML writer for recipes. `recipe.schema` reads them."""

import json
import math
import re
from collections.abc import Sequence
from datetime import date, time
from pathlib import Path
from typing import Any

from lowlat.train.recipe.schema import read_raw

BARE = re.compile(r"[A-Za-z0-9_-]+")
"""Keys that TOML allows without quotes."""


def text_of(path: Path, changes: Sequence[str] = ()) -> str:
    """Text of the recipe `path` with `changes` applied; the file's own text without changes.

    Its first line is a comment with the path that relative paths start from. Raises UserError.
    """
    made = "".join(f" --set {json.dumps(change)}" for change in changes)
    head = f"# {json.dumps(str(path.absolute()))}{made}; paths are relative to that file\n"
    raw = read_raw(path, changes)
    return head + (to_toml(raw) if changes else path.read_text(encoding="utf-8"))


def to_toml(raw: dict[str, Any]) -> str:
    """A raw recipe, without None, as TOML. JSON scalars and arrays are valid TOML."""
    plain = {key: value for key, value in raw.items() if not _is_table(value)}
    lines = [f"{_key(key)} = {_toml(value)}" for key, value in plain.items()]
    for key, value in raw.items():
        if not _is_table(value):
            continue
        many = isinstance(value, list)
        for table in value if many else [value]:
            lines += ["", f"[[{_key(key)}]]" if many else f"[{_key(key)}]"]
            lines += [f"{_key(name)} = {_toml(item)}" for name, item in table.items()]
    return "\n".join(lines) + "\n"


def _is_table(value: Any) -> bool:
    return isinstance(value, dict) or (
        isinstance(value, list) and all(isinstance(item, dict) for item in value)
    )


def _key(name: str) -> str:
    return name if BARE.fullmatch(name) else json.dumps(name, ensure_ascii=False)


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        pairs = (f"{_key(key)} = {_toml(item)}" for key, item in value.items())
        return f"{{ {', '.join(pairs)} }}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, date | time):
        return value.isoformat()
    return json.dumps(value, ensure_ascii=False, allow_nan=False)
