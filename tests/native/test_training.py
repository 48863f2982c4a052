"""What training computes: the native kernels at every level, and the functions' gradients, against
plain PyTorch.
"""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from lowlat.ops import native, native_training_kernels
from lowlat.ops.autograd import gated_backward, rms_norm, swiglu
from lowlat.ops.cross_entropy import linear_cross_entropy
from lowlat.ops.experts import routed_experts
from lowlat.ops.experts import swiglu as plain_swiglu
from lowlat.ops.grouped import group_by_expert, stacked_experts
from lowlat.ops.norm import rms_norm as plain_rms_norm
from lowlat.ops.rope import RotaryTable, apply_rope
from lowlat.ops.routing import Routing, route
from tests import configs

LEVELS = native.levels() or [pytest.param("", marks=pytest.mark.skip("no native kernels"))]
DTYPES = (torch.bfloat16, torch.float32)
TOLERANCE = {torch.bfloat16: 1.6e-2, torch.float32: 2e-5, torch.float64: 1e-11}
SIZES = [(1, 1), (67, 7), (129, 31), (5, 48), (131, 257)]


def draw(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def close(a: Tensor, b: Tensor, dtype: torch.dtype) -> None:
    assert a.shape == b.shape
    if a.numel() == 0:
        return
    scale = b.double().abs().max().clamp(min=1e-3)
    error = (a.double() - b.double()).abs().max() / scale
    assert error <= TOLERANCE[dtype], f"{error:.2e}"


def norm_gradients(x: Tensor, weight: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """From autograd, in fp64."""
    x, weight = (t.double().requires_grad_() for t in (x, weight))
    plain_rms_norm(x, weight, 1e-3).backward(grad.double())
    assert x.grad is not None and weight.grad is not None
    return x.grad, weight.grad


@pytest.mark.parametrize("level", LEVELS, indirect=True)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "dim"), SIZES)
def test_native_norm(level: str, dtype: torch.dtype, rows: int, dim: int) -> None:
    x, grad = draw(rows, dim, dtype=dtype), draw(rows, dim, dtype=dtype, seed=1)
    weight = draw(dim, dtype=torch.float32, seed=2)
    out, inverse = native_training_kernels.norm_forward(x, weight, 1e-3)
    close(out, plain_rms_norm(x, weight, 1e-3), dtype)
    grads = native_training_kernels.norm_backward(x, weight, inverse, grad)
    for found, wanted in zip(grads, norm_gradients(x, weight, grad), strict=True):
        close(found, wanted, dtype)


@pytest.mark.parametrize("level", LEVELS, indirect=True)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "dim"), SIZES)
@pytest.mark.parametrize("has_factors", [True, False])
def test_native_gated(
    level: str, dtype: torch.dtype, rows: int, dim: int, has_factors: bool
) -> None:
    gate_up, grad = draw(rows, 2 * dim, dtype=dtype), draw(rows, dim, dtype=dtype, seed=1)
    factors = draw(rows, dtype=torch.float32, seed=2) if has_factors else None
    gate, up = gate_up.chunk(2, dim=1)
    close(native_training_kernels.gated_forward(gate, up), plain_swiglu(gate, up), dtype)
    found = native_training_kernels.gated_backward(gate_up, grad, factors)
    wanted = gated_backward(gate_up.double(), grad.double(), factors)
    for left, right in zip(found, wanted, strict=True):
        if left is not None and right is not None:
            close(left, right, dtype)
    assert (found[2] is None) == (factors is None)


@pytest.mark.parametrize("level", LEVELS, indirect=True)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "dim"), SIZES)
def test_native_gradients_of_gate_and_up_apart(
    level: str, dtype: torch.dtype, rows: int, dim: int
) -> None:
    """The bits of gradients that are columns of one tensor."""
    gate, up, grad = (draw(rows, dim, dtype=dtype, seed=seed) for seed in range(3))
    found = native_training_kernels.gated_gradients(gate, up, grad)
    _, wanted, _ = native_training_kernels.gated_backward(torch.cat([gate, up], dim=1), grad, None)
    assert torch.equal(torch.cat(found, dim=1), wanted)


@pytest.mark.parametrize("level", LEVELS, indirect=True)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleave", [True, False])
@pytest.mark.parametrize(("tokens", "heads", "dim"), [(1, 1, 2), (5, 3, 14), (37, 2, 64)])
def test_native_rotation_has_the_bits_of_the_plain_one(
    level: str, dtype: torch.dtype, interleave: bool, tokens: int, heads: int, dim: int
) -> None:
    """Forward and, against autograd, backward; x, tables and gradient columns of wider tensors."""
    wide = draw(tokens, heads, dim + 3, dtype=dtype)
    tables = draw(tokens, dim + 5, dtype=torch.float32, seed=1)
    cos, sin = tables[:, 2 : 2 + dim // 2], tables[:, 5 + dim // 2 : 5 + dim]
    grad = draw(tokens, heads, dim + 1, dtype=dtype, seed=2)[..., 1:]
    x = wide[..., 3:].detach().requires_grad_()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native_training_kernels, "usable", lambda *tensors: False)
        wanted = apply_rope(x, RotaryTable(cos, sin), interleave=interleave)
    wanted.backward(grad)
    found = native_training_kernels.rotation(x, cos, sin, interleave=interleave)
    assert torch.equal(found, wanted)
    back = native_training_kernels.rotation(grad, cos, sin, interleave=interleave, is_inverse=True)
    assert x.grad is not None
    close(back, x.grad, dtype)


@pytest.mark.parametrize("level", LEVELS, indirect=True)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "vocab"), SIZES)
@pytest.mark.parametrize("nll_weight", [0.0, 0.7])
def test_native_divergence(
    level: str, dtype: torch.dtype, rows: int, vocab: int, nll_weight: float
) -> None:
    logits, taught = 4 * draw(rows, vocab, dtype=dtype), 4 * draw(rows, vocab, dtype=dtype, seed=1)
    targets = torch.arange(rows) % vocab
    counted = torch.arange(rows) % 3 != 1
    wide = logits.double().requires_grad_()
    log_p, log_q = taught.double().log_softmax(1), wide.log_softmax(1)
    kl = (log_p.exp() * (log_p - log_q)).sum(1) * counted
    nll = F.cross_entropy(wide, targets, reduction="none") * counted
    (kl + nll_weight * nll).sum().backward()
    given, before = (logits, taught, targets, counted, nll_weight), logits.clone()
    plain = native_training_kernels.divergence(*given, wants_gradient=False)
    assert torch.equal(logits, before)
    found = native_training_kernels.divergence(*given, wants_gradient=True)
    for left, again, right in zip(found, plain, (kl, nll), strict=True):
        assert torch.equal(left, again)
        torch.testing.assert_close(left.double(), right.detach(), rtol=1e-5, atol=1e-5)
    assert wide.grad is not None
    close(logits, wide.grad, dtype)


@pytest.mark.parametrize("level", LEVELS, indirect=True)
def test_native_divergence_hides_no_nan(level: str) -> None:
    """Of the student or the teacher, wherever in a row; other rows know nothing of it."""
    for at in (0, 20, 36):
        for which in (0, 1):
            pair = [draw(3, 37, dtype=torch.float32, seed=seed) for seed in (0, 1)]
            pair[which][1, at] = torch.nan
            given = *pair, torch.arange(3), torch.ones(3, dtype=torch.bool), 0.0
            kl, _ = native_training_kernels.divergence(*given, wants_gradient=False)
            assert kl.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("level", LEVELS, indirect=True)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "vocab"), SIZES)
def test_native_entropy(level: str, dtype: torch.dtype, rows: int, vocab: int) -> None:
    logits = 9 * draw(rows, vocab, dtype=dtype)
    targets = torch.arange(rows) % vocab
    counted = torch.arange(rows) % 3 != 1
    wide = logits.double().requires_grad_()
    nll = F.cross_entropy(wide, targets, reduction="none") * counted
    z = wide.logsumexp(dim=1).square() * counted
    (nll + 0.01 * z).sum().backward()
    found = native_training_kernels.entropy(logits, targets, counted, 0.01)
    for left, right in zip(found, (nll, z), strict=True):
        torch.testing.assert_close(left.double(), right.detach(), rtol=1e-5, atol=1e-5)
    assert wide.grad is not None
    close(logits, wide.grad, dtype)


@pytest.mark.parametrize("level", LEVELS, indirect=True)
@pytest.mark.parametrize("dtype", DTYPES)
def test_native_combine(level: str, dtype: torch.dtype) -> None:
    rows, factors = draw(11, 37, dtype=dtype), draw(11, dtype=torch.float32, seed=1)
    places = torch.tensor([[0, 3, 10], [7, 2, 7]])
    found = native_training_kernels.combine(rows, factors, places)
    close(found, (rows.double() * factors[:, None])[places].sum(dim=1), dtype)
    found = native_training_kernels.combine(rows, None, places)
    close(found, rows.double()[places].sum(dim=1), dtype)


@pytest.mark.skipif(not native.available(), reason="no native kernels")
def test_native_norm_has_the_same_bits_on_any_number_of_threads() -> None:
    x, grad = draw(301, 45, dtype=torch.float32), draw(301, 45, dtype=torch.float32, seed=1)
    weight, module = torch.ones(45), native.module()
    before, found = module.threads(), []
    try:
        for threads in (1, 2, 3):
            module.set_threads(threads)
            _, inverse = native_training_kernels.norm_forward(x, weight, 1e-6)
            found.append(native_training_kernels.norm_backward(x, weight, inverse, grad))
    finally:
        module.set_threads(before)
    assert all(torch.equal(a[i], found[0][i]) for a in found for i in (0, 1))


@pytest.mark.skipif(not native.available(), reason="no native kernels")
def test_native_refuses_targets_and_places_outside() -> None:
    for target in (-1, 5):
        with pytest.raises(ValueError, match="targets"):
            native_training_kernels.entropy(
                torch.zeros(1, 5), torch.tensor([target]), torch.tensor([True]), 0.0
            )
    with pytest.raises(ValueError, match="places"):
        native_training_kernels.combine(torch.zeros(2, 3), None, torch.tensor([[0, 2]]))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_differentiable_functions_have_the_gradients_of_their_definitions(
    dtype: torch.dtype,
) -> None:
    x, y = draw(13, 5, 17, dtype=dtype), draw(13, 5, 17, dtype=dtype, seed=1)
    weight = draw(17, dtype=torch.float32, seed=2).to(torch.promote_types(dtype, torch.float32))

    def gradients(norm, gated, *inputs: Tensor) -> list[Tensor]:
        a, b, w = (t.clone().requires_grad_() for t in inputs)
        out = gated(norm(a, w, 1e-5), b)
        out.backward(draw(*out.shape, dtype=out.dtype, seed=3))
        return [t.grad for t in (a, b, w) if t.grad is not None]

    found = gradients(rms_norm, swiglu, x, y, weight)
    wide = gradients(plain_rms_norm, plain_swiglu, *(t.double() for t in (x, y, weight)))
    for left, right in zip(found, wide, strict=True):
        assert left.shape == right.shape
        close(left, right, dtype)


MOE = replace(configs.MOE, n_routed_experts=6, n_group=2, topk_group=2)


def experts_loss(
    x: Tensor, gate: Tensor, gate_up: Tensor, down: Tensor, *, stacked: bool
) -> Tensor:
    bias = torch.tensor([0.3, -9.0, 0.1, -0.2, 0.4, 0.0])  # no token chooses expert 1
    routing = route(x, gate, bias.to(gate.dtype), MOE)
    if stacked:
        out = stacked_experts(x, routing, gate_up, down)
    else:

        def expert(e: int, rows: Tensor) -> Tensor:
            g, u = (rows @ gate_up[e].T).chunk(2, dim=1)
            return plain_swiglu(g, u) @ down[e].T

        out = routed_experts(x, routing, expert)
    return (out * torch.arange(out.numel()).view_as(out).cos()).sum()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_stacked_experts_and_their_gradients(dtype: torch.dtype) -> None:
    shapes = [(19, 7), (6, 7), (6, 22, 7), (6, 7, 11)]
    inputs = [draw(*shape, dtype=dtype, seed=i) for i, shape in enumerate(shapes)]
    results = []
    for stacked in (True, False):
        leaves = [t.clone().requires_grad_() for t in inputs]
        loss = experts_loss(*leaves, stacked=stacked)
        loss.backward()
        results.append([loss.detach(), *(t.grad for t in leaves)])
    for found, wanted in zip(*results, strict=True):
        assert found is not None and wanted is not None
        close(found, wanted, dtype)
    assert torch.count_nonzero(results[0][3][1]) == 0
    assert torch.count_nonzero(results[0][3][0]) > 0


def test_bf16_products_of_fp32_weights_give_fp32_gradients() -> None:
    x = draw(19, 7, dtype=torch.bfloat16).requires_grad_()
    gate_up, down = (
        draw(*s, dtype=torch.float32).requires_grad_() for s in ((6, 22, 7), (6, 7, 11))
    )
    routing = route(x, draw(6, 7, dtype=torch.float32), None, MOE)
    stacked_experts(x, routing, gate_up, down).sum().backward()
    assert gate_up.grad is not None and gate_up.grad.dtype == torch.float32
    assert x.grad is not None and x.grad.dtype == torch.bfloat16


def test_groups_fill_up_each_expert() -> None:
    experts = torch.tensor([[2, 0], [0, 3], [0, 2]])
    groups = group_by_expert(experts, 4, unit=4)
    assert groups.counts == [4, 0, 4, 4]
    assert groups.rows.tolist() == [0, 1, 2, 4, 5, 8]
    assert groups.tokens.tolist() == [0, 1, 2, 0, 0, 2, 0, 0, 1, 0, 0, 0]


def test_padding_rows_have_no_effect_on_gradients() -> None:
    """Regression: padding rows of token 0 that are counted."""
    x = draw(3, 7, dtype=torch.float64)
    experts = torch.tensor([[1], [1], [1]])
    weights = torch.ones(3, 1, dtype=torch.float64, requires_grad=True)
    routing = Routing(experts, weights, torch.zeros(3, 2, dtype=torch.float64))
    gate_up = draw(2, 6, 7, dtype=torch.float64).requires_grad_()
    down = draw(2, 7, 3, dtype=torch.float64).requires_grad_()
    stacked_experts(x, routing, gate_up, down).sum().backward()
    g, u = (x @ gate_up.detach()[1].T).chunk(2, dim=1)
    inner = plain_swiglu(g, u)
    assert down.grad is not None and weights.grad is not None
    torch.testing.assert_close(down.grad[1], inner.sum(dim=0).expand(7, 3))
    torch.testing.assert_close(weights.grad[:, 0], (inner @ down.detach()[1].T).sum(dim=1))


@pytest.mark.parametrize("pieces", [2**23, 131 * 5])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_linear_cross_entropy(
    dtype: torch.dtype, pieces: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lowlat.ops.cross_entropy.CHUNK_ELEMENTS", pieces)
    hidden, weight = draw(23, 7, dtype=dtype), draw(131, 7, dtype=dtype, seed=1)
    targets, counted = (torch.arange(23) * 5) % 131, torch.arange(23) % 4 != 2
    found = [t.clone().requires_grad_() for t in (hidden, weight)]
    result = linear_cross_entropy(found[0], found[1], targets, counted, z_weight=0.02)
    (3 * result.total).backward()
    wide = [t.double().requires_grad_() for t in (hidden, weight)]
    logits = (wide[0] @ wide[1].T)[counted]
    nll = F.cross_entropy(logits, targets[counted], reduction="sum")
    z = logits.logsumexp(dim=1).square().sum()
    (3 * (nll + 0.02 * z)).backward()
    close(result.nll, nll.detach(), dtype)
    close(result.z, z.detach(), dtype)
    for left, right in zip(found, wide, strict=True):
        assert left.grad is not None and right.grad is not None
        close(left.grad, right.grad, dtype)


def test_a_loss_without_gradients_costs_one_product() -> None:
    """Regression: evaluations that compute the gradient of the head, for leaves need one whether
    gradients are wanted or not.
    """
    hidden, weight = draw(23, 7, dtype=torch.float32), draw(131, 7, dtype=torch.float32, seed=1)
    weight.requires_grad_()
    targets, counted = torch.arange(23), torch.ones(23, dtype=torch.bool)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        linear_cross_entropy(hidden, weight, targets, counted)
    assert counter.get_total_flops() == 2 * 23 * 7 * 131
    with FlopCounterMode(display=False) as counter:
        linear_cross_entropy(hidden, weight, targets, counted)
    assert counter.get_total_flops() == 2 * 2 * 23 * 7 * 131
