"""From a request's fields for the form of an answer to the engine's records.

Owns the choice of the record; its limits and its meaning are `engine.structured`'s.
"""

import json

from lowlat.generate.structured import (
    Choice,
    Grammar,
    JsonObject,
    JsonSchema,
    Regex,
    StructuredOutput,
)
from lowlat.serve.protocol.formats import (
    JsonObjectFormat,
    JsonSchemaFormat,
    ResponseFormat,
    StructuredOutputs,
)


def format_output(given: ResponseFormat | None) -> StructuredOutput | None:
    """What response_format asks for; None for text of any form. Raises UserError above a limit."""
    match given:
        case JsonObjectFormat():
            return JsonObject()
        case JsonSchemaFormat():
            return JsonSchema(schema=json.dumps(given.json_schema.schema_))
        case _:
            return None


def structured_output(given: StructuredOutputs) -> StructuredOutput:
    """What structured_outputs asks for. Raises UserError above a limit."""
    if given.json_ is not None:
        return JsonSchema(schema=json.dumps(given.json_))
    if given.regex is not None:
        return Regex(pattern=given.regex)
    if given.choice is not None:
        return Choice(options=tuple(given.choice))
    return Grammar(lark=given.grammar or "")
