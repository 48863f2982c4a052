"""Fill parameters from checkpoint tensors: casts, quantize on load, range checks, device."""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from lowlat.checkpoint.mapping import (
    PACKED_DTYPES,
    PACKED_SUFFIXES,
    PLAIN_DTYPES,
    ROUTER_BIAS,
    SCALE_SUFFIX,
    check_scale_values,
)
from lowlat.checkpoint.mapping_operations import Operation, Shapes
from lowlat.checkpoint.tensor_source import TensorSource
from lowlat.model.linear import Linear, Storage
from lowlat.ops.quantized import Empty
from lowlat.utils.errors import UserError
from lowlat.utils.huge_pages import HugePageAllocator
from lowlat.utils.progress import Progress

FP8 = torch.float8_e4m3fn


def fill_parameters(
    source: TensorSource,
    plan: Sequence[Operation],
    parameters: Mapping[str, Tensor],
    dtype: torch.dtype | None,
    device: torch.device,
    progress: Progress,
    packed: Mapping[str, Linear],
    *,
    shapes: Shapes,
    rows_of: Callable[[str, Tensor], Tensor],
) -> dict[str, Tensor]:
    """Tensors for all `parameters` (meta tensors), in `dtype` (None: as stored) on `device`.

    shapes: those of the whole model, of which `parameters` may be a share; rows_of: the rows of a
    parameter that belong to the share. packed: weights to quantize on load, with the modules whose
    storage they get. At most one file tensor is in memory besides the result. Raises UserError
    naming file and tensor for dtypes that no weight has, and for values that must be finite and are
    not.
    """
    filled: dict[str, Tensor] = {}
    empty = HugePageAllocator().empty if device.type == "cpu" else torch.empty
    total = sum(_stored_bytes(source, name) for step in plan for name in step.file_shapes(shapes))
    with progress.task("Loading weights", total=total, unit="bytes") as task:
        for step in plan:
            names, is_view = list(step.file_shapes(shapes)), True
            for name, whole in step.load(source):
                if name not in parameters:
                    continue
                tensor = rows_of(name, whole)
                where = f"{source.path}: tensor {name!r}"
                where = source.where(names[0]) if len(names) == 1 else where
                if name in packed:
                    parts = fit_packed(tensor, name, where, packed[name], empty)
                else:
                    parts = {name: _fit_stored(tensor, name, where, parameters[name].dtype, dtype)}
                filled |= {part: fitted.to(device) for part, fitted in parts.items()}
                is_view = is_view and filled[name].data_ptr() == tensor.data_ptr()
            for file in names:
                if not is_view:
                    source.release(file)
                task.advance(_stored_bytes(source, file))
    return filled


def _fit_stored(
    tensor: Tensor, parameter: str, where: str, stored: torch.dtype, dtype: torch.dtype | None
) -> Tensor:
    """`fit` for a parameter of dtype `stored`; packed weights and their scales must have it.

    Scales of packed weights are not checked, so that loading reads no weight.
    """
    if stored in PACKED_DTYPES or parameter.endswith(PACKED_SUFFIXES):
        if tensor.dtype != stored:
            wanted = f"{dtype_label(stored)}, as quantization_config requires"
            raise UserError(f"{where} is {dtype_label(tensor.dtype)}, not {wanted}")
        return tensor
    return fit(tensor, parameter, where, stored == FP8, dtype)


def fit(
    tensor: Tensor, parameter: str, where: str, blocks: bool, dtype: torch.dtype | None
) -> Tensor:
    """`tensor` in the dtype that `parameter` is stored in; `blocks` if that is fp8 blocks.

    Raises UserError starting with `where` for a dtype that does not belong there, a router bias or
    scale that is not finite, and values beyond the range of `dtype`.
    """
    if parameter.endswith(SCALE_SUFFIX):
        check_scale_values(tensor, where)
        return tensor.to(torch.float32)
    if parameter.endswith(ROUTER_BIAS):
        if not tensor.is_floating_point() or not bool(tensor.float().isfinite().all()):
            raise UserError(f"{where} holds values that are not finite; the checkpoint is damaged")
        return tensor.to(torch.float32)
    if blocks or tensor.dtype not in PLAIN_DTYPES:
        if not blocks or tensor.dtype != FP8:
            wanted = "fp8 (F8_E4M3), as quantization_config requires" if blocks else "a plain float"
            raise UserError(f"{where} is {dtype_label(tensor.dtype)}, not {wanted}")
        return tensor
    result = tensor.to(tensor.dtype if dtype is None else dtype)
    if result.dtype == torch.float16 != tensor.dtype:
        if bool(result.isinf().any()) and bool(tensor.isfinite().all()):
            raise UserError(f"{where} has values beyond the range of fp16; use --dtype bf16")
    return result


def fit_packed(
    tensor: Tensor, parameter: str, where: str, linear: Linear, empty: Empty
) -> dict[str, Tensor]:
    """`tensor` quantized to the storage of `linear`, by parameter names; `empty` allocates.

    Raises UserError starting with `where` for a dtype that no weight has and for values that are
    not finite or beyond the range of the storage.
    """
    if tensor.dtype not in PLAIN_DTYPES:
        raise UserError(f"{where} is {dtype_label(tensor.dtype)}, not a plain float")
    parts = linear.pack(tensor, empty)
    check_packed(parts, linear.storage, where)
    prefix = parameter.removesuffix("weight")
    return {prefix + part: value for part, value in parts.items()}


def check_packed(parts: Mapping[str, Tensor], storage: Storage, where: str) -> None:
    """Raise UserError starting with `where` if the scales show that values overflow `storage`."""
    for part in parts.values():
        if part.is_floating_point() and not bool(part.isfinite().all()):
            raise UserError(
                f"{where} has values that are not finite or too large for {storage}; "
                "use --dtype bf16"
            )


def _stored_bytes(source: TensorSource, name: str) -> int:
    return math.prod(source.shape(name)) * source.dtype(name).itemsize


def dtype_label(dtype: torch.dtype) -> str:
    """'uint8'."""
    return str(dtype).removeprefix("torch.")
