"""From events to text: characters, stop strings, end of sequence, timing."""

from dataclasses import replace

import pytest

from lowlat.engine.engine import NOT_FINITE
from lowlat.engine.request import FinishReason, Request, RequestOptions, TokenEvent
from lowlat.generate.completion import CompletionBuilder, Usage
from lowlat.generate.params import SamplingParams
from lowlat.utils.errors import UserError
from tests.fakes import EOS, byte_tokenizer

TOKENIZER = byte_tokenizer()


def builder_for(**options: object) -> CompletionBuilder:
    params = SamplingParams(**options)  # pyright: ignore[reportArgumentType]
    request = Request(
        id=0,
        prompt=(1, 2),
        params=params,
        options=RequestOptions(),
        max_outputs=99,
        arrived_at=0.0,
    )
    return CompletionBuilder(TOKENIZER, request, 0, stop=params.stop)


def push(builder: CompletionBuilder, text: str | bytes, last: FinishReason | None = None) -> None:
    """Push the bytes of `text` as tokens; the last one with finish reason `last`, which for "stop"
    is that of an end of sequence."""
    data = text.encode() if isinstance(text, str) else text
    for i, byte in enumerate(data):
        if builder.finish_reason is None:
            reason = last if i == len(data) - 1 else None
            is_text = reason != "stop"
            builder.push(TokenEvent(0, 0, byte, finish_reason=reason, is_text=is_text))


def test_text_comes_in_whole_characters() -> None:
    builder = builder_for()
    push(builder, "a\u20acb", "length")
    assert builder.pieces == ["a", "\u20ac", "b"]
    assert builder.result().text == str(builder.result()) == "a\u20acb"
    assert builder.result().finish_reason == "length"


def test_the_end_of_sequence_has_an_id_and_no_text() -> None:
    builder = builder_for()
    push(builder, "hi")
    builder.push(TokenEvent(0, 0, EOS, finish_reason="stop", is_text=False))
    result = builder.result()
    assert (result.text, result.token_ids, result.finish_reason) == (
        "hi",
        (*b"hi", EOS),
        "stop",
    )


def test_an_end_of_sequence_that_is_no_special_token_has_no_text_either() -> None:
    builder = builder_for()
    push(builder, "hi!", "stop")
    assert builder.result().text == "hi"


def test_a_stop_string_ends_the_text_before_it() -> None:
    builder = builder_for(stop=("END",))
    push(builder, "one ENDING")
    assert builder.result().text == "one "
    assert builder.finish_reason == "stop"
    assert bytes(builder.result().token_ids) == b"one END"


def test_the_beginning_of_a_stop_string_is_held_back_and_shown_when_nothing_follows() -> None:
    """Regression: text lost at the end because it looked like a stop string."""
    builder = builder_for(stop=("END",))
    push(builder, "to EN", "length")
    assert builder.result().text == "to EN"
    assert builder.pieces == ["t", "o", " ", "EN"]
    assert builder.finish_reason == "length"


def test_a_character_cut_off_by_the_end_is_replaced() -> None:
    builder = builder_for()
    push(builder, b"a\xe2\x82", "length")
    assert builder.result().text == "a\ufffd"


def test_logprobs_are_returned_per_token_if_requested() -> None:
    builder = builder_for(logprobs=1)
    builder.push(TokenEvent(0, 0, 65, -0.5, ((66, -0.25),), "length"))
    logprobs = builder.result().logprobs
    assert logprobs is not None and len(logprobs) == 1
    entry = logprobs[0]
    assert (entry.token, entry.logprob, entry.top) == (65, -0.5, ((66, -0.25),))
    assert builder_for().result().logprobs is None


def test_a_failed_completion_is_an_error_with_a_remedy() -> None:
    builder = builder_for()
    builder.push(TokenEvent(0, 0, None, finish_reason="error", error=NOT_FINITE))
    with pytest.raises(UserError, match=r"not finite.*fp32"):
        builder.result()


def test_speeds_by_hand() -> None:
    usage = Usage(prompt_tokens=100, completion_tokens=21, prefill_seconds=0.5, decode_seconds=4.0)
    assert usage.prefill_tokens_per_second == 200.0
    assert usage.decode_tokens_per_second == 5.0
    assert replace(usage, cached_tokens=80).prefill_tokens_per_second == 40.0
    short = Usage(prompt_tokens=1, completion_tokens=1, prefill_seconds=0.0, decode_seconds=0.0)
    assert short.prefill_tokens_per_second == short.decode_tokens_per_second == 0.0


def test_text_after_which_a_grammar_ends_is_part_of_it() -> None:
    """Regression: a last token that is dropped because the completion stops with it."""
    builder = builder_for()
    push(builder, "ye")
    builder.push(TokenEvent(0, 0, ord("s"), finish_reason="stop"))
    assert builder.result().text == "yes" and builder.finish_reason == "stop"


def test_special_tokens_in_keep_special_are_text() -> None:
    request = builder_for().request
    builder = CompletionBuilder(TOKENIZER, request, 0, keep_special=frozenset({EOS}))
    builder.push(TokenEvent(0, 0, EOS))
    assert builder.pieces == ["</s>"]
