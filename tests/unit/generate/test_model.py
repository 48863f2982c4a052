"""The Model API: prompts, completions, streams, and scoring through the cache."""

import inspect
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from lowlat.config.model import ModelConfig
from lowlat.engine.scheduler import MAX_SEQUENCES
from lowlat.generate.completion import Completion
from lowlat.generate.model import Model
from lowlat.generate.params import SamplingParams
from lowlat.generate.prompt import encode_prompt
from lowlat.generate.structured import Choice, Regex
from lowlat.utils.errors import UserError
from tests.fakes import (
    ASSISTANT,
    BOS,
    EOS,
    USER,
    ScriptedModel,
    byte_tokenizer,
    gqa_config,
    mla_config,
    tiny_model,
)

TOKENIZER = byte_tokenizer()
LONG = [(i * 37 + i * i) % 256 for i in range(90)]


def counting(config: ModelConfig | None = None) -> Model:
    """Every byte is followed by its successor: "a" is answered by "bcdef..."."""
    transformer = ScriptedModel(config or gqa_config(), lambda token: token + 1)
    return Model(transformer, TOKENIZER, name="counting")


def real(config: ModelConfig, dtype: torch.dtype = torch.float64, **options: Any) -> Model:
    return Model(tiny_model(config, dtype), TOKENIZER, name="tiny", **options)


def check_idle(model: Model) -> None:
    """No page, request or builder is left behind."""
    model.engine.check_integrity()
    assert (
        model.runner.allocator.num_used == 0
        and not model.session.requests
        and not model.engine.has_work
    )


def one(completion: Completion | list[Completion]) -> Completion:
    assert isinstance(completion, Completion)
    return completion


# Prompts


def test_the_three_forms_of_a_prompt() -> None:
    model = counting()
    assert model.encode_prompt("a\u20ac") == [*"a\u20ac".encode()]
    assert model.encode_prompt([3, 5]) == [3, 5]
    messages = [{"role": "user", "content": "hi"}]
    assert model.encode_prompt(messages) == [BOS, USER, *b"hi", EOS, ASSISTANT]


def test_integers_of_other_packages_are_token_ids() -> None:
    import numpy as np

    for ids in (list(np.array([3, 5])), list(torch.tensor([3, 5]))):
        # Past the types, which tests check.
        found = inspect.unwrap(encode_prompt)(TOKENIZER, ids)
        assert found == [3, 5] and [type(item) for item in found] == [int, int]


@pytest.mark.parametrize("prompt", [[1, "a"], [True, 2], [{"role": "user"}, 3], None, 5, [1.5]])
def test_another_kind_of_prompt_is_an_error(prompt: Any) -> None:
    with pytest.raises(UserError, match="prompt must be text"):
        # Past the types, which tests check.
        inspect.unwrap(encode_prompt)(TOKENIZER, prompt)


@pytest.mark.parametrize("prompt", ["", []])
def test_an_empty_prompt_is_an_error(prompt: Any) -> None:
    with pytest.raises(UserError, match="prompt is empty"):
        counting().generate(prompt)


# Completions


def test_generate_returns_text_ids_reason_and_usage() -> None:
    model = counting()
    found = one(model.generate("a", max_tokens=4))
    assert (found.text, found.token_ids, found.finish_reason) == ("bcde", (*b"bcde",), "length")
    assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (1, 4)
    assert found.usage.decode_tokens_per_second > 0 and found.usage.prefill_tokens_per_second > 0
    assert found.logprobs is None
    check_idle(model)


@pytest.mark.parametrize("stop", [5, 2.5, {"a"}])
def test_stop_is_a_string_or_several(stop: Any) -> None:
    with pytest.raises(UserError, match="stop must be a string or a list"):
        inspect.unwrap(Model.generate)(counting(), "a", stop=stop)


def test_scoring_keeps_within_the_cache_s_limit() -> None:
    """Regression: a cache that grows for good when a text is scored during a stream."""
    model = real(mla_config(num_nextn_predict_layers=0), max_cache_bytes=2**15)
    limit = model.runner.allocator.num_pages
    stream = model.generate(LONG[:60], stream=True, ignore_eos=True)
    next(stream)
    with pytest.raises(UserError, match=r"do not fit into the cache .* raise max_cache_bytes"):
        for length in range(2, 90):
            model.nll(LONG[:length])
    assert model.runner.allocator.num_pages == limit
    stream.close()
    assert len(model.nll(LONG[:60])) == 59
    check_idle(model)


def test_a_cache_beyond_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowlat.engine.cache_size.memory_limit", lambda: 3 * 2**30)
    with pytest.raises(UserError, match=r"max_cache_bytes 5368709120: .* 3\.0 GiB .* give less"):
        real(gqa_config(), max_cache_bytes=5 * 2**30)


def test_no_more_pages_than_all_sequences_can_fill() -> None:
    """Regression: lists of pages that take more memory than the cache."""
    model = real(gqa_config(), context=70, max_cache_bytes=2**30)
    assert model.runner.allocator.num_pages == 2 * MAX_SEQUENCES


def test_stop_strings_stop_the_engine_too() -> None:
    """Regression: tokens computed after the stop string was found."""
    model = counting()
    (found,), (other,) = model.generate_many(["a", "0"], stop="fg", max_tokens=9)
    assert (found.text, found.finish_reason) == ("bcde", "stop")
    assert bytes(found.token_ids) == b"bcdefg"
    assert (other.text, other.finish_reason) == ("123456789", "length")
    check_idle(model)


def test_n_completions_come_as_a_list_and_differ() -> None:
    model = real(gqa_config())
    found = model.generate("hello", n=3, temperature=1.0, seed=1, max_tokens=8, ignore_eos=True)
    assert isinstance(found, list)
    assert len({completion.token_ids for completion in found}) == 3
    again = model.generate("hello", n=3, temperature=1.0, seed=1, max_tokens=8, ignore_eos=True)
    assert isinstance(again, list)
    assert [c.token_ids for c in again] == [c.token_ids for c in found]
    check_idle(model)


def test_many_prompts_share_steps_and_change_nothing() -> None:
    model = real(mla_config())
    prompts = ["one", "another one", [7, 11, 13]]
    together = model.generate_many(prompts, max_tokens=9, ignore_eos=True)
    alone = [one(model.generate(prompt, max_tokens=9, ignore_eos=True)) for prompt in prompts]
    assert [group[0].token_ids for group in together] == [c.token_ids for c in alone]
    check_idle(model)


def test_logprobs_agree_with_logits() -> None:
    model = real(gqa_config())
    prompt = [5, 80, 200]
    found = one(model.generate(prompt, max_tokens=5, logprobs=2, ignore_eos=True))
    expected = model.logits([*prompt, *found.token_ids]).log_softmax(-1)[len(prompt) - 1 : -1]
    assert found.logprobs is not None and len(found.logprobs) == 5
    for entry, row in zip(found.logprobs, expected, strict=True):
        assert entry.logprob == pytest.approx(float(row[entry.token]), abs=1e-5)
        best = row.topk(2)
        assert [token for token, _ in entry.top] == best.indices.tolist()
        assert [p for _, p in entry.top] == pytest.approx(best.values.tolist(), abs=1e-5)


def test_a_failing_request_leaves_nothing_behind() -> None:
    """Regression: earlier prompts of a list left in the engine when a later one is refused."""
    model = counting()
    with pytest.raises(UserError, match="context is 97"):
        model.generate_many(["fine", "x" * 97], max_tokens=3)
    misspelt: Any = {"max_token": 3}
    with pytest.raises(UserError, match="'max_token' is unknown"):
        model.generate("a", **misspelt)
    check_idle(model)


def test_an_interrupt_in_a_step_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    model = counting()
    step, calls = model.engine.step, []

    def interrupted() -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return step()

    monkeypatch.setattr(model.engine, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        model.generate_many(["a", "b"], max_tokens=50)
    check_idle(model)


# Streams


def test_a_stream_gives_the_pieces_and_then_the_fields() -> None:
    model = counting()
    stream = model.generate("a", stream=True, max_tokens=5, stop=["f"])
    assert next(stream) == "b" and stream.text == "b" and stream.finish_reason is None
    assert list(stream) == ["c", "d", "e"]
    assert (stream.text, stream.finish_reason) == ("bcde", "stop")
    assert stream.token_ids == (*b"bcdef",) and stream.logprobs is None
    assert stream.usage.completion_tokens == 5
    check_idle(model)


def test_streams_may_interleave() -> None:
    """Regression: one stream swallowing the events of another."""
    model = counting()
    first = model.generate("a", stream=True, max_tokens=4)
    second = model.generate("A", stream=True, max_tokens=4)
    pieces = [next(first), next(second), next(first), *second, *first]
    assert pieces == ["b", "B", "c", "C", "D", "E", "d", "e"]
    assert one(model.generate("k", max_tokens=2)).text == "lm"
    check_idle(model)


def test_a_stream_left_early_ends_its_request() -> None:
    model = counting()
    with model.generate("a", stream=True) as stream:
        assert next(stream) == "b"
    assert stream.finish_reason == "abort" and stream.text == "b"
    assert list(stream) == []
    check_idle(model)
    dropped = model.generate("a", stream=True)
    next(dropped)
    del dropped
    check_idle(model)


def test_a_stream_of_several_completions_is_refused() -> None:
    with pytest.raises(UserError, match="n 2 cannot be streamed"):
        counting().generate("a", stream=True, n=2, temperature=1.0)


def test_logits_that_are_not_finite_are_an_error_with_a_remedy() -> None:
    class Broken(ScriptedModel):
        def logits(self, hidden: Tensor) -> Tensor:
            return super().logits(hidden) * float("nan")

    model = Model(Broken(gqa_config(), lambda token: token), TOKENIZER, name="broken")
    with pytest.raises(UserError, match=r"not finite.*fp32"):
        model.generate("a")
    with pytest.raises(UserError, match=r"not finite.*fp32"):
        list(model.generate("a", stream=True))
    check_idle(model)


# The object


def test_the_context_can_be_shortened_but_not_exceed_the_models() -> None:
    assert real(gqa_config()).context == 97
    assert real(gqa_config(), context=50).context == 50
    for wrong in (0, 1, 98):
        with pytest.raises(UserError, match="max_position_embeddings of 97"):
            real(gqa_config(), context=wrong)


def test_repr_describes_the_model() -> None:
    text = repr(real(mla_config(), torch.bfloat16))
    for part in ("tiny", "deepseek_v3", "MLA 5 heads", "bfloat16 on cpu", "context 97"):
        assert part in text
    # 2 layers x (11 + 6) elements x 2 bytes
    assert "68 bytes of KV cache per token" in text


# Structured output


def test_structured_outputs_match_their_format() -> None:
    model = counting()
    params = SamplingParams(structured=Choice(options=("yes", "no")))
    found = model.generate_each(["say ", "say "], [params, SamplingParams(max_tokens=3)])
    assert found[0][0] in ("yes", "no") and found[0][0].finish_reason == "stop"
    assert found[1][0] == '!"#'
    found = model.generate("say ", structured=Regex(pattern="[a-c]{4}"), temperature=1.0, n=2)
    assert all(re.fullmatch("[a-c]{4}", text) for text in found)


def test_a_structured_output_that_is_none_is_an_error() -> None:
    with pytest.raises(UserError, match="regex: "):
        counting().generate("say ", structured=Regex(pattern="(("))
