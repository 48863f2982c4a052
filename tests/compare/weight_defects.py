"""Defects of converters, planted in the tensors of a checkpoint; each must be named."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Weights = dict[str, Tensor]
Defect = Callable[[Weights], None]
ATTENTION, MLP = "model.layers.1.self_attn.", "model.layers.1.mlp."


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightPlant:
    """A defect, and how it must be reported."""

    name: str
    defect: Defect
    kind: str
    says: str
    """The sentence, without its subject."""
    places: tuple[str, ...]
    label: str = "B"


def damage(folder: Path, copy: Path, defect: Defect) -> Path:
    """A copy of the checkpoint with one defect."""
    shutil.copytree(folder, copy)
    file = copy / "model.safetensors"
    weights = load_file(file)
    defect(weights)
    contiguous = {name: value.clone().contiguous() for name, value in weights.items()}
    save_file(contiguous, file, metadata={"format": "pt"})
    return copy


def changes(name: str, change: Callable[[Tensor], Tensor]) -> Defect:
    """Replaces one tensor by a function of it."""

    def defect(weights: Weights) -> None:
        weights[name] = change(weights[name].clone())

    return defect


def exchange(first: str, second: str) -> Defect:
    def defect(weights: Weights) -> None:
        weights[first], weights[second] = weights[second], weights[first]

    return defect


def all_of(*defects: Defect) -> Defect:
    def defect(weights: Weights) -> None:
        for each in defects:
            each(weights)

    return defect


def experts(moves: dict[int, int]) -> Defect:
    """Expert n of the copy is expert moves[n]."""

    def defect(weights: Weights) -> None:
        own = dict(weights)
        for to, of in moves.items():
            for part in ("gate_proj", "up_proj", "down_proj"):
                name = f"{MLP}experts.{{}}.{part}.weight"
                weights[name.format(to)] = own[name.format(of)]

    return defect


def rows(order: list[int]) -> Callable[[Tensor], Tensor]:
    return lambda x: x[order]


def halves(x: Tensor) -> Tensor:
    """Rows of neighbouring pairs as real parts, then imaginary parts."""
    return torch.cat([x[0::2], x[1::2]])


def pairs(x: Tensor) -> Tensor:
    """Reverse of `halves`."""
    return torch.stack(x.chunk(2), dim=1).flatten(0, 1)


def of_heads(
    heads: int, part: slice, change: Callable[[Tensor], Tensor], only: tuple[int, ...] = ()
) -> Callable[[Tensor], Tensor]:
    """`change` of some rows of every head, or of the heads `only`."""

    def changed(x: Tensor) -> Tensor:
        by_head = x.unflatten(0, (heads, -1)).clone()
        for head in only or range(heads):
            by_head[head, part] = change(by_head[head, part].clone())
        return by_head.flatten(0, 1)

    return changed


def parts_of_heads(heads: int, part: slice, sources: list[int]) -> Callable[[Tensor], Tensor]:
    """The rows `part` of every head from another head."""

    def changed(x: Tensor) -> Tensor:
        by_head = x.unflatten(0, (heads, -1)).clone()
        by_head[:, part] = by_head[sources][:, part].clone()
        return by_head.flatten(0, 1)

    return changed


def transposed(x: Tensor) -> Tensor:
    return x.T.reshape(x.shape)


def int8_blocks(x: Tensor, size: int) -> Tensor:
    blocks = x.unflatten(-1, (-1, size))
    scale = blocks.abs().amax(dim=-1, keepdim=True) / 127
    return ((blocks / scale).round() * scale).flatten(-2)


def fp8_blocks(x: Tensor) -> Tensor:
    scale = x.abs().max() / 448
    return (x / scale).to(torch.float8_e4m3fn).to(x.dtype) * scale


def truncated(x: Tensor) -> Tensor:
    return (x.view(torch.int32) & -65536).view(torch.float32)
