"""Which log-probabilities belong to a completion's text, and where in it their tokens begin."""

import pytest

from lowlat.engine.request import TokenEvent
from tests.fakes import EOS

from .test_completion import builder_for


def told(text: bytes, *, stop: tuple[str, ...] = (), end: str | None = None) -> list[list[int]]:
    """Tokens whose log-probabilities are returned after each byte of `text` and the end."""
    builder = builder_for(logprobs=0, stop=stop)
    shown, steps = 0, []
    events = [TokenEvent(0, 0, byte, -0.5) for byte in text]
    if end == "eos":
        events.append(TokenEvent(0, 0, EOS, -0.5, finish_reason="stop", is_text=False))
    elif end == "length":
        events[-1] = TokenEvent(0, 0, text[-1], -0.5, finish_reason="length")
    for event in events:
        if builder.finish_reason is None:
            builder.push(event)
            steps.append([entry.token for entry in builder.logprobs[shown : builder.num_in_text]])
            shown = builder.num_in_text
    kept = builder.logprobs[: builder.num_in_text]
    assert all(entry.start <= len("".join(builder.pieces)) for entry in kept)
    assert len(builder.result().logprobs or ()) == len(builder.token_ids)  # Python gets all
    return steps


@pytest.mark.parametrize(
    ("text", "options", "expected"),
    [
        (b"ab", {"end": "eos"}, [[97], [98], []]),
        (b"ab", {"end": "length"}, [[97], [98]]),
        (b"xEND", {"stop": ("END",)}, [[120], [], [], []]),
        (b"xENd", {"stop": ("END",)}, [[120], [], [], [*b"ENd"]]),
        (b"xEN", {"stop": ("END",), "end": "length"}, [[120], [], [*b"EN"]]),
        (b"xEN", {"stop": ("END",), "end": "eos"}, [[120], [], [], [*b"EN"]]),
        ("a\u00e9!".encode(), {"end": "length"}, [[97], [], [0xC3, 0xA9], [33]]),
        (b"a\xc3", {"end": "length"}, [[97], [0xC3]]),
    ],
)
def test_they_come_with_the_text_and_no_others_do(
    text: bytes, options: dict[str, object], expected: list[list[int]]
) -> None:
    """Regression: entries for an end of sequence or a stop string, which no text has."""
    assert told(text, **options) == expected  # pyright: ignore[reportArgumentType]


def test_a_token_that_the_stop_string_begins_in_is_returned() -> None:
    builder = builder_for(logprobs=0, stop=("</s>x",))
    builder._detokenizer._skipped = frozenset()
    for token in (*b"ab", EOS, ord("x")):
        builder.push(TokenEvent(0, 0, token, -0.5))
    assert "".join(builder.pieces) == "ab" and builder.num_in_text == 2
    builder = builder_for(logprobs=0, stop=("s>x",))
    builder._detokenizer._skipped = frozenset()
    for token in (*b"ab", EOS, ord("x")):
        builder.push(TokenEvent(0, 0, token, -0.5))
    assert "".join(builder.pieces) == "ab</" and builder.num_in_text == 3
    assert [entry.start for entry in builder.logprobs] == [0, 1, 2, 6]
