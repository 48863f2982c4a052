"""llguidance source of structured outputs; `generate.grammar` compiles it.

Every source holds two grammars: an outer one with common options, and the user's own.
"""

import json
import re
from typing import Any, assert_never

from lowlat.generate.json_schema import read_schema
from lowlat.generate.structured import (
    MAX_SCHEMA_BYTES,
    Choice,
    Grammar,
    JsonObject,
    JsonSchema,
    Regex,
    StructuredOutput,
    check_text,
)
from lowlat.utils.errors import UserError
from lowlat.utils.strict_json import quoted

FIELDS = {
    JsonObject: "json_object",
    JsonSchema: "json_schema",
    Regex: "regex",
    Choice: "choice",
    Grammar: "grammar",
}
"""How error messages name each kind of output."""

# Comments, strings, regular expressions and special tokens are skipped whole.
_LARK = re.compile(
    r"""(?:\#|//)[^\n]*
    |"(?:\\.|[^"\\\n])*"
    |/(?:\\.|[^/\\])+/
    |<[^<>\s]+>
    |(?P<directive>%[a-z]+)
    |(?P<option>\b(?:stop|temperature)\s*=)""",
    re.VERBOSE,
)


def grammar_source(output: StructuredOutput, *, strips_leading_space: bool) -> str:
    """The grammar of `output` in llguidance's own JSON.

    strips_leading_space: the tokenizer drops one leading space of this text, so the grammar adds
    one: optional before JSON, which cannot begin with a space, required elsewhere. Raises UserError
    for unsupported schemas and grammars.
    """
    prefix = ""
    if strips_leading_space:
        prefix = '" "? ' if isinstance(output, JsonObject | JsonSchema) else '" " '
    # no_forcing allows every tokenization of a text; otherwise llguidance forces the tokenizer's.
    outer = f'%llguidance {{"no_forcing": true}}\nstart: {prefix}@output'
    inner = {"name": "output", **_inner(output)}
    return json.dumps({"grammars": [{"lark_grammar": outer}, inner]})


def _inner(output: StructuredOutput) -> dict[str, Any]:
    match output:
        case JsonObject():
            return {"json_schema": read_schema('{"type": "object"}', FIELDS[JsonObject])}
        case JsonSchema(schema=schema):
            return {"json_schema": read_schema(schema, FIELDS[JsonSchema])}
        case Regex(pattern=pattern):
            return {"lark_grammar": f"start: {lark_regex(pattern)}"}
        case Choice(options=options):
            # An upper-case name makes one regular expression of all options.
            texts = " | ".join(lark_string(text) for text in options)
            return {"lark_grammar": f"start: CHOICE\nCHOICE: {texts}"}
        case Grammar(lark=lark):
            return {"lark_grammar": _checked_lark(lark)}
    assert_never(output)


def lark_string(text: str) -> str:
    """`text` as a string of Lark."""
    return json.dumps(text).replace("\x7f", "\\u007f")


def lark_regex(pattern: str) -> str:
    """`pattern` between slashes, with slashes and line breaks escaped."""
    escapes = {"/": r"\/", "\n": r"\n", "\\\n": r"\n"}
    escaped = re.sub(r"\\.|[/\n]", lambda m: escapes.get(m[0], m[0]), pattern, flags=re.DOTALL)
    return f"/{escaped}/"


def _checked_lark(lark: str) -> str:
    """`lark` with its JSON schemas checked and written as read_schema does."""
    decoder = json.JSONDecoder()
    pieces: list[str] = []
    done = position = 0
    while match := _LARK.search(lark, position):
        position = match.end()
        if match["option"]:
            raise UserError(
                f"grammar: option {quoted(match['option'].rstrip(' ='))} is not supported; leave it"
                " out (for stop, use suffix or lazy)"
            )
        directive = match["directive"]
        if directive == "%llguidance":
            raise UserError("grammar: %llguidance is not supported; leave it out")
        if directive not in ("%json", "%regex"):
            continue
        start = position + len(lark[position:]) - len(lark[position:].lstrip())
        try:
            _, position = decoder.raw_decode(lark, start)
        except (ValueError, RecursionError) as error:
            raise UserError(f"grammar: {directive} needs a JSON object after it") from error
        if directive == "%json":
            field = "grammar: %json"
            check_text(field, lark[start:position], MAX_SCHEMA_BYTES)
            schema = read_schema(lark[start:position], field)
            pieces += [lark[done:start], json.dumps(schema)]
            done = position
    return "".join(pieces) + lark[done:]
