"""int8 entries: bytes by hand, errors below half a step, bf16 channels unchanged."""

import struct

import pytest
import torch

from lowlat.attention.int8_entry import entry_bytes, pack_entries, unpack_entries

from .draw import GQA, MLA


def test_bytes_by_hand() -> None:
    """Six int8 channels, two bytes of zeros, one scale, two channels in bf16."""
    row = torch.tensor([[127.0, -0.5, 1.5, 2.5, 0.0, -127.0, 1.0, -2.0]])
    packed = pack_entries(row, 6)
    expected = struct.pack("<6bxxf", 127, 0, 2, 2, 0, -127, 1.0) + b"\x80\x3f\x00\xc0"
    assert bytes(packed[0].tolist()) == expected


def test_each_64_channels_have_their_own_scale() -> None:
    """One large channel costs only its own group; the last group is cut short."""
    rows = torch.ones(1, 150)
    rows[0, 70] = 1000.0
    back = unpack_entries(pack_entries(rows, 150), 150, 150, torch.float32)
    torch.testing.assert_close(back[0, :64], torch.ones(64))
    torch.testing.assert_close(back[0, 128:], torch.ones(22))
    assert (back[0, 64:70] == 0).all() and abs(back[0, 70] - 1000) < 1e-3


@pytest.mark.parametrize("attention", [MLA(), MLA(kv_lora_rank=192), GQA(head_dim=40)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_errors(attention: object, dtype: torch.dtype) -> None:
    assert isinstance(attention, type(MLA()) | type(GQA()))
    rows = torch.randn(7, attention.entry_dim).to(dtype)
    split = attention.quantized_dim
    packed = pack_entries(rows, split)
    assert packed.shape == (7, entry_bytes(attention, torch.int8)) and packed.shape[1] % 4 == 0
    back = unpack_entries(packed, attention.entry_dim, split, torch.float32)
    assert torch.equal(back[:, split:], rows[:, split:].to(torch.bfloat16).float())
    for start in range(0, split, 64):
        group = slice(start, min(start + 64, split))
        exact = rows[:, group].float()
        step = exact.abs().amax(dim=1, keepdim=True) / 127
        assert ((back[:, group] - exact).abs() <= 0.5001 * step).all()


def test_zeros_and_what_is_not_finite() -> None:
    assert unpack_entries(pack_entries(torch.zeros(2, 70), 66), 70, 66, torch.float32).eq(0).all()
    rows = torch.zeros(1, 70)
    rows[0, 3] = torch.nan
    assert unpack_entries(pack_entries(rows, 66), 70, 66, torch.float32)[0, :64].isnan().all()


def test_rounds_once_to_the_requested_dtype() -> None:
    rows = torch.randn(5, 66)
    wide = unpack_entries(pack_entries(rows, 64), 66, 64, torch.float32)
    assert torch.equal(
        unpack_entries(pack_entries(rows, 64), 66, 64, torch.bfloat16), wide.to(torch.bfloat16)
    )
