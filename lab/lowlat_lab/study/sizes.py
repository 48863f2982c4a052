"""Model sizes and training lengths of studies, by name."""

from dataclasses import dataclass, replace

from lowlat.utils.errors import UserError


@dataclass(frozen=True, kw_only=True, slots=True)
class StudySize:
    """Model dimensions, training length and evaluation length of a study."""

    name: str
    """Value of --size."""
    hidden_size: int
    """Width of the residual stream, num_attention_heads times head_dim."""
    num_hidden_layers: int
    """Decoder layers."""
    num_attention_heads: int
    """Query heads of every attention variant."""
    intermediate_size: int
    """MLP width with MHA; other variants have the width that equalises the parameters."""
    width_step: int
    """MLP widths are multiples of this."""
    moe_intermediate_size: int
    """Width of an expert, in studies of MoE models."""
    sequence_length: int
    """Tokens of a sequence."""
    batch_size: int
    """Sequences of an optimizer step."""
    micro_batch_size: int
    """Sequences of a forward and backward pass."""
    steps: int
    """Optimizer steps of a run."""
    learning_rate: float
    """Peak learning rate of Muon."""
    held_out_windows: int
    """Maximum number of held-out windows to measure the loss on."""
    decode_contexts: tuple[int, ...]
    """Tokens in the KV cache when decoding is timed."""

    @property
    def head_dim(self) -> int:
        """Channels of a head, d_h."""
        return self.hidden_size // self.num_attention_heads

    @property
    def tokens_per_step(self) -> int:
        """Input tokens of a step."""
        return self.batch_size * self.sequence_length


TINY = StudySize(
    name="tiny",
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=8,
    intermediate_size=176,
    width_step=2,
    moe_intermediate_size=32,
    sequence_length=64,
    batch_size=16,
    micro_batch_size=16,
    steps=30,
    learning_rate=8e-3,
    held_out_windows=128,
    decode_contexts=(1024,),
)
SMALL = StudySize(
    name="small",
    hidden_size=128,
    num_hidden_layers=4,
    num_attention_heads=8,
    intermediate_size=344,
    width_step=8,
    moe_intermediate_size=64,
    sequence_length=256,
    batch_size=16,
    micro_batch_size=16,
    steps=650,
    held_out_windows=1024,
    learning_rate=8e-3,
    decode_contexts=(8192,),
)
MEDIUM = StudySize(
    name="medium",
    hidden_size=256,
    num_hidden_layers=8,
    num_attention_heads=8,
    intermediate_size=704,
    width_step=8,
    moe_intermediate_size=64,
    sequence_length=512,
    batch_size=48,
    micro_batch_size=16,
    steps=1500,
    held_out_windows=1024,
    learning_rate=5e-3,
    decode_contexts=(8192,),
)
SMALL_1K = replace(
    SMALL,
    name="small-1k",
    sequence_length=1024,
    batch_size=4,
    micro_batch_size=4,
    steps=1221,
    held_out_windows=256,
    decode_contexts=(8192, 32768),
)
MEDIUM_1K = replace(
    MEDIUM,
    name="medium-1k",
    sequence_length=1024,
    batch_size=8,
    micro_batch_size=4,
    steps=610,
    held_out_windows=256,
    decode_contexts=(8192, 32768),
)
"""Sizes for long-range attention: 5M tokens in sequences of 1,024."""
SIZES = {size.name: size for size in (TINY, SMALL, MEDIUM, SMALL_1K, MEDIUM_1K)}


def find_size(name: str) -> StudySize:
    """The size `name`. Raises UserError, listing the known sizes, for an unknown one."""
    if name not in SIZES:
        raise UserError(f"--size '{name}' is unknown; choose one of {', '.join(SIZES)}")
    return SIZES[name]
