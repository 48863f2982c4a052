"""Typed reader of JSON objects: every value is checked, and unread keys are tracked and reported.

Owns the wording of type and range errors; knows no field of any model.
"""

import json
from collections.abc import Collection
from typing import Any, TypeVar

from lowlat.utils.errors import UserError

MAX_INT = 2**31 - 1
MAX_NUMBER = 1e15
"""Above any setting of a model; keeps products and powers of settings finite."""

Value = TypeVar("Value")


class JsonFields:
    """One JSON object of a configuration. Null counts as absent, unless a method says otherwise.

    Every method that reads raises UserError naming file, field and value where type or range is
    wrong.
    """

    def __init__(self, raw: object, source: str, prefix: str = "", layer: str = "") -> None:
        if not isinstance(raw, dict):
            where = f"field '{prefix[:-1]}'" if prefix else "the file"
            raise UserError(f"{source}: {where} must be a JSON object, not {_show(raw)}")
        self._raw: dict[str, Any] = raw
        self._source = source
        self._prefix = prefix
        self._layer = layer
        self._read: set[str] = set()

    def error(self, name: str, problem: str) -> UserError:
        """The error to raise about field `name`: one line of file, field and problem."""
        shown = name if name.isprintable() and len(name) <= 60 else _show(name)
        return UserError(f"{self._source}: {self._prefix}{shown}{self._layer} {problem}")

    def unsupported(self, name: str, remedy: str) -> UserError:
        """The error for a known field whose value requests an unsupported feature."""
        return self.error(name, f"{_show(self.value(name))} is not supported; {remedy}")

    def wrong(self, name: str, expected: str) -> UserError:
        """The error for a value that is not `expected`."""
        return self.error(name, f"must be {expected}, not {_show(self.value(name))}")

    def value(self, name: str) -> Any:
        """The raw value, None if absent; counts as read."""
        self._read.add(name)
        return self._raw.get(name)

    def mentioned(self, name: str) -> bool:
        """Whether the field is there, null included; does not count as read."""
        return name in self._raw

    def present(self, name: str) -> bool:
        """Whether the field is there with a value other than null; does not count as read."""
        return self._raw.get(name) is not None

    def spelling(self, *names: str) -> str:
        """Of several names for one field, the one that is used (the first, if none); all count as
        read."""
        self.ignore(*names)
        given = [name for name in names if self.present(name)]
        for name in given[1:]:
            if self._raw[name] != self._raw[given[0]]:
                other = f"{given[0]} {_show(self._raw[given[0]])}"
                raise self.error(name, f"{_show(self._raw[name])} contradicts {other}; keep one")
        return given[0] if given else names[0]

    def ignore(self, *names: str) -> None:
        """Mark fields without effect as read."""
        self._read.update(names)

    def table(self, name: str) -> "JsonFields | None":
        """A nested object, None if absent."""
        value = self.value(name)
        return None if value is None else JsonFields(value, self._source, f"{self._prefix}{name}.")

    def arrays(self, count: int, nested: tuple[str, ...] = ()) -> list[str]:
        """Names of fields that are arrays with one entry for each of `count` layers; fields in
        `nested`, whose values are arrays, must be arrays of arrays.
        """
        found = [
            name
            for name, value in self._raw.items()
            if isinstance(value, list)
            and (name not in nested or any(isinstance(part, list) for part in value))
        ]
        for name in found:
            if len(self._raw[name]) != count:
                length = len(self._raw[name])
                raise self.error(name, f"has {length} entries for {count} layers")
        return found

    def of_layer(self, number: int, arrays: Collection[str]) -> "JsonFields":
        """The object of layer `number`: of the fields `arrays` its own entry, absent if null.
        Errors name the layer.
        """
        raw = {
            name: value[number] if name in arrays else value
            for name, value in self._raw.items()
            if name not in arrays or value[number] is not None
        }
        return JsonFields(raw, self._source, self._prefix, f" of layer {number}")

    def optional_integer(
        self, name: str, *, minimum: int = 1, maximum: int = MAX_INT
    ) -> int | None:
        """An integer within minimum..maximum, None if absent."""
        value = self.value(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.wrong(name, "an integer")
        if not minimum <= value <= maximum:
            raise self.wrong(name, f"within {minimum}..{maximum}")
        return value

    def integer(
        self, name: str, default: int | None = None, *, minimum: int = 1, maximum: int = MAX_INT
    ) -> int:
        """An integer as above; absence without a default is an error."""
        value = self.optional_integer(name, minimum=minimum, maximum=maximum)
        return self.given(name, value, default)

    def nullable_integer(self, name: str, *, minimum: int = 1) -> int | None:
        """An integer, or None if the file has null; absence is an error."""
        if not self.mentioned(name):
            raise self.error(name, "is missing; give a number, or null for none")
        return self.optional_integer(name, minimum=minimum)

    def optional_number(self, name: str, *, minimum: float = 0.0) -> float | None:
        """A finite number of at least `minimum`, None if absent."""
        value = self.value(name)
        return None if value is None else self._number(name, value, minimum)

    def number(self, name: str, default: float | None = None, *, minimum: float = 0.0) -> float:
        """A number as above; absence without a default is an error."""
        return self.given(name, self.optional_number(name, minimum=minimum), default)

    def positive(self, name: str, default: float | None = None) -> float:
        """A finite number above zero; absence without a default is an error."""
        value = self.number(name, default)
        if value == 0:
            raise self.wrong(name, "above 0")
        return value

    def boolean(self, name: str, default: bool | None = None) -> bool:
        """true or false; absence without a default is an error."""
        value = self.value(name)
        if value is not None and not isinstance(value, bool):
            raise self.wrong(name, "true or false")
        return self.given(name, value, default)

    def choice(self, name: str, allowed: tuple[str, ...], default: str | None = None) -> str:
        """One of the strings `allowed`; any other value is reported as unsupported."""
        value = self.given(name, self.value(name), default)
        if value not in allowed:
            raise self.unsupported(name, f"supported: {', '.join(allowed)}")
        return value

    def items(self, name: str) -> list[Any]:
        """A JSON array of anything, empty if absent."""
        value = self.value(name)
        if value is not None and not isinstance(value, list):
            raise self.wrong(name, "an array")
        return value or []

    def numbers(self, name: str, length: int) -> tuple[float, ...]:
        """An array of `length` finite numbers above zero."""
        values = self.items(name)
        if len(values) != length:
            raise self.error(name, f"must have {length} entries, not {len(values)}")
        factors = tuple(self._number(name, value, 0.0) for value in values)
        if 0.0 in factors:
            raise self.wrong(name, "numbers above 0")
        return factors

    def integers(self, name: str) -> tuple[int, ...]:
        """An array of integers of at least 0, empty if absent."""
        values = self.items(name)
        if any(type(value) is not int or not 0 <= value <= MAX_INT for value in values):
            raise self.wrong(name, "an array of integers")
        return tuple(values)

    def strings(self, name: str) -> tuple[str, ...]:
        """An array of strings, empty if absent."""
        values = self.items(name)
        if not all(isinstance(value, str) for value in values):
            raise self.wrong(name, "an array of strings")
        return tuple(values)

    def reject_names(self, known: Collection[str], reason: str) -> None:
        """Raise UserError for the first field whose name is not among `known`."""
        for name, value in self._raw.items():
            if name not in known:
                raise self.error(name, f"({_show(value)}) {reason}")

    def reject_unread(self, reason: str, *, allow_empty: bool = True) -> None:
        """Raise UserError for the first field not read; `allow_empty` passes null, false, "", []
        and {}."""
        for name, value in self._raw.items():
            empty = value is None or value is False or value in ("", [], {})
            if name not in self._read and not (allow_empty and empty):
                raise self.error(name, f"({_show(value)}) {reason}")

    def given(self, name: str, value: Value | None, default: Value | None) -> Value:
        """`value`, else `default`; an error if both are None."""
        found = default if value is None else value
        if found is None:
            raise self.error(name, "is missing; the model is not determined without it")
        return found

    def _number(self, name: str, value: object, minimum: float) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.wrong(name, "a number")
        if not -MAX_NUMBER <= value <= MAX_NUMBER:
            raise self.wrong(name, f"a finite number up to {MAX_NUMBER:g}")
        if value < minimum:
            raise self.wrong(name, f"at least {minimum:g}")
        return float(value)


def _show(value: object) -> str:
    """`value` as the file spells it, on one line, shortened."""
    text = json.dumps(value, default=repr)
    return text if len(text) <= 60 else text[:57] + "..."
