"""LarkBuilder: grammars in llguidance's Lark dialect, from the constructions tool calls need.

Handles quoting, rule names and special tokens as terminals.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lowlat.generate.grammar_source import lark_string
from lowlat.text.tokenizer import Tokenizer


class Rule(str):
    """An expression of the grammar; plain strings are literal texts."""


class LarkBuilder:
    """Collects named rules; `text` returns the whole grammar."""

    def __init__(self, tokenizer: Tokenizer, markers: Iterable[str]) -> None:
        """Only the texts in `markers` may become special tokens."""
        known = {text: index for index, text in tokenizer.added_tokens.items()}
        self._tokens = {text: known[text] for text in markers if text in known}
        self._rules: list[str] = []

    def rule(self, expression: str) -> Rule:
        name = f"r{len(self._rules)}"
        self._rules.append(f"{name}: {expression}")
        return Rule(name)

    def literal(self, text: str) -> Rule:
        """`text`, or its special token if it is a marker."""
        if text in self._tokens:
            return Rule(f"<[{self._tokens[text]}]>")
        return self.quoted(text)

    def quoted(self, text: str) -> Rule:
        """`text`, which may come from a user: never a special token."""
        return Rule(lark_string(text))

    def sequence(self, *items: str) -> Rule:
        """`items` in sequence: rules and texts; a marker must be an item of its own."""
        parts = [item if isinstance(item, Rule) else self.literal(item) for item in items if item]
        return self.rule(" ".join(parts))

    def choice(self, options: Sequence[Rule]) -> Rule:
        return self.rule(" | ".join(options))

    def repeated(self, item: Rule, *, between: Sequence[str] = (), parallel: bool) -> Rule:
        """`item` once, or `several` times with the texts `between` them."""
        if not parallel:
            return item
        return self.rule(f"{item} ({self.sequence(*between, item)})*")

    def any_number(self, item: Rule) -> Rule:
        return self.rule(f"({item})*")

    def optional(self, item: Rule) -> Rule:
        return self.rule(f"({item})?")

    def json(self, schema: Mapping[str, Any]) -> Rule:
        return self.json_text(json.dumps(schema))

    def json_text(self, schema: str) -> Rule:
        """JSON that matches a schema, given as text."""
        return self.rule(f"%json {schema}")

    def nested(self, lark: str) -> Rule:
        """A whole Lark grammar, with rule names of its own."""
        return self.rule(f"%lark {{\n{lark}\n}}")

    def pattern(self, regex: str) -> Rule:
        """Text that matches `regex`, as a terminal (uppercase name)."""
        name = f"T{len(self._rules)}"
        self._rules.append(f"{name}: {regex}")
        return Rule(name)

    def text_without(self, *literals: str) -> Rule:
        """Any text without any of `literals`."""
        banned = "|".join(escaped(literal) for literal in literals)
        return self.pattern(f"/(.|\\n)*/ & ~/(.|\\n)*({banned})(.|\\n)*/")

    def text_until(self, end: str) -> Rule:
        """Any text up to and including the first `end`."""
        if end in self._tokens:
            return self.sequence(self.text_without(end), end)
        return self._with_suffix("/(.|\\n)*/", end)

    def matching_until(self, regex: str, end: str) -> Rule:
        """Text that matches `regex`, followed by the first possible `end`."""
        spelt = self._with_suffix(regex, end)
        if end not in self._tokens:
            return spelt
        return self.choice([spelt, self.sequence(self.pattern(regex), end)])

    def _with_suffix(self, regex: str, end: str) -> Rule:
        # Terminals match greedily: without suffix they would continue past the start of `end`.
        name = f"r{len(self._rules)}"
        self._rules.append(f"{name}[suffix={self.quoted(end)}]: {regex}")
        return Rule(name)

    def text(self, start: Rule) -> str:
        """The whole grammar with the start rule `start`."""
        return "\n".join([f"start: {start}", *self._rules]) + "\n"


def escaped(text: str) -> str:
    """`text` escaped for a regular expression between slashes."""
    return re.sub(r"([.+*?()|\[\]{}^$/\\&~#-])", r"\\\1", text).replace("\n", "\\n")
