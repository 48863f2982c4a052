"""GTA against its definition: one state per group is value and, half of it, key."""

from dataclasses import replace

import pytest
import torch

from lowlat.model.gta import GTA as Module
from lowlat.ops.rope import apply_rope
from tests.lowlat_configs import GTA

from .draw import attention_case


@pytest.mark.parametrize("groups", [1, 2, 3, 6])
@pytest.mark.parametrize("interleave", [True, False])
def test_naive(groups: int, interleave: bool) -> None:
    attention = replace(GTA, num_key_value_heads=groups)
    module, x, packed, rope = attention_case(attention, interleave=interleave)
    assert isinstance(module, Module)
    q = (x @ module.q_proj.weight.T).view(17, 6, 10)
    states = (x @ module.kv_proj_with_mqa.weight.T)[:, : 10 * groups].view(17, groups, 10)
    shared = (x @ module.kv_proj_with_mqa.weight.T)[:, None, 10 * groups :]
    shared = apply_rope(shared, rope, interleave=interleave)[:, 0]
    seen = torch.ones(17, 17, dtype=torch.bool).tril()
    outputs = []
    for head in range(6):
        state = states[:, head // (6 // groups)]
        key = torch.cat([state[:, :6], shared], dim=1)
        turned = apply_rope(q[:, head, None, 6:], rope, interleave=interleave)[:, 0]
        scores = torch.cat([q[:, head, :6], turned], dim=1) @ key.T / 10**0.5
        outputs.append(scores.masked_fill(~seen, float("-inf")).softmax(dim=1) @ state)
    expected = torch.cat(outputs, dim=1) @ module.o_proj.weight.T
    torch.testing.assert_close(module(x, rope, packed), expected, rtol=0, atol=1e-12)


def test_the_cache_holds_each_state_once() -> None:
    """Half of GQA's [K ; V], and one rotated key."""
    assert GTA.entry_dim == 3 * 10 + 4
    assert GTA.quantized_dim == 30 and GTA.rope_dim == 4
