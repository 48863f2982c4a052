"""Settings of the rotary tables that depend on positions or on the served context."""

import math
from dataclasses import replace

import pytest
import torch

from lowlat.config.model import RopeConfig
from lowlat.generate.model import Model
from lowlat.model.mla import MLA
from lowlat.model.rotary import RotaryEmbeddings
from tests.configs import MLA as MLA_CONFIG
from tests.configs import model_config
from tests.fakes import byte_tokenizer
from tests.unit.checkpoint.builders import random_model

LONGROPE = RopeConfig(
    rope_theta=10000.0,
    rope_type="longrope",
    original_max_position_embeddings=32,
    attention_factor=1.1,
    pair_factors=(1.0, 2.0, 3.0),
    long_pair_factors=(2.0, 5.0, 9.0),
)


def test_the_served_context_chooses_the_factors() -> None:
    """Once for all sequences: a cached key is never rotated again."""
    config = model_config("deepseek_v3", MLA_CONFIG, rope=LONGROPE, max_position_embeddings=64)
    plain = RotaryEmbeddings(replace(config, rope=RopeConfig(rope_theta=10000.0))).inverse
    for context, factors in ((2, (1, 2, 3)), (32, (1, 2, 3)), (33, (2, 5, 9)), (None, (2, 5, 9))):
        inverse = RotaryEmbeddings(config, context).inverse
        torch.testing.assert_close(inverse, plain / torch.tensor(factors))


@pytest.mark.parametrize(("context", "factors"), [(None, (2, 5, 9)), (32, (1, 2, 3))])
def test_a_loaded_model_serves_its_context(context: int | None, factors: tuple[int, ...]) -> None:
    """Regression: the context given to a model left the factors of the longest one."""
    config = model_config("deepseek_v3", MLA_CONFIG, rope=LONGROPE, max_position_embeddings=64)
    transformer = random_model(config, torch.float32)
    model = Model(transformer, byte_tokenizer(), name="m", context=context)
    expected = RotaryEmbeddings(config, model.context).inverse
    assert torch.equal(model.runner.model.rotary.inverse, expected)
    short = RotaryEmbeddings(config, 2).inverse
    assert torch.equal(expected, short) == (factors == (1, 2, 3))


def test_queries_are_scaled_by_their_position() -> None:
    """All channels of all heads, in steps of the original context; keys are not."""
    rope = RopeConfig(
        rope_theta=50.0, llama_4_scaling_beta=0.5, original_max_position_embeddings=10
    )
    config = model_config("mistral4", MLA_CONFIG, rope=rope)
    scaled, plain = (
        random_model(replace(config, rope=one), torch.float64)
        for one in (rope, replace(rope, llama_4_scaling_beta=0.0))
    )
    plain.load_state_dict(scaled.state_dict())
    positions = torch.tensor([0, 9, 10, 19, 95])
    x = torch.randn(5, config.hidden_size, dtype=torch.float64)
    found = []
    for model in (scaled, plain):
        table = model.rotary.of(0, model.rotary(positions))
        attention = model.layers[0].self_attn
        assert isinstance(attention, MLA)
        found.append((torch.cat(attention.queries(x, table), -1), attention.entries(x, table)))
    (q, entries), (plain_q, plain_entries) = found
    factors = torch.tensor([1 + 0.5 * math.log(n) for n in (1, 1, 2, 2, 10)], dtype=torch.float64)
    torch.testing.assert_close(q, plain_q * factors[:, None, None], rtol=1e-6, atol=1e-9)
    assert torch.equal(entries, plain_entries)
