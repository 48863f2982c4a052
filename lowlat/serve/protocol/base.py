"""Base classes and shared types of all API models.

Requests are strict: no type conversion, finite numbers, unknown fields are errors.
"""

from typing import Annotated, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError
from typing_extensions import TypeAliasType

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


Name = Annotated[str, Field(min_length=1, max_length=limits.MAX_NAME)]
FunctionName = Annotated[str, Field(pattern=rf"^[a-zA-Z0-9_-]{{1,{limits.MAX_NAME}}}$")]
Id = Annotated[str, Field(min_length=1, max_length=limits.MAX_ID)]
Description = Annotated[str, Field(max_length=limits.MAX_DESCRIPTION)]
JsonSchemaObject = dict[str, object]
"""A JSON schema; compilation checks its size, depth and keywords."""
TokenId = TypeAliasType("TokenId", Annotated[int, Field(ge=0, le=(1 << 31) - 1)])
"""A named schema, whose maximum the OpenAPI document sets to the vocabulary size."""
TokenIds = Annotated[
    list[TokenId], Field(fail_fast=True, min_length=1, max_length=limits.MAX_PROMPT_TOKENS)
]


class ApiRequest(StrictModel):
    """The body of a request about a model."""

    model: Id
    """A name that /v1/models lists."""


class GenerationRequest(ApiRequest):
    """The body of a request that generates text."""

    stream: bool | None = None
    priority: Annotated[int, Field(ge=-limits.MAX_PRIORITY, le=limits.MAX_PRIORITY)] | None = None
    """Lower values first: each unit counts as one second of waiting. Default 0."""
    deadline_seconds: Annotated[float, Field(gt=0.0, le=limits.MAX_DEADLINE_SECONDS)] | None = None
    """Time limit from arrival; then status 408."""


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


def is_none(value: object) -> bool:
    """Condition for omitting a response field."""
    return value is None
