"""Arguments written one by one between tags, without JSON's quotes: GLM's and Qwen3-Coder's calls.

Whether "5" is text or a number is then in the function's schema alone.
"""

import json
from collections.abc import Collection, Sequence
from typing import ClassVar

from lowlat.serve.tool_parsers.arguments import (
    Argument,
    Arguments,
    Schema,
    Text,
    argument_schema,
    fault,
    is_free,
    json_schema,
    kind_of,
    kinds,
    read_arguments,
    read_texts,
)
from lowlat.serve.tool_parsers.base import Function, ToolFormat
from lowlat.serve.tool_parsers.json_scanner import read_value_until
from lowlat.serve.tool_parsers.lark import Lark, Rule, escaped
from lowlat.serve.tool_parsers.reader import Malformed, Steps
from lowlat.serve.tool_parsers.state import Calls

OPEN, CLOSE = "<tool_call>", "</tool_call>"
MAX_NAME = 256
MAX_VALUE = 1 << 20
NAME = "[^<>\\s]{1,64}"
"""Names of arguments that no schema lists."""


class _Tagged(ToolFormat):
    opening = OPEN
    key_end: ClassVar[str]
    """What ends the name of an argument."""
    value_end: ClassVar[str]
    """What ends its value."""
    before_end: ClassVar[str] = ""
    """What stands between the two."""

    def read(self, calls: Calls) -> Steps[None]:
        while (opening := (yield from calls.content_until(OPEN))) is not None:
            yield from calls.attempt(opening, self._read_call(calls))

    def _read_call(self, calls: Calls) -> Steps[None]:
        name = calls.checked((yield from self._read_name(calls)))
        calls.start(name)
        schema, comma = calls.schemas.get(name, {}), "{"
        while True:
            calls.reader.mark()
            try:
                argument = yield from self._read_argument(calls, schema)
            except Malformed:
                # Cut off or broken: passed on as it is, so that nobody takes it for whole.
                calls.reader.rewind()
                yield from calls.pass_broken(CLOSE)
                return
            calls.reader.release()
            if argument is None:
                break
            key, value = argument
            calls.arguments(f"{comma}{json.dumps(key, ensure_ascii=False)}: {value}")
            comma = ", "
        calls.arguments("{}" if comma == "{" else "}")
        yield from self._read_end(calls)

    def _read_argument(self, calls: Calls, schema: Schema) -> Steps[tuple[str, str] | None]:
        """The name of the next argument and its value as JSON text; None: there is none."""
        key = yield from self._read_key(calls)
        if key is None:
            return None
        allowed, raw = kinds(*argument_schema(schema, key)), None
        if allowed != {"string"}:
            # What looks like the end, but stands in a string of a JSON value, is part of it.
            raw = yield from read_value_until(calls.reader, self.value_end, limit=MAX_VALUE)
        if raw is None:
            raw = yield from calls.reader.read_until(self.value_end, limit=MAX_VALUE)
        raw = raw.removeprefix(self.before_end).removesuffix(self.before_end)
        return key, to_json(raw, allowed)

    def rule(self, grammar: Lark, functions: Sequence[Function], *, several: bool) -> Rule:
        bodies = [self._body(grammar, function) for function in functions]
        call = grammar.sequence(grammar.choice(bodies), CLOSE)
        return grammar.repeated(call, between=("\n", OPEN), several=several)

    def _body(self, grammar: Lark, function: Function) -> Rule:
        """The name and the arguments of a call."""
        raise NotImplementedError

    def _pairs(self, grammar: Lark, function: Function) -> list[Rule]:
        """The arguments of a call: those that are listed in their order, then any others."""
        arguments = read_arguments(function.schema, function.place)
        pairs: list[Rule] = []
        for argument in arguments.listed:
            self._check_name(argument)
            key = grammar.sequence(grammar.quoted(argument.name), self.key_end)
            pair = self._pair(grammar, key, self._value(grammar, argument, arguments))
            pairs.append(pair if argument.is_required else grammar.optional(pair))
        if arguments.others is not None:
            listed = "|".join(escaped(argument.name) for argument in arguments.listed)
            but = f" & ~/{listed}/" if listed else ""
            key = grammar.matching_until(f"/{NAME}/{but}", self.key_end)
            value = self._value(grammar, arguments.others, arguments)
            pairs.append(grammar.any_number(self._pair(grammar, key, value)))
        return pairs

    def _check_name(self, argument: Argument) -> None:
        """Raise RequestError for a name that would be read back as another."""
        name = argument.name
        if name.strip() != name or self.key_end in name or not 0 < len(name) <= MAX_NAME:
            raise fault(argument.place, "this model's format of calls cannot write the name")

    def _pair(self, grammar: Lark, key: Rule, value: Rule) -> Rule:
        """One argument: `key` to its end, `value` to its end, and what stands around them."""
        raise NotImplementedError

    def _value(self, grammar: Lark, argument: Argument, arguments: Arguments) -> Rule:
        """A value and its end: JSON, or text that does not hold the end."""
        schema, root = argument.schema, arguments.root
        if is_free(schema):
            return grammar.text_until(self.value_end)
        if kinds(schema, root) != {"string"}:
            value = grammar.json(json_schema(schema, root))
            return grammar.sequence(value, self.before_end, self.value_end)
        return self._text(grammar, read_texts(schema, root, argument.place), argument.place)

    def _text(self, grammar: Lark, texts: Sequence[Text], place: str) -> Rule:
        """One of `texts` and its end."""
        options = [option for text in texts for option in text.options or ()]
        if any(self.value_end in option for option in options):
            raise fault(place, f"no text may hold {self.value_end}; leave it out")
        free = [text for text in texts if text.options is None]
        if not free:
            rule = grammar.choice([grammar.quoted(option) for option in options])
            return grammar.sequence(rule, self.before_end, self.value_end)
        if any(text.shortest == 0 and text.longest is None for text in free):
            return grammar.text_until(self.value_end)
        # One terminal: of several, the one that can go on longest would be taken.
        before = escaped(self.before_end)
        regexes = [f"{escaped(option)}{before}" for option in options]
        regexes += [f"{lengths(text)}({before})?" for text in free]
        return grammar.matching_until(f"/{'|'.join(regexes)}/", self.value_end)

    def _read_name(self, calls: Calls) -> Steps[str]:
        raise NotImplementedError

    def _read_key(self, calls: Calls) -> Steps[str | None]:
        """The name of the next argument, up to where its value begins; None: there is none."""
        raise NotImplementedError

    def _read_end(self, calls: Calls) -> Steps[None]:
        raise NotImplementedError


class Glm(_Tagged):
    """<tool_call>name, then <arg_key> and <arg_value> for each argument."""

    markers = (OPEN, CLOSE, "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>")
    key_end, value_end = "</arg_key>", "</arg_value>"

    def _read_name(self, calls: Calls) -> Steps[str]:
        name = yield from calls.reader.read_before("<", limit=MAX_NAME)
        after = yield from calls.reader.is_next("<arg_key>")
        if not after and not (yield from calls.reader.is_next(CLOSE)):
            raise Malformed("arguments")
        return name.strip()

    def _read_key(self, calls: Calls) -> Steps[str | None]:
        reader = calls.reader
        if not (yield from reader.accept_within_call("<arg_key>")):
            return None
        key = yield from reader.read_until("</arg_key>", limit=MAX_NAME)
        yield from reader.skip_space()
        yield from reader.expect("<arg_value>")
        return key.strip()

    def _read_end(self, calls: Calls) -> Steps[None]:
        yield from calls.reader.accept_within_call(CLOSE)

    def _body(self, grammar: Lark, function: Function) -> Rule:
        return grammar.sequence(function.name + "\n", *self._pairs(grammar, function))

    def _pair(self, grammar: Lark, key: Rule, value: Rule) -> Rule:
        return grammar.sequence("<arg_key>", key, "\n", "<arg_value>", value, "\n")


class QwenCoder(_Tagged):
    """<function=name> inside <tool_call>, then <parameter=key> for each argument."""

    markers = (OPEN, CLOSE)
    key_end, value_end, before_end = ">", "</parameter>", "\n"

    def _read_name(self, calls: Calls) -> Steps[str]:
        yield from calls.reader.skip_space()
        yield from calls.reader.expect("<function=")
        return (yield from calls.reader.read_until(">", limit=MAX_NAME)).strip()

    def _read_key(self, calls: Calls) -> Steps[str | None]:
        if not (yield from calls.reader.accept_within_call("<parameter=")):
            return None
        return (yield from calls.reader.read_until(">", limit=MAX_NAME)).strip()

    def _read_end(self, calls: Calls) -> Steps[None]:
        yield from calls.reader.accept_within_call("</function>")
        yield from calls.reader.accept_within_call(CLOSE)

    def _body(self, grammar: Lark, function: Function) -> Rule:
        pairs = self._pairs(grammar, function)
        return grammar.sequence(f"\n<function={function.name}>\n", *pairs, "</function>\n")

    def _pair(self, grammar: Lark, key: Rule, value: Rule) -> Rule:
        return grammar.sequence("<parameter=", key, "\n", value, "\n")


def lengths(text: Text) -> str:
    """A regular expression of the texts of these lengths.

    It has no tag begin before the shortest length is reached, where reading would cut the text, nor
    a line end reach it, which may be what stands before the tag. A ban of the tag itself would take
    a state of the lexer for every pair of places.
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
    """What may follow `done` characters of at most `most`."""
    return f"(.|\\n){{0,{'' if most is None else most - done}}}"


def to_json(raw: str, allowed: Collection[str]) -> str:
    """JSON text for `raw`, as the model wrote it: of an `allowed` type, else as it looks."""
    try:
        value = json.loads(raw)
        json.dumps(value, allow_nan=False)
    except (ValueError, RecursionError):
        return json.dumps(raw, ensure_ascii=False)
    # Where a value may only be text, all of it is text.
    if "string" in allowed and (len(allowed) == 1 or kind_of(value) not in allowed):
        return json.dumps(raw, ensure_ascii=False)
    return raw.strip()
