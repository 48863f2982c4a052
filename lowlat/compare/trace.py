"""What one implementation computed for some tokens, part by part, in shapes and layouts that all
implementations share.

Owns the names of the parts and their order. How a part is observed is the recorders' business; what
two traces differ in, `measure`'s.

    tokens T, heads H, key-value heads G, rotary channels r

    input_norm  [T, hidden]    the layer's input behind its norm
    q           [T, H, d_qk]   queries before the rotation (behind QK-norm), channels as in files
    latent      [T, d_c]       MLA: what is cached of the latent
    k           [T, G, d]      keys before the rotation; MLA: the shared one, G = 1, d = r
    v           [T, G, d_v]    values; MLA: of every head
    q_rotated   [T, H, d_qk]   rotary channels last and canonical: real parts of all pairs, then
    k_rotated   [T, G, d]      imaginary parts, whichever way the file pairs channels
    scores      [H, T, T]      scaled products before the softmax; 0 where a query sees no key
    heads       [T, H, d_v]    attended values
    attention   [T, hidden]    behind o_proj
    middle      [T, hidden]    residual between attention and MLP
    post_norm   [T, hidden]    the middle behind its norm: input of gate and MLP
    gate        [T, experts]   unbiased scores of all experts
    router      [T, experts]   factors of the chosen experts, 0 for the others
    routed      [T, hidden]    weighted sum of the chosen experts
    shared      [T, hidden]    shared experts
    mlp         [T, hidden]    all of MLP or mixture
    residual    [T, hidden]    the layer's output
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Int
from safetensors.torch import load_file, save_file
from torch import Tensor

from lowlat.config.model import ModelConfig

LAYER_PARTS = (
    "input_norm",
    "q",
    "latent",
    "k",
    "v",
    "q_rotated",
    "k_rotated",
    "scores",
    "heads",
    "attention",
    "middle",
    "post_norm",
    "gate",
    "router",
    "routed",
    "shared",
    "mlp",
    "residual",
)
PARTS = {
    "embedding": ("embedding",),
    "layer": LAYER_PARTS,
    "output": ("norm", "logits"),
    "mtp": ("joined", *LAYER_PARTS, "norm", "logits"),
}
"""Stages of a model in order, and the parts of each in order of computation."""

STAGES = tuple(PARTS)


class Block(NamedTuple):
    """A decoder layer, an MTP module (numbered by depth), the embedding or the output."""

    stage: str
    number: int = 0

    def __str__(self) -> str:
        return f"{self.stage} {self.number}" if self.stage in ("layer", "mtp") else self.stage


class Place(NamedTuple):
    """A part of a block."""

    block: Block
    part: str

    @property
    def order(self) -> tuple[int, int, int]:
        """Sorts places by when they are computed."""
        stage, number = self.block
        return STAGES.index(stage), number, PARTS[stage].index(self.part)

    def __str__(self) -> str:
        return self.part if self.block.stage == self.part else f"{self.block} {self.part}"


EMBEDDING, OUTPUT = Block("embedding"), Block("output")


def block_of(config: ModelConfig, layer: int) -> Block:
    """The block that the model and its cache number `layer`."""
    count = config.num_hidden_layers
    return Block("layer", layer) if layer < count else Block("mtp", layer - count)


def layer_number(config: ModelConfig, block: Block) -> int:
    """The reverse of `block_of`."""
    return block.number + (config.num_hidden_layers if block.stage == "mtp" else 0)


Choices = dict[Block, Int[Tensor, "tokens chosen"]]
"""The experts of every token, by block."""


class Window(NamedTuple):
    """Tokens read together, from an empty context."""

    ids: Int[Tensor, "tokens"]
    start: int
    """Position of the first token."""

    @property
    def positions(self) -> Int[Tensor, "tokens"]:
        return torch.arange(self.start, self.start + len(self.ids))


@dataclass(kw_only=True, slots=True)
class Trace:
    """One window through one implementation. Tensors are on the CPU, fp32 or fp64."""

    dtype: torch.dtype
    """Number type of the activations they were computed in."""
    cached: torch.dtype | None = None
    """Number type of cached rows; None: the activations'."""
    parts: dict[Place, Tensor] = field(default_factory=dict)
    """What is compared."""
    evidence: dict[Place, Tensor] = field(default_factory=dict)
    """What else `blame` needs: inputs and weights of the steps where mistakes are known. Parts of
    these places have names of their own: scale, chosen, gate_weight, gate_bias, embedded,
    carried, enorm, hnorm, eh_proj, eps."""

    def keep(self, block: Block, part: str, value: Tensor) -> None:
        """Record a part; the last value counts where a module runs twice."""
        self.parts[Place(block, part)] = wide(value)

    def note(self, block: Block, name: str, value: Tensor | float) -> None:
        """Record a piece of evidence."""
        if not isinstance(value, Tensor):
            value = torch.tensor(value, dtype=torch.float64)
        self.evidence[Place(block, name)] = wide(value)

    def get(self, block: Block, name: str) -> Tensor | None:
        """A part or a piece of evidence, None where it was not seen."""
        place = Place(block, name)
        return self.parts.get(place, self.evidence.get(place))

    def blocks(self) -> list[Block]:
        """Blocks with any record, in order."""
        found = {place.block for place in (*self.parts, *self.evidence)}
        return sorted(found, key=lambda block: (STAGES.index(block.stage), block.number))

    def choices(self) -> Choices:
        """The experts of every block with a gate."""
        chosen = {place.block: t for place, t in self.evidence.items() if place.part == "chosen"}
        return {block: tensor.to(torch.int64) for block, tensor in chosen.items()}


def wide(value: Tensor) -> Tensor:
    """A copy on the CPU: integers as they are, floats in fp32, or fp64 if they are fp64."""
    value = value.detach().cpu()
    if value.is_floating_point() and value.dtype != torch.float64:
        value = value.to(torch.float32)
    return value.clone().contiguous()


def save_trace(trace: Trace, path: Path) -> None:
    """Write a trace as safetensors: how another process hands it over."""
    kinds = {"parts": trace.parts, "evidence": trace.evidence}
    tensors = {
        f"{kind}/{place.block.stage}/{place.block.number}/{place.part}": value
        for kind, places in kinds.items()
        for place, value in places.items()
    }
    # safetensors refuses tensors without elements on some versions and shared memory on all
    save_file({name: value.clone() for name, value in tensors.items()}, path)


def load_trace(path: Path, dtype: torch.dtype) -> Trace:
    """Read what `save_trace` wrote."""
    trace = Trace(dtype=dtype)
    for name, value in load_file(path).items():
        kind, stage, number, part = name.split("/")
        place = Place(Block(stage, int(number)), part)
        (trace.parts if kind == "parts" else trace.evidence)[place] = value
    return trace
