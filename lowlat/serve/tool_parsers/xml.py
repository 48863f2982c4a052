"""XML-like tool calls of GLM and Qwen3-Coder: each argument between tags, without JSON quotes.

The values are not quoted: only the function's schema decides whether 5 is a string or a number.
"""

import json
from abc import abstractmethod
from collections.abc import Collection, Sequence
from typing import ClassVar

from lowlat.serve.tool_parsers.base import NAME, ToolFunction, ToolParser
from lowlat.serve.tool_parsers.json_scanner import read_value_until
from lowlat.serve.tool_parsers.lark import LarkBuilder, Rule, escaped
from lowlat.serve.tool_parsers.parameters import (
    Schema,
    TextConstraint,
    ToolParameter,
    ToolParameters,
    argument_schema,
    is_free,
    json_schema,
    json_type_of,
    json_types,
    not_enforceable,
    read_parameters,
    read_text_constraints,
    schema_error,
)
from lowlat.serve.tool_parsers.reader import Malformed, Steps
from lowlat.serve.tool_parsers.state import ParserState

OPEN, CLOSE = "<tool_call>", "</tool_call>"
MAX_NAME = 256
MAX_VALUE = 1 << 20
KEY = "[^<>\\s]{1,64}"
"""Pattern for names of arguments that the schema does not list."""


class _Tagged(ToolParser):
    after_call = (CLOSE,)
    between = ("\n", OPEN)
    head: ClassVar[str]
    """Text before the arguments, with the function's NAME."""
    key_begin: ClassVar[str]
    """Text before the name of an argument."""
    key_end: ClassVar[str]
    """Text after it."""
    value_begin: ClassVar[tuple[str, ...]]
    """Texts between `key_end` and the value."""
    value_end: ClassVar[str]
    """Text after the value."""
    before_end: ClassVar[str] = ""
    """Text between the value and `value_end`."""
    tail: ClassVar[str] = ""
    """Text after the arguments."""

    def read_calls(self, state: ParserState) -> Steps[None]:
        name = state.checked((yield from self._read_name(state)))
        state.start(name)
        schema, comma = state.schemas.get(name, {}), "{"
        while True:
            state.reader.mark()
            try:
                argument = yield from self._read_argument(state, schema)
            except Malformed:
                # Truncated or malformed: emitted unchanged, so that it does not look complete.
                state.reader.rewind()
                yield from state.pass_broken(CLOSE)
                return
            state.reader.release()
            if argument is None:
                break
            key, value = argument
            state.arguments(f"{comma}{json.dumps(key, ensure_ascii=False)}: {value}")
            comma = ", "
        state.arguments("{}" if comma == "{" else "}")
        for text in (self.tail, CLOSE):
            if text:
                yield from state.reader.accept_within_call(text.strip())

    def _read_argument(self, state: ParserState, schema: Schema) -> Steps[tuple[str, str] | None]:
        """The name of the next argument and its value as JSON text; None: no more arguments."""
        key = yield from self._read_key(state)
        if key is None:
            return None
        allowed, raw = json_types(*argument_schema(schema, key)), None
        if allowed != {"string"}:
            # An end tag inside a string of a JSON value belongs to the value.
            raw = yield from read_value_until(state.reader, self.value_end, limit=MAX_VALUE)
        if raw is None:
            raw = yield from state.reader.read_until(self.value_end, limit=MAX_VALUE)
        raw = raw.removeprefix(self.before_end).removesuffix(self.before_end)
        return key, to_json(raw, allowed)

    def body(self, grammar: LarkBuilder, function: ToolFunction) -> Rule:
        if function.text is not None:
            raise not_enforceable(f"{function.path}.format", "unquoted text")
        head = self.head.replace(NAME, function.name)
        return grammar.sequence(head, *self._pairs(grammar, function), self.tail)

    def _pairs(self, grammar: LarkBuilder, function: ToolFunction) -> list[Rule]:
        """The grammars of a call's arguments: listed ones in order, then any others."""
        arguments = read_parameters(function.schema, function.path)
        pairs: list[Rule] = []
        for argument in arguments.listed:
            self._check_name(argument)
            key = grammar.sequence(grammar.quoted(argument.name), self.key_end)
            pair = self._pair(grammar, key, self._value(grammar, argument, arguments))
            pairs.append(pair if argument.is_required else grammar.optional(pair))
        if arguments.others is not None:
            listed = "|".join(escaped(argument.name) for argument in arguments.listed)
            but = f" & ~/{listed}/" if listed else ""
            key = grammar.matching_until(f"/{KEY}/{but}", self.key_end)
            value = self._value(grammar, arguments.others, arguments)
            pairs.append(grammar.any_number(self._pair(grammar, key, value)))
        return pairs

    def _check_name(self, argument: ToolParameter) -> None:
        """Raise RequestError for a name that would be parsed as another."""
        name = argument.name
        if name.strip() != name or self.key_end in name or not 0 < len(name) <= MAX_NAME:
            raise schema_error(
                argument.path, "this model's tool-call format cannot express the name"
            )

    def _pair(self, grammar: LarkBuilder, key: Rule, value: Rule) -> Rule:
        """The grammar of one argument from `key` and `value`, which include their end texts."""
        return grammar.sequence(self.key_begin, key, *self.value_begin, value, "\n")

    def _value(
        self, grammar: LarkBuilder, argument: ToolParameter, arguments: ToolParameters
    ) -> Rule:
        """The grammar of a value and its end: JSON, or text without the end tag."""
        schema, root = argument.schema, arguments.root
        if is_free(schema):
            return grammar.text_until(self.value_end)
        if json_types(schema, root) != {"string"}:
            value = grammar.json(json_schema(schema, root))
            return grammar.sequence(value, self.before_end, self.value_end)
        return self._text(
            grammar, read_text_constraints(schema, root, argument.path), argument.path
        )

    def _text(self, grammar: LarkBuilder, texts: Sequence[TextConstraint], path: str) -> Rule:
        """The grammar of a text that matches one of `texts`, and its end."""
        options = [option for text in texts for option in text.options or ()]
        if any(self.value_end in option for option in options):
            raise schema_error(path, f"a text must not contain {self.value_end}; leave it out")
        free = [text for text in texts if text.options is None]
        if not free:
            rule = grammar.choice([grammar.quoted(option) for option in options])
            return grammar.sequence(rule, self.before_end, self.value_end)
        if any(text.shortest == 0 and text.longest is None for text in free):
            return grammar.text_until(self.value_end)
        # A single terminal: of several, the lexer would take the longest match.
        before = escaped(self.before_end)
        regexes = [f"{escaped(option)}{before}" for option in options]
        regexes += [f"{lengths(text)}({before})?" for text in free]
        return grammar.matching_until(f"/{'|'.join(regexes)}/", self.value_end)

    @abstractmethod
    def _read_name(self, state: ParserState) -> Steps[str]:
        """Consume up to the arguments; returns the function's name."""

    @abstractmethod
    def _read_key(self, state: ParserState) -> Steps[str | None]:
        """Consume up to the value of the next argument; returns its name, or None."""


class GlmToolParser(_Tagged):
    """GLM: <tool_call>name, then <arg_key> and <arg_value> for each argument."""

    markers = (OPEN, CLOSE, "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>")
    head = f"{NAME}\n"
    key_begin, key_end = "<arg_key>", "</arg_key>"
    value_begin, value_end = ("\n", "<arg_value>"), "</arg_value>"

    def _read_name(self, state: ParserState) -> Steps[str]:
        name = yield from state.reader.read_before("<", limit=MAX_NAME)
        after = yield from state.reader.is_next("<arg_key>")
        if not after and not (yield from state.reader.is_next(CLOSE)):
            raise Malformed("arguments")
        return name.strip()

    def _read_key(self, state: ParserState) -> Steps[str | None]:
        reader = state.reader
        if not (yield from reader.accept_within_call("<arg_key>")):
            return None
        key = yield from reader.read_until("</arg_key>", limit=MAX_NAME)
        yield from reader.skip_space()
        yield from reader.expect("<arg_value>")
        return key.strip()


class Qwen3CoderToolParser(_Tagged):
    """Qwen3-Coder: <function=name> in <tool_call>, then <parameter=key> for each argument."""

    markers = (OPEN, CLOSE)
    head, tail = f"\n<function={NAME}>\n", "</function>\n"
    key_begin, key_end = "<parameter=", ">"
    value_begin, value_end, before_end = ("\n",), "</parameter>", "\n"

    def _read_name(self, state: ParserState) -> Steps[str]:
        yield from state.reader.skip_space()
        yield from state.reader.expect("<function=")
        return (yield from state.reader.read_until(">", limit=MAX_NAME)).strip()

    def _read_key(self, state: ParserState) -> Steps[str | None]:
        if not (yield from state.reader.accept_within_call("<parameter=")):
            return None
        return (yield from state.reader.read_until(">", limit=MAX_NAME)).strip()


def lengths(text: TextConstraint) -> str:
    """A regular expression for texts of the allowed length.

    It allows no tag to begin, and no line break as the last character, before the shortest length
    is reached: parsing would cut the text there. Banning the tag itself would multiply the lexer's
    states.
    """
    least, most = text.shortest, text.longest
    if least == 0:
        return _any(0, most)
    begin = f"[^<]{{{least - 1}}}"
    options = [f"[^<\\n]{_any(least, most)}"]
    if most != least:
        options.append(f"<[^\\/]{_any(least + 1, most)}")
    return f"{begin}({'|'.join(options)})"


def _any(done: int, most: int | None) -> str:
    """The rest of a text after `done` characters, of at most `most` in total."""
    return f"(.|\\n){{0,{'' if most is None else most - done}}}"


def to_json(raw: str, allowed: Collection[str]) -> str:
    """`raw`, as the model wrote it, as JSON text: of an `allowed` type if possible."""
    try:
        value = json.loads(raw)
        json.dumps(value, allow_nan=False)
    except (ValueError, RecursionError):
        return json.dumps(raw, ensure_ascii=False)
    # If only strings are allowed, everything is a string.
    if "string" in allowed and (len(allowed) == 1 or json_type_of(value) not in allowed):
        return json.dumps(raw, ensure_ascii=False)
    return raw.strip()
