"""Puts tensors from a checkpoint into parameters: number type, device, stacking, range checks."""

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from lowlat.checkpoint.mapping import PLAIN_DTYPES, ROUTER_BIAS, SCALE_SUFFIX
from lowlat.checkpoint.operations import Operation, Piece
from lowlat.checkpoint.padding import PaddingError
from lowlat.checkpoint.source import TensorSource
from lowlat.utils.errors import UserError
from lowlat.utils.progress import Progress

FP8 = torch.float8_e4m3fn


def fill(
    source: TensorSource,
    plan: Sequence[Operation],
    parameters: Mapping[str, Tensor],
    dtype: torch.dtype | None,
    device: torch.device,
    progress: Progress,
) -> dict[str, Tensor]:
    """Tensors for all `parameters` (meta tensors), in `dtype` (None: as stored) on `device`.

    One file tensor is in memory at a time beside the result. Raises UserError naming file and
    tensor for number types that are no weight's and for values that are not finite where they
    must be.
    """
    filled: dict[str, Tensor] = {}
    total = sum(_stored_bytes(source, name) for name in source.names())
    with progress.task("Loading weights", total=total, unit="bytes") as task:
        for piece, names in _pieces(plan, source):
            name, row, tensor = piece
            parameter = parameters[name]
            where = source.where(names[-1]) if names else f"{source.path}: tensor {name!r}"
            fitted = fit(tensor, name, where, parameter.dtype == FP8, dtype).to(device)
            if row is None:
                filled[name] = fitted
            else:
                if name not in filled:
                    filled[name] = torch.empty(parameter.shape, dtype=fitted.dtype, device=device)
                filled[name][row].copy_(fitted)
            if row is not None or fitted.data_ptr() != tensor.data_ptr():
                for read in names:
                    source.release(read)
            task.advance(sum(_stored_bytes(source, read) for read in names))
    return filled


def fit(
    tensor: Tensor, parameter: str, where: str, blocks: bool, dtype: torch.dtype | None
) -> Tensor:
    """`tensor` in the number type `parameter` is kept in; `blocks` if that is fp8.

    Raises UserError starting with `where` for a number type that does not belong there, a router
    bias or scale that is not finite, and values beyond the range of `dtype`.
    """
    if parameter.endswith((ROUTER_BIAS, SCALE_SUFFIX)):
        if not tensor.is_floating_point() or not bool(tensor.float().isfinite().all()):
            raise UserError(f"{where} holds values that are not finite; the checkpoint is damaged")
        return tensor.to(torch.float32)
    if blocks or tensor.dtype not in PLAIN_DTYPES:
        if not blocks or tensor.dtype != FP8:
            wanted = "fp8 (F8_E4M3), as quantization_config says" if blocks else "a plain float"
            raise UserError(f"{where} is {_name(tensor.dtype)}, not {wanted}")
        return tensor
    result = tensor.to(tensor.dtype if dtype is None else dtype)
    if result.dtype == torch.float16 != tensor.dtype:
        if bool(result.isinf().any()) and bool(tensor.isfinite().all()):
            raise UserError(f"{where} has values beyond the range of fp16; use --dtype bf16")
    return result


def _pieces(plan: Sequence[Operation], source: TensorSource) -> Iterator[tuple[Piece, list[str]]]:
    """Every piece of every operation with the file tensors read for it since the piece before."""
    names: list[str] = []

    def read(name: str) -> Tensor:
        names.append(name)
        return source.read(name)

    try:
        for operation in plan:
            for piece in operation.load(read):
                yield piece, names.copy()
                names.clear()
    except PaddingError as error:
        raise UserError(f"{source.path}: {error}") from error


def _stored_bytes(source: TensorSource, name: str) -> int:
    return math.prod(source.shape(name)) * source.dtype(name).itemsize


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
