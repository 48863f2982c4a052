"""Tied rows as keys and values, and as the latent attention that the kernels make of them."""

import pytest
import torch

from lowlat.ops.gta import TiedLayout, selectors
from lowlat.ops.mla import absorbed_mla, expanded_mla

LAYOUT = TiedLayout(groups=3, head_dim=7)


def test_a_row_by_hand() -> None:
    row = torch.arange(23.0)[None]
    keys, values = LAYOUT.expand(row)
    assert keys[0].tolist() == [
        [0, 1, 2, 3, 4, 21, 22],
        [7, 8, 9, 10, 11, 21, 22],
        [14, 15, 16, 17, 18, 21, 22],
    ]
    assert torch.equal(values[0], row[0, :21].view(3, 7))


@pytest.mark.parametrize("form", [absorbed_mla, expanded_mla])
def test_it_is_latent_attention_with_selectors(form) -> None:
    """What the native kernels rest on."""
    q = torch.randn(4, 6, 7, dtype=torch.float64)
    rows = torch.randn(11, 23, dtype=torch.float64)
    w_uk, w_uv = selectors(6, 3, 7, 5, torch.float64)
    assert w_uk.shape == (6, 5, 21) and w_uv.shape == (6, 7, 21)
    expected = LAYOUT.attend(q, rows, start=7, scale=0.3)
    found = form(q[..., :5], q[..., 5:], rows, w_uk, w_uv, start=7, scale=0.3)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
