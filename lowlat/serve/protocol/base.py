"""Base classes and shared types of all API models.

Requests are strict: no type conversion, finite numbers, unknown fields are errors.
"""

from typing import Annotated, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

from lowlat.serve.protocol import limits


class StrictModel(BaseModel):
    """A request object: no type conversion, no ignored field."""

    model_config = ConfigDict(
        strict=True,
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )

    UNSUPPORTED: ClassVar[frozenset[str]] = frozenset()
    """Fields of OpenAI's API that are rejected unless null."""


class WireModel(BaseModel):
    """A response object."""

    model_config = ConfigDict(
        extra="forbid", use_attribute_docstrings=True, protected_namespaces=()
    )


def _check_false(value: object) -> object:
    if value is not False:
        raise PydanticCustomError("false_type", "Input should be false")
    return value


OnlyFalse = Annotated[Literal[False], BeforeValidator(_check_false)]
"""`false`; a plain Literal would also accept 0, which equals it."""
Name = Annotated[str, Field(min_length=1, max_length=limits.MAX_NAME)]
FunctionName = Annotated[str, Field(pattern=rf"^[a-zA-Z0-9_-]{{1,{limits.MAX_NAME}}}$")]
Id = Annotated[str, Field(min_length=1, max_length=limits.MAX_ID)]
Description = Annotated[str, Field(max_length=limits.MAX_DESCRIPTION)]
JsonSchemaObject = dict[str, object]
"""A JSON schema; compilation checks its size, depth and keywords."""


def is_none(value: object) -> bool:
    """Condition for omitting a response field."""
    return value is None
