"""Hints: request fields that the server accepts although they do not change the answer.

A field is declared as `Hint[...]`, or with `Ignored(when=...)` if it is without effect only in some
requests. The response header HEADER names the hints of a request, so that none is dropped silently.
"""

import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, TypeVar

from pydantic import GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from lowlat.serve.protocol.base import StrictModel

HEADER = "x-lowlat-ignored"
"""Response header with the paths of the hints without effect, such as `text.verbosity`."""


@dataclass(frozen=True, slots=True)
class Ignored:
    """Marks a field (inside Annotated) as without effect."""

    when: Callable[[Any], bool] | None = None
    """Whether the field of this object is without effect; None: it always is."""
    label: str | None = None
    """Its name in the header, if the object as a whole is without effect."""

    def __get_pydantic_json_schema__(
        self, core_schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        schema = handler(core_schema)
        if self.when is None:
            schema[HEADER] = True
        return schema


_T = TypeVar("_T")
Hint = Annotated[_T, Ignored()]
"""A field that never has an effect."""
TemplateHint = Annotated[_T, Ignored(when=lambda request: True)]
"""A field that has an effect with some chat templates only; the route reports which it used."""


def ignored_fields(request: StrictModel) -> set[str]:
    """Paths of the hints that `request` sets and that are without effect, without list indexes."""
    return set(_ignored(request, ""))


def _ignored(model: StrictModel, prefix: str) -> Iterator[str]:
    hints, nested = _fields(type(model))
    for name in hints.keys() & model.model_fields_set:
        when = hints[name].when
        if getattr(model, name) is not None and (when is None or when(model)):
            yield f"{prefix}{hints[name].label or name}"
    for name in nested:
        value = getattr(model, name)
        for item in value if isinstance(value, list) else (value,):
            if isinstance(item, StrictModel):
                yield from _ignored(item, f"{prefix}{name}.")


@cache
def _fields(kind: type[StrictModel]) -> tuple[dict[str, Ignored], tuple[str, ...]]:
    """The hints of `kind`, and the names of the fields that may contain further objects."""
    fields = kind.model_fields.items()
    hints = {
        name: mark for name, field in fields for mark in field.metadata if isinstance(mark, Ignored)
    }
    return hints, tuple(name for name, field in fields if _has_model(field.annotation))


def _has_model(annotation: object) -> bool:
    if isinstance(annotation, type) and issubclass(annotation, StrictModel):
        return True
    return any(_has_model(part) for part in typing.get_args(annotation))
