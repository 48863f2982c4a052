"""fp8 experts that transformers stacks into two tensors per layer, as one tensor per expert and
projection (Mistral 4).

    experts.gate_up_proj e4m3 [experts, 2 inner, hidden], the gates' rows first
    experts.gate_up_proj_scale_inv [experts, block rows, block columns], a block per half or matrix
                         without weight_block_size

and the same for down_proj. Plain experts stay stacked (`mapping_operations`).
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from lowlat.checkpoint.tensor_source import StoredTensor, TensorSource
from lowlat.utils.errors import UserError

SCALE = "_scale_inv"
HALVES = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
_STACKED = re.compile(r"(.+\.mlp\.experts\.)(gate_up_proj|down_proj)")


@final
@dataclass(frozen=True, slots=True)
class _Slice(StoredTensor):
    """Rows of one expert."""

    source: TensorSource
    name: str
    expert: int
    first: int

    @property
    def where(self) -> str:
        return self.source.where(self.name)

    def read(self) -> Tensor:
        return self.source.read(self.name)[self.expert, self.first : self.first + self.shape[0]]

    def rows(self, start: int, stop: int) -> Tensor:
        return self.read()[start:stop]

    def release(self) -> None:
        self.source.release(self.name)


def split_fp8_experts(source: TensorSource) -> TensorSource:
    """`source`, with stacked fp8 experts and their scales as tensors of their own. Raises UserError
    naming a tensor that is missing or malformed.
    """
    tensors = dict(source.tensors)
    for name, stored in source.tensors.items():
        match = _STACKED.fullmatch(name)
        if match is None or stored.dtype != torch.float8_e4m3fn:
            continue
        for part in (name, name + SCALE):
            _check(source, name, part)
            tensors.pop(part)
            suffix = part.removeprefix(name).removeprefix("_")
            kind = "weight" if part == name else f"weight_{suffix}"
            for expert, projection, one in _slices(source, part, HALVES[match[2]]):
                tensors[f"{match[1]}{expert}.{projection}.{kind}"] = one
    return replace(source, tensors=tensors)


def _check(source: TensorSource, weight: str, name: str) -> None:
    shape, experts = source.shape(name), source.shape(weight)[0]
    if len(shape) != 3 or shape[0] != experts:
        raise UserError(
            f"{source.where(name)} has shape {list(shape)}, not [{experts}, rows, columns]; "
            "download the model again"
        )


def _slices(
    source: TensorSource, name: str, projections: tuple[str, ...]
) -> Iterator[tuple[int, str, StoredTensor]]:
    """Expert, projection and rows; one block of scales may cover both halves."""
    experts, rows, columns = source.shape(name)
    is_shared = rows == 1 and name.endswith(SCALE)
    if rows % len(projections) and not is_shared:
        raise UserError(f"{source.where(name)} has {rows} rows, which are not two equal halves")
    size = 1 if is_shared else rows // len(projections)
    for expert in range(experts):
        for number, projection in enumerate(projections):
            first = 0 if is_shared else number * size
            yield (
                expert,
                projection,
                _Slice((size, columns), source.dtype(name), source, name, expert, first),
            )
