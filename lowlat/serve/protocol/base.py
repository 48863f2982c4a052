"""What all models of the wire share: strictness, and types that several of them use.

Owns no route's fields. JSON numbers are finite and unlike booleans; unknown fields are errors.
"""

from typing import Annotated, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

from lowlat.serve.protocol import limits


class StrictModel(BaseModel):
    """An object of a request: nothing is converted, no field is ignored."""

    model_config = ConfigDict(
        strict=True,
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )

    UNSUPPORTED: ClassVar[frozenset[str]] = frozenset()
    """Fields of OpenAI's API that a request must not set; null, their default, sets nothing."""


class WireModel(BaseModel):
    """An object of a response."""

    model_config = ConfigDict(
        extra="forbid", use_attribute_docstrings=True, protected_namespaces=()
    )


def _check_false(value: object) -> object:
    if value is not False:
        raise PydanticCustomError("false_type", "Input should be false")
    return value


OnlyFalse = Annotated[Literal[False], BeforeValidator(_check_false)]
"""`false`; a Literal alone would also take 0, which equals it."""
Name = Annotated[str, Field(min_length=1, max_length=limits.MAX_NAME)]
FunctionName = Annotated[str, Field(pattern=rf"^[a-zA-Z0-9_-]{{1,{limits.MAX_NAME}}}$")]
Id = Annotated[str, Field(min_length=1, max_length=limits.MAX_ID)]
Description = Annotated[str, Field(max_length=limits.MAX_DESCRIPTION)]
JsonSchemaObject = dict[str, object]
"""A JSON schema; its size, depth and keywords are checked where it is compiled."""


def is_none(value: object) -> bool:
    """For fields of a response that are left out where they have no value."""
    return value is None
