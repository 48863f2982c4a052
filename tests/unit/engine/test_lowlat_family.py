"""Generation with every attention of the family: the engine's tokens are the model's own."""

import pytest
import torch

from lowlat.config.model import ModelConfig
from lowlat.engine.engine import Engine
from lowlat.engine.params import TokenSamplingParams
from lowlat.engine.runner import ModelRunner
from lowlat.model.transformer import Transformer
from tests.lowlat_configs import EVERY, random_model
from tests.packed_attention import PackedAttention

PROMPTS = [[7, 11, 13], [2] * 40, [5, 3, 5, 3, 5, 3, 5]]


def likeliest(model: Transformer, tokens: list[int]) -> list[int]:
    """The likeliest token after each of `tokens`, computed without a cache."""
    packed = PackedAttention([len(tokens)])
    hidden = model(torch.tensor(tokens), packed.positions(), packed)
    return model.logits(hidden).argmax(dim=-1).tolist()


@pytest.mark.slow
@pytest.mark.parametrize("config", EVERY.values(), ids=EVERY)
@pytest.mark.parametrize("speculates", [True, False])
def test_greedy_tokens(config: ModelConfig, speculates: bool) -> None:
    """Three requests together, chunked prompts, drafts by MTP modules where there are any."""
    model = random_model(config, torch.float64)
    runner = ModelRunner(model, page_size=5)
    engine = Engine(
        runner, context=97, eos_ids=frozenset(), prefill_chunk=20, speculates=speculates
    )
    params = TokenSamplingParams(max_tokens=23, temperature=0.0, ignore_eos=True)
    requests = [engine.add(prompt, params) for prompt in PROMPTS]
    while engine.has_work:
        engine.step()
    engine.check_integrity()
    for prompt, request in zip(PROMPTS, requests, strict=True):
        tokens = request.sequences[0].tokens
        assert len(tokens) == len(prompt) + 23
        assert likeliest(model, tokens[:-1])[len(prompt) - 1 :] == tokens[len(prompt) :]
