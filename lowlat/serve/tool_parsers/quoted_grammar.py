"""Grammars of texts inside JSON strings: Lark grammars and regular expressions, JSON-escaped.

Models write the input of a custom tool as a JSON string. Every character of the text becomes one
terminal, its spelling in the string: no spelling is the beginning of another, so the lexer, which
never backtracks, always finds the end of each. Structure stays unchanged. Constructs that are no
sequence of characters (look-around, complement, nested grammars) are rejected.
"""

import json
import re

from lowlat.generate import structured
from lowlat.serve.tool_parsers.lark import escaped
from lowlat.utils.errors import UserError
from lowlat.utils.strict_json import quoted

SPECIAL = tuple(map(chr, (*range(32), ord('"'), ord("\\"))))
"""Characters that JSON strings contain only escaped."""
PLAIN = r'[^"\\\x00-\x1f]'
"""All others, as a character class."""
COMMON = {
    "DIGIT": "[0-9]",
    "HEXDIGIT": "[0-9a-fA-F]",
    "INT": "[0-9]+",
    "SIGNED_INT": "[+-]?[0-9]+",
    "DECIMAL": r"([0-9]+\.[0-9]*|\.[0-9]+)",
    "NUMBER": r"([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?",
    "LETTER": "[A-Za-z]",
    "WORD": "[A-Za-z]+",
    "CNAME": "[A-Za-z_][A-Za-z0-9_]*",
    "LF": r"\n",
    "CR": r"\r",
    "NEWLINE": r"(\r?\n)+",
    "WS": r"[ \t\f\r\n]+",
    "WS_INLINE": r"[ \t]+",
    "ESCAPED_STRING": r'"([^"\\]|\\.)*"',
}
"""Terminals of Lark's library `common`, as regular expressions."""

_ATOM = re.compile(
    r"""(?P<open>\((?:\?:|\?P?<\w+>|(?!\?)))
    |(?P<structure>[)|])
    |(?P<repeat>(?:[*+?]|\{[0-9]*,?[0-9]*\})\??)
    |(?P<cls>\[\^?\]?(?:\\.|[^\]\\\[])*\])
    |(?P<escape>\\(?:x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|[dDwWsSnrtfv]|[^a-zA-Z0-9]))
    |(?P<dot>\.)
    |(?P<char>[^\\\[(){|*+?.^$])""",
    re.VERBOSE | re.DOTALL,
)
_LARK = re.compile(
    r"""(?P<space>\s+)
    |(?P<skip>(?:\#|//)[^\n]*|->\s*\w+)
    |(?P<structure>\{[0-9]*,?[0-9]*\}|[:|()*+?\[\]])
    |"(?P<low>\\.|[^"\\\n])"\.\."(?P<high>\\.|[^"\\\n])"
    |(?P<string>"(?:\\.|[^"\\\n])*")(?P<case>i?)
    |/(?P<regex>(?:\\.|[^/\\\n])+)/(?P<flags>[a-z]*)
    |%import\s+common\.(?P<common>\w+)(?:\s*->\s*(?P<alias>\w+))?
    |(?P<name>[!?]?[A-Za-z_][A-Za-z0-9_]*)""",
    re.VERBOSE,
)


def json_quoted(text: structured.Regex | structured.Grammar) -> str:
    """A Lark grammar of the JSON strings, without quotes, of the texts that match `text`.

    Raises UserError for constructs that cannot be escaped.
    """
    grammar = _QuotedGrammar()
    match text:
        case structured.Regex(pattern=pattern):
            whole = re.sub(r"(?<!\\)((?:\\\\)*)\$$", r"\1", pattern.removeprefix("^"))
            rules = f"start: {grammar.regex(whole)}"
        case structured.Grammar(lark=lark):
            rules = grammar.lark(lark)
    return "\n".join([rules, *grammar.rules()])


class _QuotedGrammar:
    """Collects the terminals, one per character or class."""

    def __init__(self) -> None:
        self._terminals: dict[str, str] = {}
        self._imports: list[str] = []

    def rules(self) -> list[str]:
        """The rules to add to a grammar that was converted."""
        return self._imports + [f"{name}: {regex}" for regex, name in self._terminals.items()]

    def lark(self, text: str) -> str:
        """The rules of `text`. Terminals become rules, as they may have several characters."""
        pieces: list[str] = []
        position = 0
        while position < len(text):
            match = _LARK.match(text, position)
            if match is None:
                raise _unsupported(text[position:])
            position = match.end()
            pieces.append(self._lark_item(match))
        return "".join(pieces)

    def _lark_item(self, match: re.Match[str]) -> str:
        if match["skip"]:
            return ""  # comments, and aliases, which name nodes of parse trees
        if match["low"]:
            low, high = _content(match["low"]), _content(match["high"])
            return self.regex(f"[{re.escape(low)}-{re.escape(high)}]")
        if match["string"]:
            flags = "i" if match["case"] else ""
            return self.regex(escaped(_content(match["string"][1:-1])), flags)
        if match["regex"]:
            return self.regex(match["regex"], match["flags"])
        if match["common"]:
            if match["common"] not in COMMON:
                raise _unsupported(match[0])
            rule = _rule_name(match["alias"] or match["common"])
            self._imports.append(f"{rule}: {self.regex(COMMON[match['common']])}")
            return ""
        return _rule_name(match["name"]) if match["name"] else match[0]

    def regex(self, pattern: str, flags: str = "") -> str:
        """`pattern` as an expression of Lark."""
        if set(flags) - set("isu"):
            raise UserError(f"format: the flags {quoted(flags)} are not supported; leave them out")
        pieces = ["("]
        position = 0
        while position < len(pattern):
            match = _ATOM.match(pattern, position)
            if match is None:
                raise _unsupported(pattern[position:])
            position = match.end()
            if match["structure"] and pieces[-1] in ("(", "|"):
                pieces.append('""')
            if match["open"]:
                pieces.append("(")
            elif match["repeat"]:
                # Without ? at the end: a lazy repetition matches the same texts.
                pieces.append(re.sub(r"(?<=.)\?$", "", match[0]))
            else:
                pieces.append(match["structure"] or self._terminal(match, flags))
        if pieces[-1] in ("(", "|"):
            pieces.append('""')
        return " ".join([*pieces, ")"])

    def _terminal(self, match: re.Match[str], flags: str) -> str:
        """The terminal of one character of a text."""
        atom = escaped(match[0]) if match["char"] else match[0]
        if match["cls"] and re.search(r"&&|--|~~", atom):
            raise _unsupported(atom)
        try:
            options = re.DOTALL * ("s" in flags) | re.IGNORECASE * ("i" in flags)
            compiled = re.compile(atom, options)
        except re.error as error:
            raise _unsupported(atom) from error
        special = [char for char in SPECIAL if compiled.fullmatch(char)]
        spellings = [escaped(json.dumps(char)[1:-1]) for char in special]
        if match["dot"]:
            atom = r"[\s\S]" if "s" in flags else r"[^\n]"
        is_one = len(special) == 1 and not (match["cls"] or match["dot"])
        if not is_one:
            inner = re.sub(r"\\?\n", r"\\n", re.sub(r"(?<!\\)((?:\\\\)*)/", r"\1\/", atom))
            plain = f"[{inner}&&{PLAIN}]"
            spellings.append(f"(?i:{plain})" if "i" in flags else plain)
        regex = f"/{'|'.join(spellings)}/"
        return self._terminals.setdefault(regex, f"CHARACTER_{len(self._terminals)}")


def _rule_name(name: str) -> str:
    """A terminal's name as that of a rule."""
    return f"terminal_{name.lower()}" if name.isupper() else name


def _content(text: str) -> str:
    """The content of a Lark string."""
    try:
        return json.loads(f'"{text}"', strict=False)
    except ValueError as error:
        raise UserError(f"format: {quoted(text)} is not a valid string") from error


def _unsupported(text: str) -> UserError:
    return UserError(
        f"format: {quoted(text[:40])} cannot be enforced inside a JSON string; write it with"
        " literals, character classes, groups and repetitions"
    )
