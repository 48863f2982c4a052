"""Structured outputs: JSON object, JSON schema, regex, choice or grammar, and their size limits.

Owns the limits, checked before compiling. `generate.json_schema` checks schemas, `generate.grammar`
compiles.
"""

from dataclasses import dataclass

from lowlat.utils.errors import UserError

MAX_SCHEMA_BYTES = 64 * 2**10
MAX_PATTERN_BYTES = 4 * 2**10
MAX_CHOICES = 1000
MAX_CHOICE_BYTES = 2**10
MAX_CHOICES_BYTES = 64 * 2**10
MAX_GRAMMAR_BYTES = 256 * 2**10
"""Large enough for the JSON schemas of many tools."""


@dataclass(frozen=True, kw_only=True, slots=True)
class JsonObject:
    """Any JSON object."""


@dataclass(frozen=True, kw_only=True, slots=True)
class JsonSchema:
    """A JSON value that a schema (draft 2020-12) accepts.

    Properties are generated in the schema's order. An object that declares properties and leaves
    additionalProperties out has no others, unless allOf or the like composes it. `format` is
    enforced by its syntax only; names that only additionalProperties or patternProperties allow may
    repeat.
    """

    schema: str
    """The schema as JSON text; it must be an object."""

    def __post_init__(self) -> None:
        check_text("json_schema", self.schema, MAX_SCHEMA_BYTES)


@dataclass(frozen=True, kw_only=True, slots=True)
class Regex:
    """A text that a regular expression matches as a whole."""

    pattern: str
    """In the syntax of Rust's regex crate: no look-around, no back-references; character classes
    such as \\w are Unicode's."""

    def __post_init__(self) -> None:
        check_text("regex", self.pattern, MAX_PATTERN_BYTES)


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """One of several texts."""

    options: tuple[str, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.options, tuple) or not 1 <= len(self.options) <= MAX_CHOICES:
            raise UserError(f"choice must hold 1 to {MAX_CHOICES} texts")
        sizes = [check_text("choice", text, MAX_CHOICE_BYTES, least=0) for text in self.options]
        if sum(sizes) > MAX_CHOICES_BYTES:
            raise UserError(
                f"choice: the texts have {sum(sizes)} bytes together, at most {MAX_CHOICES_BYTES} "
                "are allowed; shorten them"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Grammar:
    """A text that a context-free grammar derives from its rule `start`."""

    lark: str
    """In llguidance's dialect of Lark; `%json {...}` holds a JSON schema."""

    def __post_init__(self) -> None:
        check_text("grammar", self.lark, MAX_GRAMMAR_BYTES)


StructuredOutput = JsonObject | JsonSchema | Regex | Choice | Grammar


def check_text(field: str, text: str, limit: int, *, least: int = 1) -> int:
    """The size of `text` in UTF-8. Raises UserError unless it is from `least` to `limit` bytes."""
    if not isinstance(text, str):
        raise UserError(f"{field} must be a text, got {type(text).__name__}")
    try:
        size = len(text.encode())
    except UnicodeEncodeError as error:
        what = f"character {error.start} is half of a surrogate pair"
        raise UserError(f"{field}: {what}; send valid Unicode") from error
    if size < least:
        raise UserError(f"{field} is empty; describe the output in it")
    if size > limit:
        raise UserError(f"{field} has {size} bytes, at most {limit} are allowed; shorten it")
    return size
