"""Multi-token prediction: what goes in, in which order, and which layer it is."""

import pytest
import torch
from torch import Tensor

from lowlat.attention.cache import PagedCache
from lowlat.attention.cached import CachedAttention
from lowlat.attention.metadata import AttentionBatch, SequenceSlice
from lowlat.model.mla import MLA
from lowlat.model.moe import MoE
from lowlat.model.mtp import MTPModule
from lowlat.model.transformer import Transformer
from lowlat.ops.norm import rms_norm
from tests.packed_attention import PackedAttention

from .draw import mla_config, random_model

IDS = torch.tensor([7, 0, 3, 29, 11, 40, 2, 2, 19])
TOKENS = len(IDS)


def model_with(depths: int, **changes: object) -> Transformer:
    return random_model(mla_config(num_nextn_predict_layers=depths, **changes))


def module_of(model: Transformer, depth: int) -> MTPModule:
    module = model.mtp[depth]
    assert isinstance(module, MTPModule)
    return module


def hidden_states(model: Transformer) -> Tensor:
    backend = PackedAttention([TOKENS])
    return model(IDS, backend.positions(), backend)


def run(model: Transformer, depth: int, hidden: Tensor) -> Tensor:
    """Depth `depth` on the hidden states of the depth before, which are as many as have a token
    that far ahead.
    """
    count = TOKENS - depth - 1
    backend = PackedAttention([count])
    return model.mtp_hidden(depth, hidden[:count], IDS[depth + 1 :], backend.positions(), backend)


def test_written_out() -> None:
    """norm(block(eh_proj [enorm(embedding) ; hnorm(hidden)])), embedding first as in released
    weights.

    Regression: the paper's order of the concatenation, and hidden states that skip a norm.
    """
    model = model_with(1)
    module, hidden = module_of(model, 0), hidden_states(model)
    embedded = rms_norm(model.embed_tokens.weight[IDS[1:]], module.enorm.weight, 1e-5)
    carried = rms_norm(hidden[:-1], module.hnorm.weight, 1e-5)
    weight = module.eh_proj.weight
    joined = embedded @ weight[:, :23].T + carried @ weight[:, 23:].T
    backend = PackedAttention([TOKENS - 1])
    after = module.block(joined, model.rotary(backend.positions()), backend)
    expected = rms_norm(after, module.norm.weight, 1e-5)
    torch.testing.assert_close(run(model, 0, hidden), expected, rtol=0, atol=1e-12)


def test_main_hidden_states_come_after_the_final_norm() -> None:
    """`forward` returns what both `logits` and `mtp_hidden` take: states after the final norm.

    Regression: the raw residual stream handed to the first module.
    """
    model = model_with(1)
    stream = []
    model.layers[-1].register_forward_hook(lambda module, args, out: stream.append(out))
    hidden = hidden_states(model)
    expected = rms_norm(stream[0], model.norm.weight, 1e-5)
    torch.testing.assert_close(hidden, expected, rtol=0, atol=1e-12)
    assert model.lm_head is not None
    torch.testing.assert_close(model.logits(hidden), hidden @ model.lm_head.weight.T)


def test_position_zero_keeps_its_embedding() -> None:
    """Regression: the embedding at position 0 set to zero, as some runtimes do."""
    model = model_with(1)
    hidden = hidden_states(model)
    backend = PackedAttention([1])
    ahead = [torch.tensor([5]), torch.tensor([6])]
    first, second = (
        model.mtp_hidden(0, hidden[:1], ids, backend.positions(), backend) for ids in ahead
    )
    assert (first - second).abs().max() > 1e-2


def test_second_depth_takes_the_first_ones_output() -> None:
    model = model_with(2)
    first = run(model, 0, hidden_states(model))
    second = run(model, 1, first)
    assert second.shape == (TOKENS - 2, 23)
    module = module_of(model, 1)
    joined = torch.cat(
        [
            rms_norm(model.embed_tokens.weight[IDS[2:]], module.enorm.weight, 1e-5),
            rms_norm(first[:-1], module.hnorm.weight, 1e-5),
        ],
        dim=-1,
    )
    backend = PackedAttention([TOKENS - 2])
    after = module.block(module.eh_proj(joined), model.rotary(backend.positions()), backend)
    torch.testing.assert_close(
        second, rms_norm(after, module.norm.weight, 1e-5), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("layers", [2, 3])
def test_layer_numbers_follow_the_decoder_layers(layers: int) -> None:
    """Regression: a literal layer number, which would share a cache layer or build a dense MLP."""
    model = model_with(2, num_hidden_layers=layers)
    for depth in range(2):
        block = module_of(model, depth).block
        assert isinstance(block.self_attn, MLA) and block.self_attn.layer == layers + depth
        assert isinstance(block.mlp, MoE)


@pytest.mark.parametrize("chunks", [[8], [1] * 8, [3, 1, 4]])
def test_cached_equals_packed(chunks: list[int]) -> None:
    """The module has cache layers of its own; decoder layers' rows are not disturbed."""
    model = model_with(2)
    hidden = hidden_states(model)
    cache = PagedCache(model.config, num_pages=5, page_size=3, dtype=torch.float64)
    assert len(cache.layers) == 4
    outputs, start = [], 0
    for length in chunks:
        form = "expanded" if length > 2 else "absorbed"
        item = SequenceSlice(pages=(4, 0, 2), start=start, length=length, path=form)
        batch = AttentionBatch.build([item], page_size=3)
        backend = CachedAttention(cache, batch)
        own = slice(start, start + length)
        ahead = IDS[1:][own]
        outputs.append(model.mtp_hidden(0, hidden[own], ahead, batch.positions, backend))
        start += length
    torch.testing.assert_close(torch.cat(outputs), run(model, 0, hidden), rtol=0, atol=1e-10)
    used = [layer.count_nonzero().item() > 0 for layer in cache.layers]
    assert used == [False, False, True, False]


def test_shared_embedding_and_head() -> None:
    model = model_with(1)
    module = module_of(model, 0)
    assert module.embed_tokens is None and module.head is None
    hidden = torch.randn(2, 23).double()
    assert model.lm_head is not None
    torch.testing.assert_close(model.mtp_logits(0, hidden), hidden @ model.lm_head.weight.T)


def test_shared_head_of_a_tied_model() -> None:
    model = model_with(1, tie_word_embeddings=True)
    hidden = torch.randn(2, 23).double()
    expected = hidden @ model.embed_tokens.weight.T
    torch.testing.assert_close(model.mtp_logits(0, hidden), expected)


def test_own_copies_are_used() -> None:
    """A checkpoint's own copies may differ from the main model's."""
    model = model_with(1, mtp_copies=True)
    module, hidden = module_of(model, 0), hidden_states(model)
    assert module.embed_tokens is not None and module.head is not None
    scores = model.mtp_logits(0, hidden)
    torch.testing.assert_close(scores, hidden @ module.head.weight.T)
    before = run(model, 0, hidden)
    module.embed_tokens.weight += 1.0
    assert (run(model, 0, hidden) - before).abs().max() > 1e-3
