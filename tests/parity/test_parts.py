"""Part by part against transformers: rotary tables, gate, attention, mixture, decoder layer."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from lowlat.checkpoint.load import load_model
from lowlat.config.hf.reader import config_from_hf
from lowlat.model.block import DecoderLayer
from lowlat.model.moe import MoE
from lowlat.model.transformer import Transformer
from lowlat.ops.rope import RotaryEmbedding
from tests.packed_attention import PackedAttention

from .draw import MLA_FAMILIES, Case, all_cases
from .oracle import Oracle, build, lowest_position_wins, save

TOKENS = 19
ALL = all_cases()
SOME = [case for case in ALL if int(case.name.rpartition("-")[2]) in (1, 2, 3)]
MIXTURES = [case for case in SOME if case.family in MLA_FAMILIES]


def both(case: Case, folder: Path) -> tuple[Oracle, Transformer]:
    oracle = build(case)
    save(oracle, folder)
    return oracle, load_model(folder).model


def states(case: Case) -> tuple[Tensor, Tensor]:
    """Hidden states and the positions they stand at."""
    generator = torch.Generator().manual_seed(case.seed + 2)
    x = torch.randn(TOKENS, case.config.hidden_size, generator=generator)
    return x, torch.arange(case.start, case.start + TOKENS)


def causal_mask(window: int | None) -> Tensor:
    place = torch.arange(TOKENS)
    seen = place[None, :] <= place[:, None]
    if window is not None:
        seen &= place[None, :] > place[:, None] - window
    return torch.zeros(1, 1, TOKENS, TOKENS).masked_fill(~seen, torch.finfo(torch.float32).min)


@pytest.mark.parametrize("case", ALL, ids=lambda case: case.name)
def test_rotary_tables_to_the_bit(case: Case) -> None:
    """At position 59,999 one bit of a frequency is a visible angle."""
    oracle = build(case).model.get_decoder().rotary_emb
    raw = case.config.to_dict() | {"model_type": case.family}
    for name in ("mtp_mlp_layer_types", "mtp_layer_types"):
        raw.pop(name, None)
    config = config_from_hf(raw)
    positions = torch.tensor([0, 1, 2, 511, 4096, 7001, 59_999, 163_839])
    rope = config.rope.for_context(int(positions[-1]) + 1)
    tables = RotaryEmbedding(rope, config.attention_of(0).rope_dim)
    cos, sin, _ = tables(positions)
    reference = oracle(torch.zeros(1), positions[None])
    assert torch.equal(tables.inverse, oracle.inv_freq)
    if case.family == "deepseek_v2":
        # torch.polar has a cosine of its own
        torch.testing.assert_close(cos, reference[0].real, rtol=0, atol=1e-6)
        torch.testing.assert_close(sin, reference[0].imag, rtol=0, atol=1e-6)
        return
    pairs = tables.inverse.numel()
    assert torch.equal(cos, reference[0][0, :, :pairs])
    assert torch.equal(sin, reference[1][0, :, :pairs])


@torch.no_grad()
@pytest.mark.parametrize("case", MIXTURES, ids=lambda case: case.name)
def test_gate_and_mixture(case: Case, tmp_path: Path) -> None:
    oracle, model = both(case, tmp_path)
    x, _ = states(case)
    compared = 0
    for theirs, ours in zip(oracle.model.get_decoder().layers, model.layers, strict=True):
        assert isinstance(ours, DecoderLayer)
        if isinstance(ours.mlp, MoE):
            logits, weights, experts = theirs.mlp.gate(x)
            routing = ours.mlp.gate(x)
            order = experts.argsort(dim=-1)
            own = routing.experts.argsort(dim=-1)
            assert torch.equal(routing.experts.gather(1, own), experts.gather(1, order))
            mine = routing.weights.gather(1, own)
            torch.testing.assert_close(mine, weights.gather(1, order), rtol=1e-5, atol=1e-6)
            sigmoid = case.family not in ("deepseek_v2", "mistral4")
            scores = logits.sigmoid() if sigmoid else logits.softmax(-1)
            torch.testing.assert_close(routing.scores, scores, rtol=1e-5, atol=1e-6)
            compared += 1
        reference = theirs.mlp(x[None])[0]
        torch.testing.assert_close(ours.mlp(x), reference, rtol=0, atol=1e-5)
    assert compared == sum(isinstance(layer.mlp, MoE) for layer in model.layers)


@torch.no_grad()
@pytest.mark.parametrize("case", SOME, ids=lambda case: case.name)
def test_attention_and_block(case: Case, tmp_path: Path) -> None:
    """The layer's attention alone, then the whole layer, on the same hidden states."""
    oracle, model = both(case, tmp_path)
    x, positions = states(case)
    model.set_context(int(positions[-1]) + 1)
    place = {"position_ids": positions[None]}
    decoder = oracle.model.get_decoder()
    rope = decoder.rotary_emb(x[None], positions[None])
    backend, tables = PackedAttention([TOKENS]), model.rotary(positions)
    for number, (theirs, ours) in enumerate(zip(decoder.layers, model.layers, strict=True)):
        assert isinstance(ours, DecoderLayer)
        mask = causal_mask(model.config.window(number))
        given = {"position_embeddings": rope, "attention_mask": mask, **place}
        with lowest_position_wins():
            whole = theirs(x[None], **given)
            reference, _, *choice = theirs.self_attn(hidden_states=x[None], **given)
        whole = whole[0] if choice else whole
        torch.testing.assert_close(ours(x, tables, backend), whole[0], rtol=0, atol=2e-5)
        mine = ours.self_attn(x, tables, backend)
        torch.testing.assert_close(mine, reference[0], rtol=0, atol=2e-5)
        if choice:  # of glm_moe_dsa, whose next layer may share it
            (place["prev_topk_indices"],) = choice
