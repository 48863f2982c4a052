"""LoRA adapters of projections in PyTorch: the selected one's update, and no other."""

import torch

from lowlat.model.linear import Linear
from lowlat.model.lora import LoraLinear, LowRankUpdate, add_adapters
from lowlat.model.mla import MLA
from tests.fakes import mla_config, tiny_model
from tests.lora import drawn_updates


def drawn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_products_by_hand() -> None:
    linear = Linear(11, 7, bias=True, dtype=torch.float64)
    assert linear.bias is not None
    with torch.no_grad():
        linear.weight.copy_(drawn(7, 11, seed=1))
        linear.bias.copy_(drawn(7, seed=2))
    weight, bias = linear.weight.detach(), linear.bias.detach()
    updates = {n: LowRankUpdate(drawn(n, 11, seed=n), drawn(7, n, seed=9 + n)) for n in (2, 3)}
    root = torch.nn.ModuleDict({"proj": linear, "other": Linear(3, 5, dtype=torch.float64)})
    other = root["other"]
    selected = add_adapters(root, [{"proj": updates[2]}, {}, {"proj": updates[3]}])
    found = root["proj"]
    assert isinstance(found, LoraLinear) and found.weight is linear.weight
    assert root["other"] is other
    x = drawn(5, 11, seed=5)
    for number, rank in ((0, None), (1, 2), (2, None), (3, 3)):
        selected.lora_int_id = number
        delta = torch.zeros(7, 11, dtype=torch.float64)
        if rank is not None:
            delta = updates[rank].b @ updates[rank].a
        torch.testing.assert_close(found(x), x @ (weight + delta).T + bias)
        torch.testing.assert_close(found.dense_weight(torch.float64), weight + delta)


def test_up_projections_have_the_update_of_kv_b_proj() -> None:
    model = tiny_model(mla_config())
    updates = drawn_updates(model, rank=3, seed=1, names=("kv_b_proj",))
    selected = add_adapters(model, [updates])
    attention = model.layers[1].self_attn
    assert isinstance(attention, MLA)
    w_uk, w_uv = attention.up_projections(torch.float64)
    selected.lora_int_id = 1
    new_uk, new_uv = attention.up_projections(torch.float64)
    update = updates["layers.1.self_attn.kv_b_proj"]
    delta = (update.b @ update.a).unflatten(0, (len(w_uk), -1)).double()
    width = w_uk.shape[1]
    torch.testing.assert_close(new_uk - w_uk, delta[:, :width], rtol=0, atol=1e-6)
    torch.testing.assert_close(new_uv - w_uv, delta[:, width:], rtol=0, atol=1e-6)
