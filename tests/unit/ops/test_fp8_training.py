"""FP8 training products against their definition, written out slowly: E4M3 from its bits, blocks in
loops, sums in fp64.
"""

import math

import pytest
import torch
from torch import Tensor

from lowlat.ops import fp8_scaled_mm
from lowlat.ops.fp8 import quantize_blocks
from lowlat.ops.fp8_experts import ExpertFormats, fp8_grouped, fp8_stacked_experts
from lowlat.ops.fp8_training import (
    ALONG_COLUMNS,
    ALONG_ROWS,
    SQUARE,
    Blocks,
    Fp8Format,
    ScaleFormat,
    blockwise_product,
    fp8_linear,
    fp8_linear_quantized,
    product,
    quantize,
    quantize_e5m6,
    stored_blocks,
)
from lowlat.ops.grouped import stacked_experts
from lowlat.ops.routing import Routing

POWERS = Fp8Format(weight_scales="ue8m0", input_scales="ue8m0", gradient_scales="ue8m0")
AFTER_ATTENTION = Fp8Format(input_scales="ue8m0", saved_input="e5m6")
ROWS, IN, OUT = 131, 257, 139


def grid(exponent_bits: int, mantissa_bits: int, count: int) -> Tensor:
    """The first `count` numbers from 0 up of a small float, from its fields."""
    bias = 2 ** (exponent_bits - 1) - 1
    numbers = []
    for code in range(count):
        exponent, mantissa = divmod(code, 2**mantissa_bits)
        fraction = mantissa / 2**mantissa_bits
        if exponent:
            numbers.append((1 + fraction) * 2.0 ** (exponent - bias))
        else:
            numbers.append(fraction * 2.0 ** (1 - bias))
    return torch.tensor(numbers, dtype=torch.float64)


E4M3, E5M6 = grid(4, 3, 127), grid(5, 6, 31 * 64)


def to_grid(values: Tensor, numbers: Tensor) -> Tensor:
    """The nearest number of the grid, of two equally near ones that with an even last bit."""
    size = values.double().abs()
    above = torch.searchsorted(numbers, size).clamp(1, len(numbers) - 1)
    below = above - 1
    middle = (numbers[below] + numbers[above]) / 2
    chosen = torch.where((size > middle) | ((size == middle) & (above % 2 == 0)), above, below)
    return numbers[chosen] * values.double().sign()


def by_definition(
    matrix: Tensor, block: tuple[int, int], scales: ScaleFormat, numbers: Tensor = E4M3
) -> tuple[Tensor, Tensor]:
    """Quantised and multiplied out in fp64, and the scales."""
    out = torch.empty_like(matrix, dtype=torch.float64)
    shape = [math.ceil(size / edge) for size, edge in zip(matrix.shape, block, strict=True)]
    scale = torch.empty(shape)
    for i in range(shape[0]):
        for j in range(shape[1]):
            place = (
                slice(i * block[0], (i + 1) * block[0]),
                slice(j * block[1], (j + 1) * block[1]),
            )
            part = matrix[place].float()
            factor = part.abs().max() / numbers[-1].float()
            if factor == 0:
                factor = torch.tensor(1.0)
            if scales == "ue8m0":
                factor = torch.tensor(2.0 ** math.ceil(math.log2(factor.item())))
            out[place] = to_grid(part / factor, numbers) * factor.double()
            scale[i, j] = factor
    return out, scale


def heavy(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal numbers whose rows and columns differ by factors of thousands."""
    rows = torch.exp2(torch.randint(-9, 10, (shape[0], 1)))
    columns = torch.exp2(torch.randint(-5, 6, (1, shape[1])))
    return (torch.randn(shape) * rows * columns).to(dtype)


def close(found: Tensor, exact: Tensor, parts: tuple[Tensor, Tensor], tolerance: float) -> None:
    """|found - exact| <= tolerance * sum of the magnitudes of the terms."""
    bound = parts[0].abs() @ parts[1].abs() * tolerance
    assert ((found.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("scales", [None, "ue8m0"])
@pytest.mark.parametrize("block", [ALONG_ROWS, ALONG_COLUMNS, SQUARE])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantization_is_the_definition(
    block: tuple[int, int], scales: ScaleFormat, dtype: torch.dtype
) -> None:
    matrix = heavy(ROWS, IN, dtype=dtype)
    matrix[:, 128:256][5] = 0.0
    blocks = quantize(matrix, block, scales)
    exact, scale = by_definition(matrix, block, scales)
    assert torch.equal(blocks.scale, scale)
    # fp8 times an fp32 scale has 28 bits: fp64 holds it exactly
    assert torch.equal(blocks.dense(torch.float64), exact)
    assert torch.equal(blocks.dense(torch.float32), exact.float())


@pytest.mark.parametrize("scales", [None, "ue8m0"])
def test_weights_are_quantized_as_checkpoints_are(scales: ScaleFormat) -> None:
    """What training multiplies with is bit for bit what an export holds."""
    weight = heavy(OUT, IN)
    blocks = quantize(weight, SQUARE, scales)
    values, scale = quantize_blocks(weight, SQUARE, scales)
    stored = stored_blocks(values, scale)
    assert torch.equal(stored.values.view(torch.uint8), blocks.values.view(torch.uint8))
    assert torch.equal(stored.scale, blocks.scale) and stored.shape == blocks.shape


def test_every_e4m3_number_is_read_as_itself() -> None:
    """Regression: wrong fields, signs or numbers below the smallest normal one."""
    codes = torch.arange(256, dtype=torch.uint8)
    codes[127], codes[255] = 0, 0  # NaN
    values = codes.view(torch.float8_e4m3fn).view(1, 2, 1, 128)
    dense = Blocks(values, torch.ones(1, 1), (2, 128)).dense(torch.float32)
    assert torch.equal(dense, values.float().view(2, 128))
    assert torch.equal(dense[0, :127].double(), E4M3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_e5m6_is_the_definition(dtype: torch.dtype) -> None:
    """bf16 has one bit more than E5M6, so half of its numbers are ties."""
    matrix = heavy(ROWS, IN, dtype=dtype)
    matrix[3, :128] *= torch.exp2(-torch.arange(128.0) / 3)  # down to zero through the subnormals
    exact, scale = by_definition(matrix, ALONG_ROWS, "ue8m0", E5M6)
    kept = quantize_e5m6(matrix)
    assert torch.equal(kept.scale, scale)
    assert torch.equal(kept.dense(torch.float64), exact)


def test_product_is_the_definition() -> None:
    """One product with the scales in its operands and the sum of scaled partial sums are the same
    up to fp32: both within 2^-20 of fp64's, relative to the terms' magnitudes.
    """
    a, b = quantize(heavy(ROWS, 901), ALONG_ROWS), quantize(heavy(OUT, 901), SQUARE)
    wide = a.dense(torch.float64), b.dense(torch.float64).T
    exact = wide[0] @ wide[1]
    close(product(a, b, torch.float32), exact, wide, 2.0**-20)
    close(blockwise_product(a, b), exact, wide, 2.0**-20)
    close(product(a, b, torch.float64), exact, wide, 2.0**-50)


def test_powers_of_two_lose_nothing_in_bf16() -> None:
    """Scaled operands are exact in bf16, so its product is the fp32 one rounded once."""
    a = quantize(heavy(ROWS, IN), ALONG_ROWS, "ue8m0")
    b = quantize(heavy(OUT, IN), SQUARE, "ue8m0")
    assert torch.equal(a.dense(torch.bfloat16).double(), a.dense(torch.float64))
    wide = a.dense(torch.float64), b.dense(torch.float64).T
    found = product(a, b, torch.bfloat16, has_powers=True)
    close(found, (wide[0] @ wide[1]), wide, 2.0**-8)
    exact = (wide[0] @ wide[1]).bfloat16()
    assert (found == exact).float().mean() > 0.99


@pytest.mark.parametrize("fmt", [Fp8Format(), POWERS, AFTER_ATTENTION])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 2.0**-20), (torch.float64, 1e-13)]
)
def test_linear_and_its_gradients_are_the_definition(
    fmt: Fp8Format, dtype: torch.dtype, tolerance: float
) -> None:
    x = heavy(ROWS, IN).to(dtype).requires_grad_()
    weight = heavy(OUT, IN).to(dtype).requires_grad_()
    bias = torch.randn(OUT, dtype=dtype, requires_grad=True)
    grad = heavy(ROWS, OUT).to(dtype)
    y = fp8_linear(x, weight, bias, fmt)
    y.backward(grad)

    xq, _ = by_definition(x.detach(), ALONG_ROWS, fmt.input_scales)
    wq, _ = by_definition(weight.detach(), SQUARE, fmt.weight_scales)
    plain = fp8_linear(x.detach(), weight.detach(), None, fmt)
    close(plain, xq @ wq.T, (xq, wq.T), tolerance)
    assert torch.equal(y, plain + bias)
    gq, _ = by_definition(grad, ALONG_ROWS, fmt.gradient_scales)
    assert x.grad is not None and weight.grad is not None and bias.grad is not None
    close(x.grad, gq @ wq, (gq, wq), tolerance)
    kept = xq
    if fmt.saved_input == "e5m6":
        kept, _ = by_definition(x.detach(), ALONG_ROWS, "ue8m0", E5M6)
    columns, _ = by_definition(kept.float(), ALONG_COLUMNS, fmt.input_scales)
    gradients, _ = by_definition(grad, ALONG_COLUMNS, fmt.gradient_scales)
    close(weight.grad, gradients.T @ columns, (gradients.T, columns), tolerance)
    torch.testing.assert_close(bias.grad, grad.sum(dim=0))


def test_bf16_activations_and_master_weights() -> None:
    """Results and input gradients are bf16, weight gradients fp32 and never rounded to bf16."""
    x = torch.randn(ROWS, 7, IN, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(OUT, IN, requires_grad=True)
    y = fp8_linear(x, weight)
    y.backward(torch.randn_like(y))
    assert y.shape == (ROWS, 7, OUT) and y.dtype == torch.bfloat16
    assert x.grad is not None and x.grad.dtype == torch.bfloat16 and x.grad.shape == x.shape
    assert weight.grad is not None and weight.grad.dtype == torch.float32
    assert not torch.equal(weight.grad, weight.grad.bfloat16().float())


@pytest.mark.parametrize("fmt", [Fp8Format(), POWERS, AFTER_ATTENTION])
def test_bf16_results_are_rounded_once(fmt: Fp8Format) -> None:
    """Regression: operands rounded to bf16 whose scales are no powers of two."""
    x = heavy(ROWS, IN, dtype=torch.bfloat16).requires_grad_()
    weight, grad = heavy(OUT, IN), heavy(ROWS, OUT, dtype=torch.bfloat16)
    y = fp8_linear(x, weight, None, fmt)
    y.backward(grad)
    xq, _ = by_definition(x.detach(), ALONG_ROWS, fmt.input_scales)
    wq, _ = by_definition(weight, SQUARE, fmt.weight_scales)
    gq, _ = by_definition(grad, ALONG_ROWS, fmt.gradient_scales)
    assert x.grad is not None
    assert (y == (xq @ wq.T).bfloat16()).float().mean() > 0.99
    assert (x.grad == (gq @ wq).bfloat16()).float().mean() > 0.99


def test_backward_keeps_fp8() -> None:
    """Regression: a copy of the input or the weight kept in a wider type."""
    kept: list[torch.dtype] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.extend([tensor.dtype] * (tensor.numel() > ROWS * 3))
        return tensor

    x, weight = torch.randn(ROWS, IN), torch.randn(OUT, IN, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        fp8_linear(x, weight)
    assert kept == [torch.float8_e4m3fn] * 2


def test_rows_of_padding_change_nothing() -> None:
    """Zero rows after the tokens leave every scale and the weight's gradient as they were.

    Regression: padding that enters a maximum.
    """
    x, weight, grad = torch.rand(ROWS, IN) + 1, torch.randn(OUT, IN), torch.rand(ROWS, OUT) + 1
    gradients = []
    for padding in (0, 61):
        own = weight.clone().requires_grad_()
        zeros = torch.zeros(padding, 1)
        rows = torch.cat([x, zeros.expand(-1, IN)])
        fp8_linear(rows, own).backward(torch.cat([grad, zeros.expand(-1, OUT)]))
        gradients.append(own.grad)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-6, atol=1e-4)
    assert quantize(x, ALONG_COLUMNS).scale[1].min() >= 1 / 448


@pytest.mark.parametrize("factor", [1e-44, 1e-42, 1e-40, 1e-30, 1e30])
def test_tiny_and_huge_values(factor: float) -> None:
    """Scales follow; below the smallest normal scale values go to the grid of that."""
    matrix = torch.randn(3, IN) * factor
    back = quantize(matrix, ALONG_ROWS).dense(torch.float64)
    bound = matrix.double().abs() / 16 + matrix.double().abs().max() * 2.0**-9 / 448 + 2.0**-135
    assert ((back - matrix.double()).abs() <= bound).all()


def test_a_scale_that_is_no_normal_number() -> None:
    """1.4 units of the last place of fp32 would be one of them, and 627 beyond fp8.

    Regression: NaN from a quotient by a subnormal scale.
    """
    matrix = torch.full((1, 3), 448 * 1.4 * 2.0**-149)
    assert quantize(matrix, ALONG_ROWS).values.to(torch.float32).isfinite().all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("scales", [None, "ue8m0"])
def test_values_that_are_not_finite_are_seen(bad: float, scales: ScaleFormat) -> None:
    """They make NaN of their whole tile, and of nothing else.

    Regression: a scale of infinity that turns the rest of the tile into zeros.
    """
    x = torch.randn(3, IN)
    x[1, 130] = bad
    back = quantize(x, ALONG_ROWS, scales).dense(torch.float32)
    assert back[1, 128:256].isnan().all()
    back[1, 128:256] = 0.0
    assert back.isfinite().all()
    fmt = Fp8Format(input_scales=scales)
    y = fp8_linear(x, torch.randn(OUT, IN), None, fmt)
    assert y[1].isnan().all() and y[[0, 2]].isfinite().all()
    assert quantize_e5m6(x).dense(torch.float32)[1, 128:256].isnan().all()


def test_a_broken_byte_of_a_stored_weight_is_seen() -> None:
    values, scale = quantize_blocks(torch.randn(OUT, IN), SQUARE)
    values.view(torch.uint8)[130, 3] = 0x7F
    y = fp8_linear_quantized(torch.randn(2, IN), stored_blocks(values, scale))
    assert y[:, 128:].isnan().all() and y[:, :128].isfinite().all()


def test_nothing_in_nothing_out() -> None:
    weight = torch.randn(OUT, IN, requires_grad=True)
    y = fp8_linear(torch.zeros(0, IN, dtype=torch.bfloat16), weight)
    assert y.shape == (0, OUT) and y.dtype == torch.bfloat16
    y.sum().backward()
    assert weight.grad is not None and not weight.grad.any()


def routing(tokens: int, experts: int, chosen: int) -> Routing:
    order = torch.rand(tokens, experts).argsort(dim=1)[:, :chosen]
    scores = torch.rand(tokens, experts)
    return Routing(order, torch.rand(tokens, chosen), scores)


def test_no_expert_shares_a_tile() -> None:
    """Each expert's result and weight gradient are those of its rows alone; one without rows gets
    zeros.
    """
    counts = [5, 0, 133, 3]
    x, weight = heavy(sum(counts), IN), torch.randn(4, OUT, IN)
    grad = heavy(sum(counts), OUT)
    stacked = weight.clone().requires_grad_()
    y = fp8_grouped(x, stacked, counts, Fp8Format())
    y.backward(grad)
    assert stacked.grad is not None
    for expert, (rows, part, gradient) in enumerate(
        zip(x.split(counts), y.split(counts), grad.split(counts), strict=True)
    ):
        own = weight[expert].clone().requires_grad_()
        alone = fp8_linear(rows, own)
        alone.backward(gradient)
        assert own.grad is not None
        assert torch.equal(part, alone) and torch.equal(stacked.grad[expert], own.grad)


@pytest.mark.parametrize("inner", [128, 67])
def test_experts_are_the_plain_ones_up_to_fp8(inner: int) -> None:
    """Loss and gradients agree with the plain form within what 3 bits of mantissa allow.

    Regression: gate and up taken for each other, and one block that spans both.
    """
    hidden, experts = 131, 5
    x, choice = torch.randn(61, hidden), routing(61, experts, 3)
    masters = torch.randn(experts, 2 * inner, hidden) / 11, torch.randn(experts, hidden, inner) / 8
    masters[0][:, inner:] *= 1000.0
    results = []
    for is_fp8 in (False, True):
        inputs = [t.clone().requires_grad_() for t in (x, choice.weights, *masters)]
        own = choice._replace(weights=inputs[1])
        if is_fp8:
            formats = ExpertFormats(up=Fp8Format(), down=Fp8Format())
            out = fp8_stacked_experts(inputs[0], own, inputs[2], inputs[3], formats)
        else:
            out = stacked_experts(inputs[0], own, inputs[2], inputs[3])
        out.square().sum().backward()
        results.append([out.detach(), *(t.grad for t in inputs if t.grad is not None)])
    for plain, rounded in zip(*results, strict=True):
        assert (plain - rounded).norm() < 0.1 * plain.norm()
    gate = results[1][3][:, :inner], results[0][3][:, :inner]
    assert (gate[0] - gate[1]).norm() < 0.1 * gate[1].norm()


@pytest.mark.parametrize("shape", [(ROWS, IN, OUT), (1, 3, 5), (256, 640, 384)])
def test_scaled_mm_gets_the_layouts_it_asks_for(
    shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All three products pass the shape and stride checks of scaled_mm, on tensors without memory,
    with sides that cuBLAS takes.
    """
    called: list[tuple[torch.Size, torch.Size]] = []
    scaled_mm = torch.nn.functional.scaled_mm

    def recorded(left: Tensor, right: Tensor, *rest: object, **options: object) -> Tensor:
        called.append((left.shape, right.shape))
        assert left.stride(1) == 1 and right.stride(0) == 1
        return scaled_mm(left, right, *rest, **options)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(torch.nn.functional, "scaled_mm", recorded)
    monkeypatch.setattr(fp8_scaled_mm, "is_available", lambda device: True)
    rows, width, out = shape
    with torch.device("meta"):
        x = torch.randn(rows, width, dtype=torch.bfloat16, requires_grad=True)
        weight = torch.randn(out, width, requires_grad=True)
        y = fp8_linear(x, weight)
        y.backward(torch.randn(rows, out, dtype=torch.bfloat16))
    assert y.shape == (rows, out) and x.grad is not None and x.grad.shape == x.shape
    assert weight.grad is not None and weight.grad.shape == weight.shape
    assert len(called) == 3
    assert all(side % 16 == 0 for pair in called for sides in pair for side in sides)
