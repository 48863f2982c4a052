"""Typed access to the keys of an architecture in GGUF metadata, and which keys have no effect."""

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, Protocol, final, runtime_checkable

from torch import Tensor

from lowlat.utils.errors import UserError
from lowlat.utils.strict_json import quoted

IGNORED = (
    "tensor_data_layout",
    "rope.scaling.finetuned",
    "attention.causal",
    "attention.layer_norm_epsilon",
    "decoder_start_token_id",
    "expert_shared_feed_forward_length",
    "pooling_type",
    "vocab_size",
)
"""Keys below the architecture without effect; sizes of weights are those of the tensors."""
NEUTRAL: dict[str, tuple[float, ...]] = {
    "activation_sparsity_scale": (0, 1),
    "attention.clamp_kqv": (0,),
    "attention.max_alibi_bias": (0,),
    "attention.output_scale": (0, 1),
    "attention.scale": (0,),
    "attention.shared_kv_layers": (0,),
    "attention.temperature_scale": (0,),
    "attn_logit_softcapping": (0,),
    "embedding_scale": (0, 1),
    "expert_group_scale": (0, 1),
    "experts_per_group": (0,),
    "final_logit_softcapping": (0,),
    "interleave_moe_layer_step": (0, 1),
    "logit_scale": (0, 1),
    "moe_every_n_layers": (0, 1),
    "n_deepstack_layers": (0,),
    "rescale_every_n_layers": (0,),
    "residual_scale": (0, 1),
    "rope.scale_linear": (0, 1),
    "rope.scaling.alpha": (0, 1),
    "rope.scaling.attn_factor": (0, 1),
    "rope.scaling.yarn_attn_factor": (1,),
    "rope.scaling.yarn_ext_factor": (-1, 1),
    "router_logit_softcapping": (0,),
    "swiglu_clamp_exp": (0,),
    "swiglu_clamp_shexp": (0,),
    "swin_norm": (0,),
    "use_parallel_residual": (0, 1),
}
"""Keys that converters write for every architecture, and the values without effect (llama.cpp's
loader). Lists have one value per layer."""
WHOLE = "one whole number >= 0"

_REQUIRED: Any = object()


@runtime_checkable
class KeysAndTensors(Protocol):
    """What the config of a model is read from: a `GGUFFile`, or metadata kept in a folder together
    with the tensors of the file to write.
    """

    @property
    def path(self) -> Path:
        """Named in errors."""
        ...

    @property
    def metadata(self) -> dict[str, Any]:
        """Values by key."""
        ...

    @property
    def tensors(self) -> Collection[str]:
        """Names of all tensors."""
        ...

    def read(self, name: str) -> Tensor:
        """A tensor of the RoPE."""
        ...


@final
class Keys:
    """Typed access to the architecture's keys; tracks which were read."""

    def __init__(self, file: KeysAndTensors, arch: str):
        self.path = file.path
        self.prefix = f"{arch}."
        self.values = {
            key.removeprefix(self.prefix): value
            for key, value in file.metadata.items()
            if key.startswith(self.prefix)
        }
        self.read = {key for key in self.values if key in IGNORED or self._is_neutral(key)}

    def error(self, key: str, problem: str) -> UserError:
        return UserError(f"{self.path}: key {self.prefix + key!r} {problem}")

    def integer(self, key: str, default: Any = _REQUIRED) -> Any:
        return self._checked(key, default, lambda v: type(v) is int and 0 <= v < 2**31, WHOLE)

    def number(self, key: str, default: Any = _REQUIRED) -> Any:
        return self._checked(key, default, lambda v: type(v) in (int, float), "a number")

    def text(self, key: str, default: str) -> str:
        return self._checked(key, default, lambda v: isinstance(v, str), "a text")

    def boolean(self, key: str, default: bool) -> bool:
        return self._checked(key, default, lambda v: isinstance(v, bool), "true or false")

    def numbers(self, key: str) -> list[int] | None:
        """A list of 0 and 1, or of false and true; None if absent."""
        return self._checked(
            key, None, lambda v: isinstance(v, list) and set(v) <= {0, 1}, "a list of 0 and 1"
        )

    def reject_unread(self) -> None:
        unread = [key for key in self.values if key not in self.read]
        if unread:
            raise self.error(
                unread[0], "is unknown and may change the computation; this model is not supported"
            )

    def _is_neutral(self, key: str) -> bool:
        value = self.values[key]
        numbers = value if isinstance(value, list) else [value]
        return all(number in NEUTRAL.get(key, ()) for number in numbers)

    def _checked(
        self, key: str, default: Any, is_valid: Callable[[Any], bool], expected: str
    ) -> Any:
        self.read.add(key)
        if key not in self.values:
            if default is _REQUIRED:
                raise self.error(key, "is missing; convert the model with a current llama.cpp")
            return default
        value = self.values[key]
        if not is_valid(value):
            raise self.error(key, f"is {quoted(str(value))}, not {expected}")
        return value
