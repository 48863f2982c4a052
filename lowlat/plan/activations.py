"""Activation memory: bytes per token that a layer saves for its backward pass.

Follows `lowlat.model` in training: norms save their input, SwiGLU and experts their gate and up
products. With kernels 'torch', attention pads values to the width of keys and the router's input is
cast; with 'fused' neither.
"""

from dataclasses import dataclass
from functools import lru_cache

from lowlat.config.attention import (
    AttentionConfig,
    GLAConfig,
    GQAConfig,
    GTAConfig,
    MLAConfig,
    TPAConfig,
    computed_heads,
)
from lowlat.config.model import ModelConfig, MoEConfig
from lowlat.plan.job import Kernels, Precision, TrainingJob

FP32_BYTES = 4
FP8_BYTES = 1 + FP32_BYTES / 128
"""Bytes of an fp8 element, with one scale per 128 elements (DeepSeek-V3 section 3.3.2)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _SavedTensor:
    """A tensor saved for the backward pass."""

    name: str
    size: int | float
    """Bytes per token."""
    is_selective: bool = False
    """Whether selective activation checkpointing recomputes it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Sizes:
    """Bytes of tensors under a job."""

    precision: Precision
    kernels: Kernels
    load_margin: float
    row_copies: int
    """Devices that hold the tokens dispatched to an expert; 0 without expert parallelism, where
    they are gathered from the norm's output."""

    @property
    def element(self) -> int:
        """Bytes of an activation."""
        return FP32_BYTES if self.precision == "fp32" else 2

    @property
    def factor(self) -> float:
        """Bytes of an element of a product's input, and of SwiGLU's inputs."""
        return FP8_BYTES if self.precision == "fp8" else float(self.element)

    @property
    def is_fused(self) -> bool:
        return self.kernels == "fused"

    def norm(self, name: str, width: int) -> list[_SavedTensor]:
        """An RMSNorm over `width` channels: its input, and its output, a product's input."""
        return [
            _SavedTensor(name=f"{name} input", size=width * self.element + FP32_BYTES),
            _SavedTensor(name=f"{name} norm", size=width * self.factor, is_selective=True),
        ]

    def swiglu(self, name: str, width: int) -> list[_SavedTensor]:
        """silu(gate) * up of `width` channels."""
        return [
            _SavedTensor(name=f"{name} gate, up", size=2 * width * self.factor),
            _SavedTensor(name=f"{name} SwiGLU", size=width * self.factor, is_selective=True),
        ]


def layer_bytes(config: ModelConfig, layer: int, job: TrainingJob) -> dict[str, float]:
    """Saved activations of decoder layer `layer` in bytes per token, by tensor."""
    if job.activation_checkpointing == "full":
        return {"layer input": float(config.hidden_size * job.element_bytes)}
    return all_bytes(config, layer, job, selective=job.activation_checkpointing == "selective")


def all_bytes(
    config: ModelConfig, layer: int, job: TrainingJob, *, selective: bool
) -> dict[str, float]:
    """The same without activation checkpointing, or with selective (`train.layers.fused`)."""
    sizes = _Sizes(
        precision=job.precision,
        kernels=job.kernels,
        load_margin=job.load_margin,
        row_copies=job.layout.tensor if job.layout.expert > 1 else 0,
    )
    attention = config.attention_of(layer)
    return _kept_bytes(config, attention, config.is_moe_layer(layer), sizes, selective)


@lru_cache(maxsize=256)
def _kept_bytes(
    config: ModelConfig,
    attention: AttentionConfig,
    is_moe: bool,
    sizes: "_Sizes",
    selective: bool,
) -> dict[str, float]:
    kept = [
        *_attention(config.hidden_size, attention, sizes),
        *sizes.norm("MLP", config.hidden_size),
    ]
    if is_moe and config.moe is not None:
        kept += _moe(config.hidden_size, config.moe, sizes)
    else:
        kept += sizes.swiglu("MLP", config.intermediate_size)
    return {
        tensor.name: float(tensor.size)
        for tensor in kept
        if not (selective and tensor.is_selective)
    }


def _attention(hidden: int, attention: AttentionConfig, sizes: _Sizes) -> list[_SavedTensor]:
    kept = [
        *sizes.norm("attention", hidden),
        _SavedTensor(name="softmax sums", size=computed_heads(attention) * FP32_BYTES),
    ]
    heads, element = attention.num_attention_heads, sizes.element
    match attention:
        case MLAConfig() | GLAConfig():
            return [*kept, *_latents(attention, sizes), *_heads(attention, sizes)]
        case GQAConfig():
            keys_values = attention.entry_dim
        case GTAConfig():
            keys_values = attention.num_key_value_heads * 2 * attention.head_dim
        case TPAConfig():
            # The factors, and the heads computed from them.
            keys_values = attention.entry_dim + 2 * heads * attention.head_dim
    queries = heads * attention.head_dim
    return [
        *kept,
        _SavedTensor(name="queries, keys, values", size=element * (queries + keys_values)),
        _SavedTensor(name="attention output", size=element * queries),
    ]


def _latents(attention: MLAConfig | GLAConfig, sizes: _Sizes) -> list[_SavedTensor]:
    kept = []
    if attention.q_lora_rank is not None:
        kept += sizes.norm("query latent", attention.q_lora_rank)
    return [*kept, *sizes.norm("latent", attention.kv_lora_rank)]


def _heads(attention: MLAConfig | GLAConfig, sizes: _Sizes) -> list[_SavedTensor]:
    heads, width, own = computed_heads(attention), attention.qk_head_dim, attention.v_head_dim
    values = own if sizes.is_fused else max(width, own)
    # Padded outputs are copied without the padding.
    copied = own if values != own else 0
    has_latent = attention.q_lora_rank is not None
    is_gated = isinstance(attention, MLAConfig) and attention.attn_output_gate
    sized = (
        ("queries", width, has_latent),
        ("keys, values", width + values, True),
        ("attention output", values + copied, False),
        # The sigmoid, and its product with the attention output.
        ("attention output gate", 2 * own * is_gated, False),
    )
    return [
        _SavedTensor(name=name, size=sizes.element * heads * per_head, is_selective=is_selective)
        for name, per_head, is_selective in sized
    ]


def _moe(hidden: int, moe: MoEConfig, sizes: _Sizes) -> list[_SavedTensor]:
    width, chosen = moe.moe_intermediate_size, moe.num_experts_per_tok
    is_cast = sizes.kernels == "torch" and sizes.precision != "fp32"
    room = (1 + sizes.load_margin) * sizes.factor
    return [
        _SavedTensor(name="router scores", size=4 * moe.n_routed_experts * FP32_BYTES),
        _SavedTensor(name="router input", size=hidden * FP32_BYTES * is_cast),
        _SavedTensor(name="dispatched rows", size=sizes.row_copies * chosen * hidden * room),
        _SavedTensor(name="routed gate, up", size=2 * chosen * width * room),
        *sizes.swiglu("shared experts'", width * moe.n_shared_experts),
    ]
