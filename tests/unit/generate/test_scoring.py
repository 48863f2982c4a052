"""Model.logits, mtp_logits, nll and perplexity: against the model without a cache, and by hand."""

import math

import pytest
import torch
from torch import Tensor

from lowlat.config.model import ModelConfig
from lowlat.model.transformer import Transformer
from lowlat.utils.errors import UserError
from tests.fakes import gqa_config, mla_config
from tests.packed_attention import PackedAttention

from .test_model import LONG, check_idle, counting, real


def uncached_hidden(transformer: Transformer, ids: list[int]) -> Tensor:
    attention = PackedAttention([len(ids)])
    return transformer(torch.tensor(ids), attention.positions(), attention)


@pytest.mark.parametrize("config", [gqa_config(), mla_config()], ids=["gqa", "mla"])
def test_logits_equal_those_without_a_cache(
    config: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In chunks of 7 and whole, against the model without a cache, in fp64."""
    model = real(config)
    with torch.no_grad():
        expected = model.transformer.logits(uncached_hidden(model.transformer, LONG))
    torch.testing.assert_close(model.logits(LONG), expected, rtol=1e-10, atol=1e-10)
    monkeypatch.setattr("lowlat.generate.model.PREFILL_CHUNK", 7)
    torch.testing.assert_close(model.logits(LONG), expected, rtol=1e-10, atol=1e-10)
    check_idle(model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_logits_are_fp32_and_may_be_changed_in_place(dtype: torch.dtype) -> None:
    """Regression: inference tensors handed to callers."""
    logits = real(gqa_config(), dtype).logits([1, 2, 3])
    assert logits.dtype == torch.float32 and logits.shape == (3, 263)
    logits -= 1.0


@pytest.mark.parametrize("chunk", [512, 7])
def test_mtp_logits_equal_those_without_a_cache(
    chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Depth k has one row less than depth k - 1, whatever the chunks."""
    model = real(mla_config())
    transformer = model.transformer
    monkeypatch.setattr("lowlat.generate.model.PREFILL_CHUNK", chunk)
    found = model.mtp_logits(LONG)
    assert [tuple(rows.shape) for rows in found] == [(89, 263), (88, 263)]
    with torch.no_grad():
        hidden = uncached_hidden(transformer, LONG)
        for depth, rows in enumerate(found):
            ahead = torch.tensor(LONG[depth + 1 :])
            attention = PackedAttention([len(ahead)])
            hidden = transformer.mtp_hidden(
                depth, hidden[: len(ahead)], ahead, attention.positions(), attention
            )
            expected = transformer.mtp_logits(depth, hidden)
            torch.testing.assert_close(rows, expected, rtol=1e-10, atol=1e-10)
    check_idle(model)


def test_mtp_logits_of_few_tokens_and_of_models_without_mtp() -> None:
    assert [rows.shape[0] for rows in real(mla_config()).mtp_logits([5])] == [0, 0]
    assert [rows.shape[0] for rows in real(mla_config()).mtp_logits([5, 6])] == [1, 0]
    with pytest.raises(UserError, match="no MTP modules"):
        real(gqa_config()).mtp_logits([5, 6])


@pytest.mark.parametrize("ids", [[], [1] * 98, [263], [-1]])
def test_ids_that_cannot_be_scored_are_errors(ids: list[int]) -> None:
    with pytest.raises(UserError, match="ids"):
        counting().logits(ids)


def test_perplexity_by_hand() -> None:
    """The scripted model gives its successor logit 5 and the other 262 tokens 0.

    "abcaabX" in windows of 3: abc, aab, X. Predicted: b, c, a, b; only "a" is unlikely.
    """
    model = counting()
    likely = math.log(math.exp(5) + 262) - 5
    score = model.perplexity("abcaabX", window=3)
    assert (score.tokens, score.bytes) == (4, 4)
    assert score.nll == pytest.approx(4 * likely + 5, rel=1e-6)
    assert score.perplexity == pytest.approx(math.exp(likely + 1.25), rel=1e-6)
    assert score.bits_per_byte == pytest.approx((likely + 1.25) / math.log(2), rel=1e-6)
    check_idle(model)


def test_windows_do_not_see_each_other() -> None:
    model = real(gqa_config())
    text = "The quick brown fox jumps over the lazy dog"
    score = model.perplexity(text, window=13)
    parts = [text[i : i + 13] for i in range(0, len(text), 13)]
    assert score.tokens == len(text) - len(parts)
    expected = sum(float(model.nll(model.encode_prompt(part)).sum()) for part in parts)
    assert score.nll == pytest.approx(expected)


def test_the_default_window_is_within_the_context() -> None:
    assert counting().perplexity("abc" * 70).window == 97


@pytest.mark.parametrize(("text", "window"), [("abc", 1), ("abc", 98), ("a", 5), ("", 5)])
def test_texts_and_windows_that_cannot_be_scored_are_errors(text: str, window: int) -> None:
    with pytest.raises(UserError, match=r"window|text"):
        counting().perplexity(text, window=window)
