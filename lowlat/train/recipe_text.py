"""A recipe as the text of a TOML file, for those that a program makes. Reading is `recipe`'s."""

import json
from typing import Any


def to_toml(raw: dict[str, Any]) -> str:
    """A raw recipe as a TOML file: JSON's scalars and arrays are TOML's too. Takes no None."""
    plain = {key: value for key, value in raw.items() if not _is_table(value)}
    lines = [f"{key} = {_toml(value)}" for key, value in plain.items()]
    for key, value in raw.items():
        if not _is_table(value):
            continue
        many = isinstance(value, list)
        for table in value if many else [value]:
            lines += ["", f"[[{key}]]" if many else f"[{key}]"]
            lines += [f"{name} = {_toml(item)}" for name, item in table.items()]
    return "\n".join(lines) + "\n"


def _is_table(value: Any) -> bool:
    return isinstance(value, dict) or (
        isinstance(value, list) and all(isinstance(item, dict) for item in value)
    )


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {_toml(item)}" for key, item in value.items()) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return json.dumps(value, ensure_ascii=False, allow_nan=False)
