"""FP8 training of a model (DeepSeek-V3 section 3.3): which layers, in which formats, and the
checkpoints it saves.

In FP8: every linear layer of attention and MLP, routed and shared experts included. As they are:
embedding, head, gate, norms, attention itself, and eh_proj of MTP modules, which released
checkpoints keep in bf16. Products are `ops.fp8_training`'s.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lowlat.checkpoint.mapping import ROUTER_BIAS, SCALE_SUFFIX
from lowlat.checkpoint.save import MAX_SHARD_BYTES, file_tensors, text_files, write_checkpoint
from lowlat.config.hf.reader import config_to_hf
from lowlat.config.model import ModelConfig, QuantConfig
from lowlat.model.gla import GLA
from lowlat.model.linear import Linear
from lowlat.model.moe import MoE, StackedExperts
from lowlat.model.quant import PLAIN
from lowlat.model.transformer import Transformer
from lowlat.ops.fp8 import quantize_blocks
from lowlat.ops.fp8_experts import ExpertFormats, fp8_stacked_experts
from lowlat.ops.fp8_training import SQUARE, Fp8Format, ScaleFormat
from lowlat.ops.routing import Routing
from lowlat.utils.errors import UserError


class Fp8Experts(nn.Module):
    """`StackedExperts` with its products in FP8: the same parameters under the same names."""

    def __init__(self, experts: StackedExperts, formats: ExpertFormats) -> None:
        super().__init__()
        self.formats = formats
        self.gate_up_proj = experts.gate_up_proj
        self.down_proj = experts.down_proj

    def forward(
        self, x: Float[Tensor, "tokens hidden"], routing: Routing
    ) -> Float[Tensor, "tokens hidden"]:
        return fp8_stacked_experts(x, routing, self.gate_up_proj, self.down_proj, self.formats)


def use_fp8(model: Transformer, scale_fmt: ScaleFormat = None) -> None:
    """Let the products of `model` run in FP8, forward and backward; its parameters stay as they
    are, as master copies. Experts must be stacked before, if they are to be.

    The paper's scales are fp32 but for three kinds of tiles, which are powers of two: inputs of the
    linears after attention (of which the backward pass gets E5M6), inputs of the routed experts,
    and gradients before their down-projections. `scale_fmt` "ue8m0" makes all scales powers of two,
    as the checkpoints of DeepSeek-V3.1 say of theirs.
    kv_b_proj of GLA, which attention multiplies with, stays as it is. Raises UserError for weights
    that are packed, or fp8 in blocks of another size.
    """
    spared = {module.kv_b_proj for module in model.modules() if isinstance(module, GLA)}
    for name, module in list(model.named_modules()):
        if isinstance(module, MoE) and isinstance(module.experts, StackedExperts):
            module.add_module("experts", Fp8Experts(module.experts, expert_formats(scale_fmt)))
        elif isinstance(module, Linear) and module not in spared:
            _check(name, module)
            module.fp8 = _format(name.split("."), scale_fmt)


def expert_formats(scale_fmt: ScaleFormat) -> ExpertFormats:
    """How routed experts quantise: scales of what is sent between devices are powers of two."""
    base = _base(scale_fmt)
    return ExpertFormats(
        up=replace(base, input_scales="ue8m0"), down=replace(base, gradient_scales="ue8m0")
    )


def _check(name: str, linear: Linear) -> None:
    if linear.storage not in ("plain", "fp8") or linear.block not in (None, SQUARE):
        kind = linear.storage if linear.block is None else f"fp8 in blocks of {linear.block}"
        raise UserError(f"{name} is {kind}; load the model with --dtype fp32 to compute in FP8")


def _format(path: list[str], scale_fmt: ScaleFormat) -> Fp8Format | None:
    """Of the layer at `path`; None for those that stay as they are."""
    if path[-1] in PLAIN:
        return None
    if path[-1] == "o_proj":
        return replace(_base(scale_fmt), input_scales="ue8m0", kept_input="e5m6")
    if "experts" in path:
        formats = expert_formats(scale_fmt)
        return formats.down if path[-1] == "down_proj" else formats.up
    return _base(scale_fmt)


def _base(scale_fmt: ScaleFormat) -> Fp8Format:
    return Fp8Format(weight_scales=scale_fmt, input_scales=scale_fmt, gradient_scales=scale_fmt)


def save_fp8(
    config: ModelConfig,
    parameters: Mapping[str, Tensor],
    dst: Path,
    *,
    source: Path | None,
    scale_fmt: ScaleFormat = None,
    dtype: torch.dtype = torch.bfloat16,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> ModelConfig:
    """Write `parameters` (names of a model without stacked experts) as the folder `dst` in the
    layout of released FP8 checkpoints; returns the config written.

    Weights that FP8 training quantises become fp8 with weight_scale_inv per 128x128 block, the very
    ones its products use; all others are rounded to `dtype`, router biases stay fp32. Tokenizer
    files come from `source` (folder, .gguf, None). One quantised tensor is in memory at a time.
    Raises UserError as `write_checkpoint`, and naming a weight that is not finite.
    """
    quantized = replace(config, quantization=QuantConfig(scale_fmt=scale_fmt))
    raw = config_to_hf(quantized)
    raw["dtype"] = str(dtype).removeprefix("torch.")
    stored = Fp8Parameters(quantized, parameters, dtype)
    with_text = text_files(source) if source is not None else {}
    write_checkpoint(
        dst,
        raw,
        file_tensors(quantized, stored),
        max_shard_bytes=max_shard_bytes,
        extra_files=with_text,
    )
    return quantized


class Fp8Parameters(Mapping[str, Tensor]):
    """The parameters a model loaded from an FP8 checkpoint has, made from master copies when they
    are asked for.
    """

    def __init__(
        self, config: ModelConfig, masters: Mapping[str, Tensor], dtype: torch.dtype
    ) -> None:
        assert config.quantization is not None
        self._quant = config.quantization
        self._masters = masters
        self._dtype = dtype
        with torch.device("meta"):
            self._stored = Transformer(config, dtype=dtype).state_dict()

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)

    def __getitem__(self, name: str) -> Tensor:
        if name.endswith(SCALE_SUFFIX):
            return self._blocks(name.removesuffix(SCALE_SUFFIX))[1]
        if self._stored[name].dtype == torch.float8_e4m3fn:
            return self._blocks(name)[0]
        dtype = torch.float32 if name.endswith(ROUTER_BIAS) else self._dtype
        return self._masters[name].detach().to(dtype)

    def _blocks(self, name: str) -> tuple[Tensor, Tensor]:
        weight = self._masters[name].detach()
        if not bool(weight.isfinite().all()):
            raise UserError(f"{name} has values that are not finite; export an earlier state")
        return quantize_blocks(weight, self._quant.weight_block_size, self._quant.scale_fmt)
