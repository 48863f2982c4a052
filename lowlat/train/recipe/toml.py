"""A recipe as the text of a TOML file, for those that a program makes. Reading is `recipe`'s."""

import json
import math
import re
from collections.abc import Sequence
from datetime import date, time
from pathlib import Path
from typing import Any

from lowlat.train.recipe.schema import read_raw

BARE = re.compile(r"[A-Za-z0-9_-]+")
"""Keys that TOML takes without quotes."""


def text_of(path: Path, changes: Sequence[str] = ()) -> str:
    """The recipe in the file `path` as it runs with `changes` (`recipe.read_recipe`): its own text
    where there are none. A comment says where paths in it begin. Raises UserError.
    """
    made = "".join(f" --set {json.dumps(change)}" for change in changes)
    head = f"# {json.dumps(str(path.absolute()))}{made}; relative paths begin beside that file\n"
    raw = read_raw(path, changes)
    return head + (to_toml(raw) if changes else path.read_text(encoding="utf-8"))


def to_toml(raw: dict[str, Any]) -> str:
    """A raw recipe as a TOML file: JSON's scalars and arrays are TOML's too. Takes no None."""
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
