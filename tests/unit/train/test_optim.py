"""AdamW by hand, who decays, clipping, what Muon gets, and the state by name."""

import math

import pytest
import torch
from torch import Tensor, nn

from lowlat.train.recipe.schema import OptimizerConfig
from lowlat.train.step.optim import Optimizer

from . import tiny

RATE = 0.02


def set_gradients(model: nn.Module, seed: int, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            drawn = torch.randn(parameter.shape, generator=generator)
            parameter.grad = (scale * drawn).to(parameter.dtype)


def copies(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_adamw_by_hand() -> None:
    """Decoupled decay of matrices and stacks of matrices alone, bias correction, one clipping norm
    over everything (Loshchilov and Hutter, arXiv 1711.05101).
    """
    model = tiny.model(tiny.config(mtp_copies=True))
    table = OptimizerConfig(betas=(0.8, 0.9), eps=1e-3, weight_decay=0.1, max_grad_norm=1.0)
    optimizer = Optimizer(model, table, tiny.unsharded(model))
    expected = copies(model)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    first = {name: torch.zeros_like(expected[name]) for name in trained}
    second = {name: torch.zeros_like(expected[name]) for name in trained}
    for step in range(1, 4):
        set_gradients(model, step, scale=0.7)
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        norm = math.sqrt(sum(grad.square().sum().item() for grad in grads.values()))
        assert optimizer.step(RATE) == pytest.approx(norm, rel=1e-12)
        for name, grad in grads.items():
            grad = grad / (norm + 1e-6)
            first[name] = 0.8 * first[name] + 0.2 * grad
            second[name] = 0.9 * second[name] + 0.1 * grad**2
            mean, square = first[name] / (1 - 0.8**step), second[name] / (1 - 0.9**step)
            decay = 0.1 if expected[name].ndim > 1 else 0.0
            expected[name] = (1 - RATE * decay) * expected[name] - RATE * mean / (
                square.sqrt() + 1e-3
            )
    for name, found in copies(model).items():
        torch.testing.assert_close(found, expected[name], rtol=1e-12, atol=1e-14, msg=name)
    assert all(p.grad is None for p in model.parameters())
    vectors = [name for name in trained if expected[name].ndim == 1]
    assert vectors and all("norm" in name for name in vectors)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_small_gradients_are_not_clipped(name: str) -> None:
    """And max_grad_norm = 0 never clips."""
    found = []
    for clip in (0.0, 1.0, 1e-9):
        model = tiny.model(tiny.config())
        optimizer = Optimizer(
            model, OptimizerConfig(name=name, max_grad_norm=clip, eps=1.0), tiny.unsharded(model)
        )
        set_gradients(model, 1, scale=1e-3)
        assert optimizer.step(RATE) < 1.0
        found.append(copies(model))
    for key, unclipped in found[0].items():
        assert torch.equal(unclipped, found[1][key])
    # Muon's update has one size whatever the gradient's: only AdamW's part tells.
    assert not torch.equal(found[0]["embed_tokens.weight"], found[2]["embed_tokens.weight"])


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_gradients_that_are_not_finite_move_nothing(name: str, value: float) -> None:
    model = tiny.model(tiny.config())
    optimizer = Optimizer(model, OptimizerConfig(name=name), tiny.unsharded(model))
    set_gradients(model, 1)
    optimizer.step(RATE)
    weights = copies(model)
    state = {key: tensor.clone() for key, tensor in optimizer.tensors()}
    set_gradients(model, 2)
    gradient = model.layers[1].mlp.experts.down_proj.grad
    gradient[1, 2, 3] = value
    assert not math.isfinite(optimizer.step(RATE))
    assert all(torch.equal(weights[n], tensor) for n, tensor in copies(model).items())
    after = dict(optimizer.tensors())
    assert after.keys() == state.keys()
    assert all(torch.equal(after[key], tensor) for key, tensor in state.items())
    assert all(p.grad is None for p in model.parameters())


def test_who_gets_muon() -> None:
    """Hidden matrices and experts; AdamW keeps what faces tokens or experts, and all vectors."""
    model = tiny.model(tiny.config(num_nextn_predict_layers=1, mtp_copies=True))
    optimizer = Optimizer(model, OptimizerConfig(name="muon"), tiny.unsharded(model))
    set_gradients(model, 1)
    optimizer.step(RATE)
    keys = [key for key, _ in optimizer.tensors()]
    muon = {key.removeprefix("momentum.") for key in keys if key.startswith("momentum.")}
    adamw = {key.removeprefix("exp_avg.") for key in keys if key.startswith("exp_avg.")}
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert muon | adamw == names and not muon & adamw
    ends = ("embed_tokens.weight", "lm_head.weight", "head.weight", "gate.weight")
    assert adamw == {name for name in names if "norm" in name or name.endswith(ends)}
    assert {"mtp.0.eh_proj.weight", "layers.1.mlp.experts.gate_up_proj"} <= muon


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_state_is_restored(name: str, dtype: torch.dtype) -> None:
    """A new optimiser with the state of an old one takes the same steps, bit for bit."""
    changes = {"tie_word_embeddings": True, "num_nextn_predict_layers": 1}
    one, other = (tiny.model(tiny.config(**changes), dtype) for _ in range(2))
    table = OptimizerConfig(name=name)
    whole = Optimizer(one, table, tiny.unsharded(one))
    assert list(whole.tensors()) == []
    for seed in (1, 2):
        set_gradients(one, seed)
        whole.step(RATE)
    saved = {key: tensor.clone() for key, tensor in whole.tensors()}
    other.load_state_dict(one.state_dict())
    resumed = Optimizer(other, table, tiny.unsharded(other))
    resumed.load(dict(saved))
    for model, optimizer in ((one, whole), (other, resumed)):
        for seed in (3, 4):
            set_gradients(model, seed)
            optimizer.step(RATE)
    left, right = copies(one), copies(other)
    assert all(torch.equal(left[key], right[key]) for key in left)
    after = dict(resumed.tensors())
    assert all(torch.equal(after[key], tensor) for key, tensor in whole.tensors())
    # What was loaded is the optimiser's own: the saved tensors are as they were.
    set_gradients(other, 5)
    assert not torch.equal(saved["exp_avg.norm.weight"], after["exp_avg.norm.weight"])


def test_muon_knows_gate_from_up() -> None:
    """The update of a stack's gate rows does not depend on the gradient of its up rows."""
    found = []
    for scale in (1.0, 5.0):
        model = tiny.model(tiny.config())
        optimizer = Optimizer(
            model, OptimizerConfig(name="muon", max_grad_norm=0.0), tiny.unsharded(model)
        )
        set_gradients(model, 1)
        stack = model.layers[1].mlp.experts.gate_up_proj
        inner = stack.shape[1] // 2
        stack.grad[:, inner:] *= scale
        optimizer.step(RATE)
        found.append(stack.detach()[:, :inner].clone())
    assert torch.equal(*found)
