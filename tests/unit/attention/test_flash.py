"""Fused attention is packed attention: the same outputs and gradients on every path."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lowlat.attention.base import AttentionBackend
from lowlat.attention.flash import FlashAttention
from lowlat.model.transformer import Transformer
from tests.lowlat_configs import EVERY, random_model
from tests.packed_attention import PackedAttention

LENGTHS = {"ragged": [1, 7, 7, 3, 1, 7], "equal": [11, 11], "one": [13], "ones": [1, 1, 1]}
Attend = Callable[[AttentionBackend, list[Tensor]], Tensor]


def draw(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return drawn.to(dtype).requires_grad_()


def compare(lengths: list[int], attend: Attend, inputs: list[Tensor], tolerance: float) -> None:
    """Outputs and gradients of all `inputs`, against packed attention in fp64."""
    wide = [x.detach().double().requires_grad_() for x in inputs]
    found = attend(FlashAttention(lengths), inputs)
    wanted = attend(PackedAttention(lengths), wide)
    assert found.dtype == inputs[0].dtype and found.shape == wanted.shape
    weight = draw(*found.shape, dtype=found.dtype, seed=9).detach()
    gradients = torch.autograd.grad(found, inputs, weight)
    expected = torch.autograd.grad(wanted, wide, weight.double())
    for mine, reference in zip([found, *gradients], [wanted, *expected], strict=True):
        scale = reference.abs().max().clamp(min=1)  # a window of 1 leaves queries without gradient
        assert (mine.double() - reference).abs().max() <= tolerance * scale


TOLERANCE = {torch.float64: 1e-12, torch.bfloat16: 3e-2}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("v_dim", [3, 7, 11])
def test_mla(lengths: list[int], v_dim: int, dtype: torch.dtype) -> None:
    """Values narrower than keys, as in DeepSeek-V3, and wider."""
    total = sum(lengths)
    shapes = [(total, 3, 5), (total, 3, 4), (total, 17), (3, 5, 13), (3, v_dim, 13)]
    inputs = [draw(*shape, dtype=dtype, seed=seed) for seed, shape in enumerate(shapes)]

    def attend(backend: AttentionBackend, x: list[Tensor]) -> Tensor:
        return backend.mla(0, x[0], x[1], x[2], x[3], x[4], 0.3)

    compare(lengths, attend, inputs, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("kv_heads", [1, 2, 6])
@pytest.mark.parametrize("window", [None, 1, 3, 7, 99])
def test_gqa(lengths: list[int], kv_heads: int, window: int | None, dtype: torch.dtype) -> None:
    """MHA, GQA and MQA, with windows within, of, and beyond the length of a sequence."""
    total = sum(lengths)
    shapes = [(total, 6, 5), (total, kv_heads, 5), (total, kv_heads, 5)]
    inputs = [draw(*shape, dtype=dtype, seed=seed) for seed, shape in enumerate(shapes)]

    def attend(backend: AttentionBackend, x: list[Tensor]) -> Tensor:
        return backend.gqa(0, x[0], x[1], x[2], 0.4, window)

    compare(lengths, attend, inputs, TOLERANCE[dtype])


@pytest.mark.parametrize("name", EVERY)
def test_models_of_every_attention(name: str) -> None:
    """Whole models over ragged sequences, gradients of every weight included."""
    lengths = LENGTHS["ragged"]
    config = EVERY[name]
    ids = torch.randint(config.vocab_size, (sum(lengths),))
    model = random_model(config, torch.float64)
    for key, parameter in model.named_parameters():
        parameter.requires_grad_(not key.endswith("e_score_correction_bias"))
    results = [run(model, ids, kind(lengths)) for kind in (FlashAttention, PackedAttention)]
    for found, wanted in zip(*results, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-10)


def run(
    model: Transformer, ids: Tensor, attention: FlashAttention | PackedAttention
) -> list[Tensor]:
    """Hidden states and gradients of the weights that they depend on."""
    model.zero_grad()
    hidden = model(ids, attention.positions(), attention)
    (hidden * torch.arange(hidden.numel()).view_as(hidden).cos()).sum().backward()
    return [hidden.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def test_sequences_are_blind_to_each_other_and_to_what_follows() -> None:
    lengths = LENGTHS["ragged"]
    inputs = [draw(26, heads, 5, dtype=torch.float64, seed=heads) for heads in (6, 2, 2)]
    before = FlashAttention(lengths).gqa(0, *inputs, 0.3, None)
    changed = [x.detach().clone() for x in inputs]
    for x in changed:
        x[10:15] = 99.0  # the end of the second sequence of seven
    after = FlashAttention(lengths).gqa(0, *changed, 0.3, None)
    assert torch.equal(after[:10], before[:10]) and torch.equal(after[15:], before[15:])
    assert not torch.equal(after[10:15], before[10:15])


def test_positions_start_at_zero_in_each_sequence() -> None:
    assert FlashAttention([2, 1, 3]).positions().tolist() == [0, 1, 0, 0, 1, 2]
