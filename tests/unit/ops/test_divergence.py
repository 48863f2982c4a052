"""Forward KL of a head from a teacher, in pieces, against autograd over whole matrices in fp64."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lowlat.ops import cross_entropy, divergence
from lowlat.ops.divergence import linear_divergence

ROWS, VOCAB, HIDDEN, TEACHER = 23, 31, 7, 5


def inputs(
    dtype: torch.dtype, *, rows: int = ROWS, vocab: int = VOCAB
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    hidden = torch.randn(rows, HIDDEN, dtype=dtype, requires_grad=True)
    weight = torch.randn(vocab, HIDDEN, dtype=dtype, requires_grad=True)
    taught = torch.randn(rows, TEACHER, dtype=dtype), torch.randn(vocab, TEACHER, dtype=dtype)
    targets, counted = torch.randint(vocab, (rows,)), torch.rand(rows) < 0.8
    return hidden, weight, *taught, targets, counted


def by_definition(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    targets: Tensor,
    counted: Tensor,
) -> tuple[Tensor, Tensor]:
    """KL and nll over whole matrices, as PyTorch defines them, in fp64."""
    wide = [x.double() for x in (hidden, weight, teacher_hidden, teacher_weight)]
    logits, taught = (wide[0] @ wide[1].T)[counted], (wide[2] @ wide[3].T)[counted]
    kl = F.kl_div(logits.log_softmax(1), taught.softmax(1), reduction="sum")
    return kl, F.cross_entropy(logits, targets[counted], reduction="sum")


@settings(deadline=None, max_examples=30)
@given(
    rows=st.integers(1, 29),
    vocab=st.integers(2, 41),
    piece=st.integers(1, 600),
    block=st.integers(1, 200),
    nll_weight=st.sampled_from([0.0, 0.3, 2.0]),
)
def test_values_and_gradients_whatever_the_pieces(
    rows: int, vocab: int, piece: int, block: int, nll_weight: float
) -> None:
    given = inputs(torch.float64, rows=rows, vocab=vocab)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cross_entropy, "CHUNK_ELEMENTS", piece)
        patch.setattr(divergence, "BLOCK_ELEMENTS", block)
        found = linear_divergence(*given, nll_weight=nll_weight)
    kl, nll = by_definition(*given)
    torch.testing.assert_close(found.kl, kl.detach(), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found.nll, nll.detach(), rtol=1e-10, atol=1e-10)
    wanted = torch.autograd.grad(kl + nll_weight * nll, given[:2])
    for own, other in zip(torch.autograd.grad(3 * found.total, given[:2]), wanted, strict=True):
        torch.testing.assert_close(own, 3 * other, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_in_the_types_of_training(dtype: torch.dtype, close: float) -> None:
    """Products in bf16 and fp32: value and gradient of the definition, to their precision."""
    given = inputs(dtype)
    found = linear_divergence(*given, nll_weight=0.5)
    kl, nll = by_definition(*given)
    torch.testing.assert_close(found.total.double(), kl + 0.5 * nll, rtol=close, atol=close)
    wanted = torch.autograd.grad(kl + 0.5 * nll, given[:2])
    for own, other in zip(torch.autograd.grad(found.total, given[:2]), wanted, strict=True):
        assert own.dtype == dtype
        assert (own - other).norm() <= close * other.norm()


@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("rows", [1, 5, 23])
def test_native_pieces_of_any_size(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, close: float, rows: int
) -> None:
    """Pieces of up to `rows` rows give what one piece gives."""
    given = inputs(dtype)
    whole = linear_divergence(*given)
    size = given[0].element_size()
    monkeypatch.setattr(divergence, "NATIVE_PIECE_BYTES", rows * VOCAB * size)
    monkeypatch.setattr(cross_entropy, "CHUNK_ELEMENTS", rows * VOCAB)
    found = linear_divergence(*given)
    torch.testing.assert_close(found.total, whole.total, rtol=1e-5, atol=1e-5)
    wanted = torch.autograd.grad(whole.total, given[:2])
    for own, other in zip(torch.autograd.grad(found.total, given[:2]), wanted, strict=True):
        assert (own - other).norm() <= close * other.norm()


@given(rows=st.integers(0, 50), most=st.integers(1, 60))
def test_chunks_are_few_and_even(rows: int, most: int) -> None:
    pieces = cross_entropy.even_chunks(rows, most)
    sizes = [piece.stop - piece.start for piece in pieces]
    assert [row for piece in pieces for row in range(piece.start, piece.stop)] == [*range(rows)]
    assert len(pieces) <= -(-rows // most)
    assert not sizes or most >= sizes[0] == max(sizes)
    assert set(sizes[:-1]) <= {*sizes[:1]}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_teacher_itself_diverges_by_nothing(dtype: torch.dtype) -> None:
    """p = q: no divergence and no gradient, not even the rounding of p and q."""
    hidden, weight, _, _, targets, counted = inputs(dtype)
    found = linear_divergence(hidden, weight, hidden, weight, targets, counted)
    assert found.kl.item() == 0 and found.nll.item() > 0
    for gradient in torch.autograd.grad(found.total, (hidden, weight)):
        assert not gradient.any()


def test_weights_that_stay_get_no_gradient() -> None:
    hidden, weight, *rest = inputs(torch.float64)
    weight = weight.detach()
    found = linear_divergence(hidden, weight, *rest)
    (gradient,) = torch.autograd.grad(found.total, [hidden])
    kl, _ = by_definition(hidden, weight, *rest)
    torch.testing.assert_close(gradient, torch.autograd.grad(kl, hidden)[0])
    with torch.no_grad():
        assert not linear_divergence(hidden, weight, *rest).total.requires_grad


def test_teachers_certain_of_a_token_give_finite_sums() -> None:
    """Probabilities that underflow must not make 0 * -inf of themselves."""
    given = inputs(torch.float32)
    certain = (given[0], given[1], 1e4 * given[2], *given[3:])
    found = linear_divergence(*certain)
    assert found.total.isfinite()
    assert all(g.isfinite().all() for g in torch.autograd.grad(found.total, given[:2]))
