"""Hugging Face folder output of a conversion: data types, and tensors in chunks of rows.

A chunk is a range of rows of one parameter, so memory is bounded for tensors of any size.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial, reduce
from typing import Literal, final

import torch
from torch import Tensor

from lowlat.checkpoint.fill_parameters import check_packed, fit
from lowlat.checkpoint.mapping import ROUTER_BIAS, SCALE_SUFFIX, file_name, operations
from lowlat.checkpoint.mapping_operations import Operation, Rename
from lowlat.checkpoint.safetensors.writer import TensorSpec
from lowlat.checkpoint.shard_layout import TensorGroup
from lowlat.config.hf.families import LOWLAT
from lowlat.config.model import MLAConfig, ModelConfig, QuantConfig
from lowlat.convert.parameters.weights import Weights, parameter_shapes
from lowlat.convert.quantization.activations import ActivationStatistics
from lowlat.model.linear import Linear, Storage, pack
from lowlat.model.transformer import Transformer
from lowlat.ops.calibrated_quantization import Importance
from lowlat.ops.fp8 import quantize_blocks
from lowlat.utils.device import DTYPES
from lowlat.utils.errors import UserError

StorageType = Literal["fp32", "bf16", "fp16", "fp8", "int8", "int4"]
"""Data types of a stored model."""
PLAIN = {name: DTYPES[name] for name in ("fp32", "bf16", "fp16")}
CHUNK_ELEMENTS = 2**22
"""Approximate elements of a chunk."""
ROW_STEP = 128
"""Chunks have a multiple of this many rows: whole fp8 blocks and tiles."""
PARTS = ("weight", f"weight{SCALE_SUFFIX}", "weight_scale", "weight_minimum")
"""Tensors of a projection, in file order; most types have only some of them."""


def stored_config(config: ModelConfig, storage_type: StorageType | None) -> ModelConfig:
    """`config` with the storage fields of `storage_type`; None and plain types have none."""
    if storage_type == "int8" or storage_type == "int4":
        return replace(config, packing=storage_type)
    if storage_type == "fp8":
        return replace(
            config, quantization=QuantConfig(modules_to_not_convert=_plain_modules(config))
        )
    return config


def stored_groups(
    weights: Weights,
    storage_type: StorageType | None,
    statistics: ActivationStatistics | None = None,
) -> Iterator[TensorGroup]:
    """The tensors of a folder, in order. storage_type: None keeps every tensor's data type.
    statistics: of the activations, for int8 and int4.

    Chunks raise UserError, naming the tensor, for values out of range.
    """
    return _Folder(weights, storage_type, statistics).groups()


def plain_dtype(weights: Weights, parameter: str, storage_type: StorageType | None) -> torch.dtype:
    """The data type of a parameter that is not quantised: bf16 in a quantised model; router
    biases are always fp32.
    """
    if parameter.endswith(ROUTER_BIAS):
        return torch.float32
    return (
        weights.dtype(parameter)
        if storage_type is None
        else PLAIN.get(storage_type, torch.bfloat16)
    )


def row_pieces(
    weights: Weights, parameter: str, shape: tuple[int, ...], to: Callable[[Tensor], Tensor]
) -> Iterator[Tensor]:
    """Apply `to` to the parameter in chunks of rows, then release the parameter."""
    count = shape[0]
    step = max(CHUNK_ELEMENTS // shape[-1] // ROW_STEP, 1) * ROW_STEP if len(shape) > 1 else count
    for start in range(0, count, step):
        yield to(weights.rows(parameter, start, min(start + step, count)))
    weights.release(parameter)


@final
class _Folder:
    """Plans the tensors of a folder."""

    def __init__(
        self,
        weights: Weights,
        storage_type: StorageType | None,
        statistics: ActivationStatistics | None,
    ) -> None:
        self._weights = weights
        self._statistics = statistics
        self._storage_type: StorageType | None = storage_type
        self._config = stored_config(weights.config, storage_type)
        self._shapes = parameter_shapes(weights.config)
        with torch.device("meta"):
            model = Transformer(self._config, dtype=torch.bfloat16)
        self._stored = model.state_dict()
        self._storages: dict[str, Storage] = {
            f"{path}.weight": module.storage
            for path, module in model.named_modules()
            if isinstance(module, Linear) and module.storage != "plain"
        }

    def groups(self) -> Iterator[TensorGroup]:
        for step in operations(self._config, self._stored):
            if not isinstance(step, Rename):
                yield self._padded(step)
            elif step.parameter in self._storages:
                yield self._quantized(step)
            elif not step.parameter.endswith(PARTS[1:]):  # written with their weight
                yield self._plain(step)

    def _plain(self, step: Rename) -> TensorGroup:
        name, shape = step.parameter, self._shapes[step.parameter]
        dtype = plain_dtype(self._weights, name, self._storage_type)
        cast = partial(self._fit, name, dtype)
        return TensorGroup(
            (TensorSpec(step.file, dtype, shape),),
            lambda: row_pieces(self._weights, name, shape, cast),
        )

    def _padded(self, step: Operation) -> TensorGroup:
        """A layer's attention with a padded latent."""
        names = step.parameters()
        kinds = {plain_dtype(self._weights, name, self._storage_type) for name in names}
        dtype = reduce(torch.promote_types, kinds)
        files = step.file_shapes(self._shapes)

        def pieces() -> Iterator[Tensor]:
            def read(name: str) -> Tensor:
                return self._fit(name, dtype, self._weights.read(name))

            for (name, tensor), expected in zip(step.save(read), files, strict=True):
                assert name == expected
                yield tensor
            for name in names:
                self._weights.release(name)

        return TensorGroup(
            tuple(TensorSpec(name, dtype, shape) for name, shape in files.items()), pieces
        )

    def _quantized(self, step: Rename) -> TensorGroup:
        """A projection in fp8 blocks or packed: the weight, then its scales."""
        storage, prefix = self._storages[step.parameter], step.parameter.removesuffix("weight")
        parts = [part for part in PARTS if prefix + part in self._stored]
        tensors = [
            TensorSpec(file_name(self._config, prefix + part), own.dtype, tuple(own.shape))
            for part in parts
            for own in [self._stored[prefix + part]]
        ]
        # a tied head is packed separately from the embedding that it is made of
        tied = step.parameter == "lm_head.weight" and self._config.tie_word_embeddings
        source = "embed_tokens.weight" if tied else step.parameter

        def quantized(rows: Tensor) -> Tensor:
            where = self._weights.where(source)
            if storage == "fp8":
                made = self._blocks(rows, where)
            else:
                importance = None
                if self._statistics is not None:
                    importance = partial(self._statistics.of, step.parameter, rows.shape[1])
                made = _packed(rows, storage, where, importance)
            for part in parts[1:]:
                scales[part].append(made[part])
            return made["weight"]

        scales: dict[str, list[Tensor]] = {part: [] for part in parts[1:]}

        def pieces() -> Iterator[Tensor]:
            for own in scales.values():
                own.clear()
            yield from row_pieces(self._weights, source, self._shapes[source], quantized)
            for own in scales.values():
                yield torch.cat(own)
                own.clear()

        return TensorGroup(tuple(tensors), pieces)

    def _blocks(self, rows: Tensor, where: str) -> Mapping[str, Tensor]:
        quant = self._config.quantization
        assert quant is not None
        weight, scale = quantize_blocks(rows, quant.weight_block_size, quant.scale_fmt)
        if not bool(scale.isfinite().all()):
            raise UserError(f"{where} has values that are not finite; use --dtype bf16")
        return {"weight": weight, f"weight{SCALE_SUFFIX}": scale}

    def _fit(self, name: str, dtype: torch.dtype, tensor: Tensor) -> Tensor:
        return fit(tensor, name, self._weights.where(name), False, dtype)


def _packed(
    rows: Tensor, storage: Storage, where: str, importance: Callable[[], Importance] | None
) -> Mapping[str, Tensor]:
    parts = pack(rows, storage, importance=importance)
    check_packed(parts, storage, where)
    return parts


def _plain_modules(config: ModelConfig) -> tuple[str, ...]:
    """Modules that an fp8 model stores in bf16, in addition to those of released checkpoints:
    padded attention, whose constants and zeros fp8 blocks would round.
    """
    attention = config.attention
    if not isinstance(attention, MLAConfig) or attention.kv_a_layernorm:
        return ()
    if config.model_type == LOWLAT:
        return ()
    names = ["q_a_proj", "q_b_proj"] if attention.q_bias else ["q_proj"]
    names += ["kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]
    layers = [f"model.layers.{layer}.self_attn" for layer in range(config.num_cache_layers)]
    # the module for programs that match prefixes, its projections for those that do not
    return tuple(kept for layer in layers for kept in (layer, *(f"{layer}.{n}" for n in names)))
