"""fp8 blocks with ragged edges."""

import pytest
import torch

from lowlat.ops.fp8 import FP8_MAX, dequantize_blocks, quantize_blocks

BLOCK = (128, 128)


def test_dequantize_by_hand() -> None:
    weight = torch.tensor([[1.0, -2.0, 3.0], [0.5, 4.0, -6.0], [7.0, 8.0, 9.0]]).to(
        torch.float8_e4m3fn
    )
    scale = torch.tensor([[10.0, 100.0], [0.5, 2.0]])
    out = dequantize_blocks(weight, scale, (2, 2), torch.float32)
    assert out.tolist() == [[10.0, -20.0, 300.0], [5.0, 40.0, -600.0], [3.5, 4.0, 18.0]]


def test_576_rows_are_four_and_a_half_blocks() -> None:
    """kv_a_proj_with_mqa of DeepSeek-V3 has 576 rows: the grid is ceil(4.5) = 5, and rows 512..
    use block 4.

    Regression: a floor grid for partial blocks.
    """
    weight = torch.randn(576, 200)
    quantized, scale = quantize_blocks(weight, BLOCK)
    assert quantized.shape == (576, 200) and quantized.dtype == torch.float8_e4m3fn
    assert scale.shape == (5, 2) and scale.dtype == torch.float32
    torch.testing.assert_close(scale[4, 1], weight[512:, 128:].abs().max() / FP8_MAX)
    back = dequantize_blocks(quantized, scale, BLOCK, torch.float32)
    assert back.shape == (576, 200)
    # e4m3 keeps 3 bits of mantissa: half a step is 1/16 of the value, or of the smallest normal
    # number
    assert ((back - weight).abs() <= weight.abs() / 16 + 2.0**-10 * scale.max()).all()


def test_every_row_reads_its_own_block() -> None:
    scale = torch.arange(1.0, 11.0).view(5, 2)
    ones = torch.ones(576, 131).to(torch.float8_e4m3fn)
    out = dequantize_blocks(ones, scale, BLOCK, torch.float32)
    for row, column in [(0, 0), (127, 127), (128, 128), (511, 130), (512, 0), (575, 130)]:
        assert out[row, column] == scale[row // 128, column // 128]


@pytest.mark.parametrize("shape", [(5, 7), (129, 131), (128, 1), (257, 128)])
def test_padding_enters_no_maximum(shape: tuple[int, int]) -> None:
    """Every block of small weights, the ragged ones too, is scaled by its own largest magnitude.

    Regression: padding that takes part in the maximum.
    """
    weight = torch.rand(shape) * 1e-3 + 1e-4
    quantized, scale = quantize_blocks(weight, BLOCK)
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            own = weight[i * 128 : (i + 1) * 128, j * 128 : (j + 1) * 128]
            assert scale[i, j].item() == pytest.approx(own.abs().max().item() / FP8_MAX)
    assert quantized.float().max() == FP8_MAX


def test_zero_block() -> None:
    """An all-zero block gets scale 1, not a division by zero."""
    weight = torch.zeros(130, 130)
    weight[129, 129] = -3.0
    quantized, scale = quantize_blocks(weight, BLOCK)
    torch.testing.assert_close(scale, torch.tensor([[1.0, 1.0], [1.0, 3.0 / FP8_MAX]]))
    torch.testing.assert_close(dequantize_blocks(quantized, scale, BLOCK, torch.float32), weight)


def test_ue8m0_scales_are_powers_of_two_rounded_up() -> None:
    weight = torch.tensor([[FP8_MAX * 1.5, FP8_MAX * 4.0, FP8_MAX * 0.25]])
    quantized, scale = quantize_blocks(weight, (1, 1), "ue8m0")
    assert scale.tolist() == [[2.0, 4.0, 0.25]]
    # Exact powers: 336 = 448 * 1.5 / 2 is not an e4m3 number, its neighbours are 320 and 352
    assert quantized.float().tolist() == [[320.0, FP8_MAX, FP8_MAX]]


def test_bf16_weights_survive_a_round_trip_of_their_fp8_values() -> None:
    """Numbers that are fp8 times a power of two come back bit for bit."""
    fp8 = torch.randn(131, 37).to(torch.float8_e4m3fn)
    fp8[0, 0] = FP8_MAX
    fp8[128, 0] = -FP8_MAX
    weight = fp8.float() * 2.0**-7
    quantized, scale = quantize_blocks(weight, BLOCK)
    assert torch.equal(dequantize_blocks(quantized, scale, BLOCK, torch.float32), weight)


def test_rounds_once_to_a_narrow_type() -> None:
    weight, scale = torch.randn(5, 5).to(torch.float8_e4m3fn), torch.rand(1, 1)
    wide = weight.double() * scale.double()
    assert torch.equal(
        dequantize_blocks(weight, scale, BLOCK, torch.bfloat16), wide.to(torch.bfloat16)
    )
