"""Base classes and shared types of all API models.

Requests are strict: no type conversion, finite numbers, unknown fields are errors.
"""

from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    WrapValidator,
    model_validator,
)
from pydantic_core import CoreSchema, PydanticCustomError, PydanticKnownError
from typing_extensions import TypeAliasType

from lowlat.serve.protocol import limits


def _fail_fast(schema: CoreSchema) -> None:
    """Set `fail_fast` on all lists inside `schema`: errors cost far more than valid elements."""
    found: list[Any] = [schema]
    while found:
        node = found.pop()
        if isinstance(node, dict):
            if node.get("type") == "list":
                node["fail_fast"] = True
            found += [inner for name, inner in node.items() if name != "metadata"]
        elif isinstance(node, list | tuple):
            found += node


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

    @classmethod
    def __get_pydantic_core_schema__(
        cls, source: Any, handler: GetCoreSchemaHandler, /
    ) -> CoreSchema:
        """The model's schema, whose lists stop at their first invalid element."""
        schema = handler(source)
        _fail_fast(schema)
        return schema

    @model_validator(mode="before")
    @classmethod
    def _check_unknown(cls, value: Any) -> Any:
        """Refuse an object of mostly unknown fields as a whole: pydantic reports each of them."""
        most = len(cls.model_fields) + limits.MAX_UNKNOWN_FIELDS
        if isinstance(value, dict) and len(value) > most:
            raise PydanticCustomError(
                "too_many_fields",
                "Input should have at most {most} fields, not {given}",
                {"most": most, "given": len(value)},
            )
        return value


def check_entries(most: int) -> BeforeValidator:
    """Check the number of an object's entries before pydantic validates each of them."""

    def check(value: object) -> object:
        if isinstance(value, dict) and len(value) > most:
            raise PydanticCustomError(
                "too_long",
                "Input should have at most {most} entries, not {given}",
                {"most": most, "given": len(value)},
            )
        return value

    return BeforeValidator(check)


Name = Annotated[str, Field(min_length=1, max_length=limits.MAX_NAME)]
FunctionName = Annotated[str, Field(pattern=rf"^[a-zA-Z0-9_-]{{1,{limits.MAX_FUNCTION_NAME}}}$")]
Id = Annotated[str, Field(min_length=1, max_length=limits.MAX_ID)]
Description = Annotated[str, Field(max_length=limits.MAX_DESCRIPTION)]
JsonSchemaObject = dict[str, object]
"""A JSON schema; compilation checks its size, depth and keywords."""
MAX_TOKEN_ID = (1 << 31) - 1
TokenId = TypeAliasType("TokenId", Annotated[int, Field(ge=0, le=MAX_TOKEN_ID)])
"""A named schema, whose maximum the OpenAPI document sets to the vocabulary size."""


def _pass_ids(value: object, handler: Callable[[object], object]) -> object:
    """Accept a list of valid ids, refuse one that is too long; pydantic judges anything else.

    Validating a million of them one by one would hold the interpreter's lock for 0.1 s; these few
    shorter calls let other threads run between them.
    """
    if not isinstance(value, list) or not value:
        return handler(value)
    most, given = limits.MAX_PROMPT_TOKENS, len(value)
    if given > most:
        lengths = {"field_type": "List", "max_length": most, "actual_length": given}
        raise PydanticKnownError("too_long", lengths)
    if set(map(type, value)) == {int} and min(value) >= 0 and max(value) <= MAX_TOKEN_ID:
        return value
    return handler(value)


TokenIds = Annotated[
    list[TokenId],
    Field(min_length=1, max_length=limits.MAX_PROMPT_TOKENS),
    WrapValidator(_pass_ids),
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
