"""Trace: the intermediate results (parts) of one implementation, in common shapes and layouts.

Names the parts, in order of computation. `observe` records them, `differences` compares them.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from safetensors.torch import load_file, save_file
from torch import Tensor

from lowlat.config.model import ModelConfig

LAYER_PARTS = (
    "input_norm",  # [T, hidden]: output of the input norm
    "q",  # [T, H, d_qk]: queries before RoPE (after QK-norm), channels in file order
    "latent",  # [T, d_c]: MLA: the cached latent
    "k",  # [T, G, d]: keys before RoPE; MLA: the shared one, G = 1, d = r
    "index_scores",  # [T, T]: DSA: scores of the indexer; 0 where masked
    "index_choice",  # [T, T]: DSA: 1 for the tokens that a query attends to
    "v",  # [T, G, d_v]: values; MLA: of every head
    "q_rotated",  # [T, H, d_qk]: RoPE channels last, in canonical order: real parts of all
    "k_rotated",  # [T, G, d]: pairs, then imaginary parts, for every pairing in files
    "scores",  # [H, T, T]: scaled scores before the softmax; 0 where masked
    "heads",  # [T, H, d_v]: attention output of every head
    "attention",  # [T, hidden]: output of o_proj
    "mid_residual",  # [T, hidden]: residual stream between attention and MLP
    "post_norm",  # [T, hidden]: its norm: input of router and MLP
    "router_scores",  # [T, experts]: unbiased scores of all experts
    "routing_weights",  # [T, experts]: weights of the selected experts, 0 for the others
    "routed",  # [T, hidden]: weighted sum of the selected experts
    "shared",  # [T, hidden]: shared experts
    "mlp",  # [T, hidden]: output of MLP or MoE
    "residual",  # [T, hidden]: the layer's output
)
"""Parts of a layer, in order of computation, for T tokens, H heads, G key-value heads and r RoPE
channels.
"""
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
        """Sort key: order of computation."""
        stage, number = self.block
        return STAGES.index(stage), number, PARTS[stage].index(self.part)

    def __str__(self) -> str:
        return self.part if self.block.stage == self.part else f"{self.block} {self.part}"


EMBEDDING, OUTPUT = Block("embedding"), Block("output")


def block_of(config: ModelConfig, layer: int) -> Block:
    """The block of layer `layer` of the KV cache, which numbers MTP modules after the layers."""
    count = config.num_hidden_layers
    return Block("layer", layer) if layer < count else Block("mtp", layer - count)


def layer_number(config: ModelConfig, block: Block) -> int:
    """Inverse of `block_of`."""
    return block.number + (config.num_hidden_layers if block.stage == "mtp" else 0)


RoutedExperts = dict[Block, Int[Tensor, "tokens chosen"]]
"""The experts of every token, by block."""


ChosenTokens = dict[Block, Bool[Tensor, "tokens tokens"]]
"""The tokens that each query attends to (DSA), by block."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ImposedChoices:
    """Choices of another run, by block, in place of an implementation's own."""

    experts: RoutedExperts = field(default_factory=dict)
    tokens: ChosenTokens = field(default_factory=dict)


NONE_IMPOSED = ImposedChoices()


class Window(NamedTuple):
    """Tokens that run together, from an empty context."""

    ids: Int[Tensor, "tokens"]
    start: int
    """Position of the first token."""

    @property
    def positions(self) -> Int[Tensor, "tokens"]:
        return torch.arange(self.start, self.start + len(self.ids))


@dataclass(kw_only=True, slots=True)
class Trace:
    """Parts of one window in one implementation. Tensors are on the CPU, fp32 or fp64."""

    dtype: torch.dtype
    """Data type of the activations."""
    cached: torch.dtype | None = None
    """Data type of the KV cache; None: that of the activations."""
    parts: dict[Place, Tensor] = field(default_factory=dict)
    """The compared parts."""
    evidence: dict[Place, Tensor] = field(default_factory=dict)
    """Inputs and weights of audited steps, by additional names: scale, chosen, gate_weight,
    gate_bias, embedded, carried, enorm, hnorm, eh_proj, eps, and of indexers index_q, index_k,
    index_norm, index_norm_bias, index_head_weight.
    """

    def record(self, block: Block, part: str, value: Tensor) -> None:
        """Record a part; a second run of its module overwrites it."""
        self.parts[Place(block, part)] = wide(value)

    def record_evidence(self, block: Block, name: str, value: Tensor | float) -> None:
        """Record an input or weight for the diagnosis."""
        if not isinstance(value, Tensor):
            value = torch.tensor(value, dtype=torch.float64)
        self.evidence[Place(block, name)] = wide(value)

    def get(self, block: Block, name: str) -> Tensor | None:
        """A part or evidence; None if it was not recorded."""
        place = Place(block, name)
        return self.parts.get(place, self.evidence.get(place))

    def blocks(self) -> list[Block]:
        """Blocks with any record, in order."""
        found = {place.block for place in (*self.parts, *self.evidence)}
        return sorted(found, key=lambda block: (STAGES.index(block.stage), block.number))

    def selected_experts(self) -> RoutedExperts:
        """The experts of every block with a gate."""
        chosen = {place.block: t for place, t in self.evidence.items() if place.part == "chosen"}
        return {block: tensor.to(torch.int64) for block, tensor in chosen.items()}

    def chosen_tokens(self) -> ChosenTokens:
        """The choice of every block with sparse attention."""
        return {p.block: t > 0 for p, t in self.parts.items() if p.part == "index_choice"}


def wide(value: Tensor) -> Tensor:
    """A copy on the CPU: integers unchanged, floats in fp32 (fp64 stays fp64)."""
    value = value.detach().cpu()
    if value.is_floating_point() and value.dtype != torch.float64:
        value = value.to(torch.float32)
    return value.clone().contiguous()


def save_trace(trace: Trace, path: Path) -> None:
    """Write a trace as safetensors, to pass it between processes."""
    kinds = {"parts": trace.parts, "evidence": trace.evidence}
    tensors = {
        f"{kind}/{place.block.stage}/{place.block.number}/{place.part}": value
        for kind, places in kinds.items()
        for place, value in places.items()
    }
    # safetensors rejects shared memory, and in some versions empty tensors
    save_file({name: value.clone() for name, value in tensors.items()}, path)


def load_trace(path: Path, dtype: torch.dtype) -> Trace:
    """Read a trace written by `save_trace`."""
    trace = Trace(dtype=dtype)
    for name, value in load_file(path).items():
        kind, stage, number, part = name.split("/")
        place = Place(Block(stage, int(number)), part)
        (trace.parts if kind == "parts" else trace.evidence)[place] = value
    return trace
