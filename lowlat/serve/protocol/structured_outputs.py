"""Structured outputs: OpenAI's response_format and vLLM's structured_outputs (guided_json,
guided_regex, ... in older versions of vLLM).

`to_output` of each raises UserError above a limit. `serve.structured_outputs` compiles the outputs.
"""

import json
from typing import Annotated, Literal

from pydantic import Field, model_validator

from lowlat.generate import structured
from lowlat.serve.protocol.base import Description, FunctionName, JsonSchemaObject, StrictModel
from lowlat.serve.protocol.errors import RequestError


class TextFormat(StrictModel):
    type: Literal["text"]

    def to_output(self) -> None:
        """Free text."""


class JsonObjectFormat(StrictModel):
    """Any JSON object."""

    type: Literal["json_object"]

    def to_output(self) -> structured.JsonObject:
        return structured.JsonObject()


class NamedSchema(StrictModel):
    name: FunctionName
    description: Description | None = None
    schema_: Annotated[JsonSchemaObject, Field(alias="schema")]
    strict: bool | None = None
    """Ignored: the schema is always enforced."""


class JsonSchemaFormat(StrictModel):
    """JSON that matches a schema."""

    type: Literal["json_schema"]
    json_schema: NamedSchema

    def to_output(self) -> structured.JsonSchema:
        return structured.JsonSchema(schema=json.dumps(self.json_schema.schema_))


ResponseFormat = Annotated[
    TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")
]


GUIDED = ("guided_json", "guided_regex", "guided_choice", "guided_grammar")
"""Fields of older versions of vLLM, each for one field of StructuredOutputs."""


class StructuredOutputs(StrictModel):
    """Exactly one of a JSON schema, a regular expression, a choice of texts, a Lark grammar."""

    json_: Annotated[JsonSchemaObject | None, Field(alias="json")] = None
    regex: Annotated[str, Field(min_length=1, max_length=structured.MAX_PATTERN_BYTES)] | None = (
        None
    )
    choice: (
        Annotated[
            list[Annotated[str, Field(min_length=1, max_length=structured.MAX_CHOICE_BYTES)]],
            Field(min_length=1, max_length=structured.MAX_CHOICES),
        ]
        | None
    ) = None
    grammar: Annotated[str, Field(min_length=1, max_length=structured.MAX_GRAMMAR_BYTES)] | None = (
        None
    )

    @model_validator(mode="after")
    def _check_one(self) -> "StructuredOutputs":
        given = [self.json_, self.regex, self.choice, self.grammar]
        if sum(item is not None for item in given) != 1:
            raise RequestError(
                "structured_outputs must contain exactly one of json, regex, choice and grammar",
                param="structured_outputs",
            )
        return self

    def to_output(self) -> structured.StructuredOutput:
        if self.json_ is not None:
            return structured.JsonSchema(schema=json.dumps(self.json_))
        if self.regex is not None:
            return structured.Regex(pattern=self.regex)
        if self.choice is not None:
            return structured.Choice(options=tuple(self.choice))
        return structured.Grammar(lark=self.grammar or "")


def guided_output(name: str, value: object) -> structured.StructuredOutput:
    """The constraint that the field `name` of GUIDED sets. Raises RequestError or UserError."""
    match name, value:
        case "guided_json", str():
            return structured.JsonSchema(schema=value)
        case "guided_json", dict():
            return structured.JsonSchema(schema=json.dumps(value))
        case "guided_regex", str():
            return structured.Regex(pattern=value)
        case "guided_choice", list():
            return structured.Choice(options=tuple(value))
        case _:
            return structured.Grammar(lark=str(value))
