"""int8 and int4: every place of the layout, nothing lost twice, GGUF's values kept."""

import itertools

import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf.quants import dequantize, quantize
from torch import Tensor

from lowlat.ops.quantized import (
    Int4Weight,
    Int8Weight,
    dequantize_int4,
    dequantize_int8,
    dequantize_rows,
    quantize_int4,
    quantize_int8,
    quantize_rows,
)

SHAPES = [(1, 1), (16, 32), (17, 33), (37, 77), (5, 96), (130, 31)]
KINDS = {
    "int8": (quantize_int8, dequantize_int8, Kind.Q8_0),
    "int4": (quantize_int4, dequantize_int4, Kind.Q4_1),
}


def test_int8_layout_by_hand() -> None:
    """Row 18, column 45: tile 1, row 2 of it; group 1, its column 13 = 4 * 3 + 2 * 0 + 1."""
    weight = torch.zeros(20, 50)
    weight[18, 45], weight[18, 32] = 63.5, -127.0
    packed = quantize_int8(weight)
    assert packed.weight.shape == (2, 2, 8, 16, 2, 2) and packed.weight_scale.shape == (2, 2, 16)
    assert packed.weight[1, 1, 3, 2, 1, 0] == 64 + 128 and packed.weight[1, 1, 0, 2, 0, 0] == 1
    assert (packed.weight != 128).sum() == 2
    assert packed.weight_scale[1, 1, 2] == 1 and packed.weight_scale.count_nonzero() == 1


def test_int4_layout_by_hand() -> None:
    """Row 18, columns 45, 41 and 43: in the group 13 = 8 + 4 + 1, 9 = 8 + 0 + 1 and, the high half
    of that byte, 11 = 9 + 2.
    """
    weight = torch.zeros(20, 50)
    weight[18, 32:] = 1.0
    weight[18, 45], weight[18, 41], weight[18, 43] = 16.0, 6.0, 8.0
    packed = quantize_int4(weight)
    assert packed.weight.shape == (2, 2, 4, 16, 2, 2)
    assert packed.weight[1, 1, 1, 2, 1, 1] == 15 and packed.weight[1, 1, 1, 2, 1, 0] == 5 + 7 * 16
    assert packed.weight.count_nonzero() == 2
    for numbers in (packed.weight_scale, packed.weight_minimum):
        assert numbers.shape == (2, 2, 16)
        assert numbers[1, 1, 2] == 1 and numbers.count_nonzero() == 1


def test_every_int8_weight_is_in_its_place() -> None:
    q = torch.randint(-126, 127, (37, 77))
    q[:, ::32] = -127
    packed = quantize_int8(q * 0.5)
    expected = torch.full_like(packed.weight, 128)
    for r, c in itertools.product(*map(range, q.shape)):
        step, byte, parity = c % 32 // 4, c % 4 // 2, c % 2
        expected[r // 16, c // 32, step, r % 16, parity, byte] = q[r, c] + 128
    assert torch.equal(packed.weight, expected)
    scale = packed.weight_scale.transpose(1, 2).flatten(0, 1)
    assert (scale[:37] == 0.5).all() and (scale[37:] == 0).all()


def test_every_int4_weight_is_in_its_place() -> None:
    q = torch.randint(0, 16, (37, 77))
    q[:, ::32], q[:, 1::32] = 0, 15
    packed = quantize_int4(q * 0.5 - 3)
    expected = torch.zeros_like(packed.weight)
    for r, c in itertools.product(*map(range, q.shape)):
        step, byte, half, parity = c % 32 // 8, c % 8 // 4, c % 4 // 2, c % 2
        expected[r // 16, c // 32, step, r % 16, parity, byte] += int(q[r, c]) << 4 * half
    assert torch.equal(packed.weight, expected)
    for numbers, value in ((packed.weight_scale, 0.5), (packed.weight_minimum, -3)):
        by_row = numbers.transpose(1, 2).flatten(0, 1)
        assert (by_row[:37] == value).all() and (by_row[37:] == 0).all()


def exact_int8(packed: Int8Weight) -> Tensor:
    """Values in fp64, padding included, place by place."""
    tiles, groups = packed.weight_scale.shape[:2]
    values = torch.empty(16 * tiles, 32 * groups, dtype=torch.float64)
    for place in itertools.product(*map(range, packed.weight.shape)):
        tile, group, step, row, parity, byte = place
        q, scale = int(packed.weight[place]) - 128, float(packed.weight_scale[tile, group, row])
        values[16 * tile + row, 32 * group + 4 * step + 2 * byte + parity] = scale * q
    return values


def exact_int4(packed: Int4Weight) -> Tensor:
    """As exact_int8: scale * q + minimum needs more bits than fp32 has."""
    tiles, groups = packed.weight_scale.shape[:2]
    values = torch.empty(16 * tiles, 32 * groups, dtype=torch.float64)
    for place in itertools.product(*map(range, packed.weight.shape)):
        tile, group, step, row, parity, byte = place
        scale, minimum = (float(numbers[tile, group, row]) for numbers in packed[1:])
        column = 32 * group + 8 * step + 4 * byte + parity
        for c, q in ((column, packed.weight[place] & 15), (column + 2, packed.weight[place] >> 4)):
            values[16 * tile + row, c] = scale * int(q) + minimum
    return values


@pytest.mark.parametrize("shape", [(17, 33), (5, 96)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_values_by_hand(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """One rounding to fp32, for scale * q is exact there, and one to the type."""
    weight = torch.randn(shape)
    int8, int4 = quantize_int8(weight), quantize_int4(weight)
    for found, exact in (
        (dequantize_int8(int8, *shape, dtype), exact_int8(int8)),
        (dequantize_int4(int4, *shape, dtype), exact_int4(int4)),
    ):
        expected = exact[: shape[0], : shape[1]].float().to(dtype)
        assert found.dtype == dtype and torch.equal(found, expected)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_errors_are_below_half_a_step(name: str, shape: tuple[int, int]) -> None:
    pack, unpack, _ = KINDS[name]
    weight = torch.randn(shape)
    error = (unpack(pack(weight), *shape) - weight).abs()
    groups = [part for row in weight.split(32, dim=1) for part in row]
    spread = {"int8": lambda g: g.abs().max() / 127, "int4": lambda g: (g.max() - g.min()) / 15}
    steps = torch.stack([spread[name](group) for group in groups]).view(-1, shape[0]).T
    step = steps.repeat_interleave(32, dim=1)[:, : shape[1]]
    # the scale is rounded to fp16: 127 or 15 times 2^-11 of a step more; so is the minimum
    worst = 0.5 + 127 * 2**-11 if name == "int8" else 0.5 + 15 * 2**-11
    assert (error <= worst * step + 2**-11 * weight.abs().max() * (name == "int4")).all()


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_packing_twice_is_packing_once(name: str, shape: tuple[int, int]) -> None:
    pack, unpack, _ = KINDS[name]
    first = pack(torch.randn(shape) * 0.3)
    second = pack(unpack(first, *shape))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("name", KINDS)
def test_values_of_gguf_files_are_kept(name: str) -> None:
    pack, unpack, kind = KINDS[name]
    blocks = quantize((torch.randn(48, 160) * 0.05).numpy(), kind)
    weight = torch.from_numpy(dequantize(blocks, kind))
    assert torch.equal(unpack(pack(weight), 48, 160), weight)


def test_what_fills_the_last_group_enters_no_minimum() -> None:
    """33 columns of values around 5: the last group is one column and exact."""
    weight = torch.full((3, 33), 5.0)
    weight[:, :32] += torch.randn(3, 32)
    packed = quantize_int4(weight)
    assert (dequantize_int4(packed, 3, 33)[:, 32] == 5).all()
    assert (packed.weight[:, 1] == 0).all()


def test_many_chunks_equal_one() -> None:
    """More rows than are quantised at a time; every tile comes out as it would alone."""
    weight = torch.randn(1040, 96)
    for pack in (quantize_int8, quantize_int4):
        whole, last = pack(weight), pack(weight[-16:])
        assert torch.equal(whole.weight[-1:], last.weight)
        assert torch.equal(whole.weight_scale[-1:], last.weight_scale)


@pytest.mark.parametrize("pack", [quantize_int8, quantize_int4, quantize_rows])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_does_not_fit_shows_in_the_scale(pack: object, value: float) -> None:
    weight = torch.randn(3, 40)
    weight[1, 35] = value
    assert callable(pack)
    assert not all(p.isfinite().all() for p in pack(weight) if p.is_floating_point())


def test_beyond_fp16() -> None:
    """int4 keeps minima, which fp16 ends at 65504; int8 only a 127th of the largest value."""
    weight = torch.tensor([[-70000.0, 1.0]])
    assert quantize_int4(weight).weight_minimum.isinf().any()
    assert quantize_int8(weight).weight_scale.isfinite().all()


def test_rows() -> None:
    weight = torch.tensor([[127.0, -63.4, 0.5], [0.0, 0.0, 0.0], [0.0, 3.0, -1.0]])
    packed = quantize_rows(weight)
    assert packed.weight.tolist() == [[127, -63, 0], [0, 0, 0], [0, 127, -42]]
    torch.testing.assert_close(packed.weight_scale, torch.tensor([1.0, 0.0, 3 / 127]))
    torch.testing.assert_close(dequantize_rows(packed)[2], torch.tensor([0.0, 3.0, -126 / 127]))


def test_ones_and_zeros_survive_in_rows() -> None:
    """kv_b_proj of exactly converted models picks channels."""
    weight = torch.eye(7, 11)
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(dequantize_rows(quantize_rows(weight), dtype), weight.to(dtype))


@pytest.mark.parametrize("pack", [quantize_int8, quantize_int4, quantize_rows])
def test_parameters_are_packed_without_their_gradient(pack: object) -> None:
    """A trained weight is packed as it is, outside of `torch.no_grad` too."""
    weight = torch.randn(17, 33)
    assert callable(pack)
    with torch.enable_grad():
        packed = pack(torch.nn.Parameter(weight))
    for part, expected in zip(packed, pack(weight), strict=True):
        assert not part.requires_grad and torch.equal(part, expected)
