"""Model of `lowlat plan serve`: config and weight bytes of a preset or checkpoint."""

from dataclasses import dataclass

from lowlat.config.model import ModelConfig
from lowlat.config.parameter_count import count_parameters
from lowlat.config.presets import load_preset, preset_names
from lowlat.config.weight_memory import PACKED_DTYPES
from lowlat.plan.serving.weights import WeightBytes, dtype_weights, gguf_weights, stored_weights
from lowlat.utils.errors import UserError

DTYPES = ("fp32", "bf16", "fp8", *PACKED_DTYPES)
FEW_BITS = 6.5
"""Weights of fewer bits count as int4 where this machine is measured, others as int8."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ServedModel:
    """Config and weights of the model of a plan."""

    name: str
    config: ModelConfig
    weights: WeightBytes
    dtype: str
    """Data type of products: fp32, bf16, fp8."""
    stored: str
    """Data type of the weights."""

    @property
    def measured(self) -> str:
        """The dtype whose kernels are measured on this machine: the nearest one of quantized
        weights."""
        if self.stored in ("fp32", "bf16", *PACKED_DTYPES):
            return self.stored
        count = count_parameters(self.config)
        bits = 8 * self.weights.total(self.config) / (count.total + count.mtp)
        return "int4" if bits < FEW_BITS else "int8"


def served_model(name: str, dtype: str) -> ServedModel:
    """The model `name` with weights of `dtype`. Raises UserError for an unknown one."""
    if name in preset_names():
        config, stored = load_preset(name), None
        released = config.packing or ("bf16" if config.quantization is None else "fp8")
    else:
        from lowlat import api
        from lowlat.checkpoint.hf_folder import open_checkpoint
        from lowlat.checkpoint.load import read_config
        from lowlat.utils.device import dtype_name
        from lowlat.utils.progress import make_progress

        source = open_checkpoint(api.prepare(name, progress=make_progress()).absolute())
        config, stored = read_config(source), None
        if dtype == "auto":
            stored = stored_weights(source, config)
        plain = dtype_name(source.dtype("model.embed_tokens.weight"))
        released = config.packing or (plain if config.quantization is None else "fp8")
    if stored is not None:
        return ServedModel(
            name=name, config=config, weights=stored, dtype="bf16", stored="as stored"
        )
    own = released if dtype == "auto" else dtype
    if own in ("bf16", "fp16"):
        # packed weights stay packed
        own = config.packing or "bf16"
    if own in DTYPES:
        weights, products = dtype_weights(config, own), own
    else:
        weights, products = gguf_weights(config, gguf_bits(own)), "bf16"
    products = products if products in ("fp32", "fp8") else "bf16"
    return ServedModel(name=name, config=config, weights=weights, dtype=products, stored=own)


def gguf_bits(name: str) -> float:
    """Bits per weight of the GGUF type `name`. Raises UserError for an unknown one."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        columns, size = GGML_QUANT_SIZES[GGMLQuantizationType[name.upper()]]
    except KeyError:
        known = ", ".join((*DTYPES, "auto"))
        raise UserError(
            f"--dtype '{name}' is unknown; choose {known}, or a GGUF type such as Q4_K, Q8_0"
        ) from None
    return 8 * size / columns
