"""The input of custom tools: decoded in any pieces, nothing lost, grammars in JSON strings."""

import json
import re

import pytest

from lowlat.generate.grammar import GrammarCompiler, GrammarState
from lowlat.generate.structured import Grammar, Regex
from lowlat.serve.chat.freeform import FreeformReader, arguments_of
from lowlat.serve.tool_parsers.quoted_grammar import json_quoted
from lowlat.utils.errors import UserError
from tests.fakes import byte_tokenizer

PATCH = (
    'start: "*** Begin" LF line+ end\n'
    'line: ("+" | "-" | " ") /(.*)/ LF -> line\n'
    'end: "*** End" LF?\n'
    "%import common.LF\n"
)


def read(text: str, size: int) -> str:
    reader = FreeformReader()
    pieces = [reader.push(text[at : at + size]) for at in range(0, len(text), size)]
    return "".join(pieces) + reader.finish()


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7, 1000])
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (arguments_of('a "b" \\ \n\t é 😀 end'), 'a "b" \\ \n\t é 😀 end'),
        (json.dumps({"input": "é 😀 z"}), "é 😀 z"),
        (' { "input" : "x" } ', "x"),
        ('{"input": ""}', ""),
        # Lone surrogates, in front of everything that may follow.
        (r'{"input": "a\ud800b"}', "a\ufffdb"),
        (r'{"input": "a\ud800\nb\udc00c"}', "a\ufffd\nb\ufffdc"),
        (r'{"input": "\ud800\ud83d\ude00!"}', "\ufffd\U0001f600!"),
        (r'{"input": "\ud800\u0041"}', "\ufffdA"),
        (r'{"input": "end\ud800"}', "end\ufffd"),
        # Invalid and truncated texts stay as they are.
        (r'{"input": "a\qb"}', r"a\qb"),
        (r'{"input": "a\u12', r"a\u12"),
        (r'{"input": "cut', "cut"),
        ('{"input": "say "hi" now"}', 'say "hi" now"}'),
        ('{"other": "x"}', '{"other": "x"}'),
        (r'{"more": 1, "input": "a\ud800b"}', "a\ufffdb"),
        ("no json", "no json"),
    ],
)
def test_the_text_does_not_depend_on_the_pieces(text: str, expected: str, size: int) -> None:
    assert read(text, size) == expected


TOKENIZER = byte_tokenizer()


def accepts(output: Regex | Grammar, *texts: str) -> list[bool]:
    """Which JSON-escaped texts match the JSON-escaped grammar."""
    compiler = GrammarCompiler(TOKENIZER, TOKENIZER.vocab_size)
    compiled = compiler.compile(Grammar(lark=json_quoted(output)))
    return [matches(compiled.start(), text) for text in texts]


def matches(state: GrammarState, text: str) -> bool:
    for token in json.dumps(text, ensure_ascii=False)[1:-1].encode():
        if not state.mask()[token]:
            return False
        state.accept(token)
    return bool(state.mask()[next(iter(TOKENIZER.eos_ids))]) or state.is_done


@pytest.mark.parametrize(
    "pattern",
    [
        r"a+\.b", r"[^\n]+", ".*", r'["\\]x', r"\s\S\d\w", r"^ab?$", r"(a|b){2,3}c", r"(?:\n|,)+x",
        r"[\x00-\x20]!", r"\/[a-z/]+", r"(?P<name>x)\t", r"\\\\n", r"\W", "[]a]", r"é.[à-ü]",
    ],
)  # fmt: skip
def test_a_pattern_means_the_same_inside_a_string(pattern: str) -> None:
    texts = [
        "aa.b",
        'say "x"\\',
        "a\nb",
        '"x',
        "\\x",
        " x1a",
        "ab",
        "abac",
        "\n,\nx",
        "\x01!",
        "\n!",
    ]
    texts += ["/a/b", "x\t", r"\\n", "\n", "]", "é\t\xe0", "", "line", '"', "\u2028"]
    expected = [re.fullmatch(pattern, text) is not None for text in texts]
    assert accepts(Regex(pattern=pattern), *texts) == expected


def test_a_grammar_means_the_same_inside_a_string() -> None:
    grammar = Grammar(lark=PATCH)
    good = '*** Begin\n+a "quoted" \\ line\n-\tx\n  \n*** End\n'
    assert all(accepts(grammar, good, good.rstrip("\n")))
    bad = (good.replace("+a", "a"), good.replace("End", "end"), good + "x", "*** Begin\n")
    assert not any(accepts(grammar, *bad))
    ranged = Grammar(lark='start: "\\n".."\\r" X{2}\nX: "q\\n"i | /[^"a-d]/i // a comment\n')
    assert all(accepts(ranged, "\rQ\nq\n", "\r\n\n", "\nxQ\n"))
    assert not any(accepts(ranged, '\r""', "\rA\n", "\n", "x\n\n", "\rxC"))


def test_a_terminal_may_end_where_another_goes_on() -> None:
    """The lexer does not backtrack: one terminal for `.*` would consume the end."""
    assert accepts(Regex(pattern='.*END"?'), 'an END "END"') == [True]
    lines = Grammar(lark='start: /.*/ "\\n" BODY* "END"\nBODY: /.*\\n/')
    assert accepts(lines, "x\nEN\nEND") == [True]


@pytest.mark.parametrize(
    "lark",
    [
        'start: %json {"type": "string"}', "start: ~/a/", "start: /a(?=b)/", r"start: /\bx/",
        "start: /[a&&b]/", "start: /[[a]]/", r"start: /\p{L}/", "start: /a/x", "%ignore / /",
        "%import common.NOTHING\nstart: NOTHING", "start: <think>", "start: @other", "start: /a$b/",
        '%llguidance {"no_forcing": true}\nstart: "a"', 'start: "a"\n}\nr0: "b"', 'start: "\\q"',
    ],
)  # fmt: skip
def test_what_cannot_be_escaped_is_refused(lark: str) -> None:
    with pytest.raises(UserError, match="format: "):
        json_quoted(Grammar(lark=lark))
