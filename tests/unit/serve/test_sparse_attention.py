"""Models with sparse attention (DSA) served on native kernels, and in PyTorch up to their top-k."""

from dataclasses import replace

import pytest
import torch

from lowlat.config.model import IndexerConfig
from lowlat.generate.model import Model
from lowlat.ops import native
from lowlat.serve.async_engine import AsyncEngine
from lowlat.utils.errors import UserError
from tests import configs
from tests.fakes import byte_tokenizer, tiny_model

INDEXER = IndexerConfig(index_n_heads=3, index_head_dim=10, index_topk=24)
CONFIG = configs.byte_model_config("deepseek_v32", replace(configs.MLA, indexer=INDEXER))
needs_native = pytest.mark.skipif(not native.available(), reason="native kernels are not built")


def build(context: int | None, dtype: torch.dtype = torch.float32) -> Model:
    model = tiny_model(CONFIG, dtype=dtype)
    return Model(model, byte_tokenizer(), name="sparse", context=context)


def test_a_context_beyond_topk_is_not_served_in_pytorch() -> None:
    for context in (25, None):
        with pytest.raises(UserError, match="--max-context 24 or less") as caught:
            AsyncEngine(build(context))
        assert "\n" not in str(caught.value)


def test_an_odd_index_head_dim_is_refused_by_name() -> None:
    sizes = replace(INDEXER, index_head_dim=11)
    odd = configs.byte_model_config("lowlat", replace(configs.MLA, indexer=sizes))
    model = Model(tiny_model(odd, dtype=torch.bfloat16), byte_tokenizer(), name="odd")
    with pytest.raises(UserError, match=r"index_head_dim 11 is odd; serve it with --max-context"):
        AsyncEngine(model)


def test_a_context_up_to_topk_is_served() -> None:
    assert AsyncEngine(build(24)).model.cache_bytes_per_token == 2 * 19 * 4


def test_longer_contexts_complete_in_python() -> None:
    """The same tokens from a step per token and from chunks, and from the logits of the whole."""
    model = build(None)
    assert model.cache_bytes_per_token == 2 * (10 + 19) * 4
    prompt = [7 * place % 250 for place in range(40)]
    done = model.generate(prompt, max_tokens=9, temperature=0.0)
    assert not isinstance(done, list)
    logits = model.logits([*prompt, *done.token_ids])
    assert logits[39:-1].argmax(dim=-1).tolist() == list(done.token_ids)
    assert model.num_parameters == sum(p.numel() for p in model.transformer.parameters())


@needs_native
@pytest.mark.parametrize("context", [24, 25, None])
def test_native_kernels_run_every_context(context: int | None) -> None:
    """Without indexers they write no index keys."""
    model, reference = build(context, torch.bfloat16), build(context)
    assert model.runner.is_batch_invariant
    index_key = 12 + 4  # int8 in whole 4 bytes, and a scale
    bytes_per_token = 2 * (2 * 19 + index_key * (context != 24))
    assert AsyncEngine(model).model.cache_bytes_per_token == bytes_per_token
    prompt = [7 * place % 250 for place in range(context or 60)]
    found, wanted = model.logits(prompt), reference.logits(prompt)
    distance = (found - wanted).norm(dim=-1) / wanted.norm(dim=-1)
    assert distance.median() < 0.05
