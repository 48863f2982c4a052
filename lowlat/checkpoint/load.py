"""Load a checkpoint into a model: build on the meta device, check names and shapes, then fill.

Casting and quantize on load are in `fill_parameters`, file formats in `hf_folder` and
`gguf.source`, tensor names in `mapping`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from lowlat.checkpoint.dequantized_source import dequantized_source
from lowlat.checkpoint.fill_parameters import fill_parameters
from lowlat.checkpoint.hf_folder import open_checkpoint
from lowlat.checkpoint.mapping import (
    check_tensors,
    file_name,
    operations,
    resolve_mtp_modules,
)
from lowlat.checkpoint.mapping_operations import Operation, Shapes
from lowlat.checkpoint.stored_blocks import Readers, read_blocks, store_blocks
from lowlat.checkpoint.tensor_source import TensorSource
from lowlat.config.hf.reader import config_from_hf
from lowlat.config.model import ModelConfig, Packing
from lowlat.config.weight_memory import weight_bytes
from lowlat.model.quant import PACKED, store_packed
from lowlat.model.share import ModelShare
from lowlat.model.transformer import Transformer
from lowlat.ops import native
from lowlat.utils.device import parse_device, parse_dtype
from lowlat.utils.errors import UserError
from lowlat.utils.memory import is_larger_than_memory, memory_limit
from lowlat.utils.progress import Progress, SilentProgress

EMBEDDING = "embed_tokens.weight"


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadedModel:
    """A model filled from a checkpoint."""

    model: Transformer
    """All parameters in place."""
    config: ModelConfig
    """As found: MTP modules and their copies as in the file; without quantization and packing if
    the weights were dequantized.
    """
    path: Path
    """The folder or .gguf file."""


def load_model(
    checkpoint: Path | TensorSource,
    *,
    dtype: str = "auto",
    device: str = "cpu",
    keeps_blocks: bool = False,
    divide: Callable[[ModelConfig], ModelShare] | None = None,
    progress: Progress | None = None,
) -> LoadedModel:
    """Load the model of `checkpoint`: a Hugging Face folder or a .gguf file, or one opened before.

    dtype: "auto" keeps every tensor as stored (fp8 blocks included; GGUF's block formats and the
    quantized weights of `checkpoint.vendors` become fp32); fp64, fp32, bf16 and fp16 cast all of
    them; int8 and int4 quantize the projections
    (`model.quant`) and cast the rest to bf16. Router biases are always fp32. Packed weights stay
    packed for auto, bf16 and their own dtype; for others they are dequantized. With `keeps_blocks`
    so do matrices of these two kinds for auto and bf16, where native kernels run; other tensors of
    their file then become bf16. `divide` chooses this process's share of the model, by default all
    of it; only its weights are read.

    Nothing is allocated before all names and shapes match. On the CPU a tensor that needs no change
    stays a copy-on-write view of the memory-mapped file: it takes no memory until it is used, and
    in-place changes never reach the file (`MappedFile` documents truncated files). Peak memory is
    the model, its largest tensor and a constant.

    Raises UserError naming file and tensor for anything missing, left over, misshapen or of a dtype
    that no weight has. Also for a router bias that is not finite, and if the weights that `dtype`
    creates do not fit into memory.
    """
    place = parse_device(device)
    opened = open_weights(checkpoint, dtype)
    source, config = opened.source, opened.config
    model = _empty_model(config, source)
    if opened.packing is not None:
        model.add_head()
    parameters = model.state_dict()
    plan = operations(config, parameters, stored=opened.file, source=source)
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    check_tensors(config, source, plan, shapes)
    part = 1.0
    if divide is not None:
        model.keep_share(divide(config))
        kept = _filled_parameters(model)
        plan = [step for step in plan if kept.keys() & set(step.parameters())]
        part = sum(map(Tensor.numel, kept.values())) / sum(map(math.prod, shapes.values()))
    readers: Readers = {}
    if keeps_blocks and place.type == "cpu" and opened.can_keep_blocks:
        has_head = model.lm_head is not None
        readers = store_blocks(model, plan, source, part=part, has_head=has_head)
    if place.type == "cpu":
        _check_memory(opened, plan, shapes, readers, part)
    progress = progress or SilentProgress()
    filled = read_parameters(
        opened, model, plan, shapes, readers, place, progress, rows_of=model.rows_of
    )
    _add_empty_embedding(filled, model, opened, readers, place)
    model.load_state_dict(filled, strict=True, assign=True)
    model.weight_files = opened.stored.files
    return LoadedModel(model=model, config=config, path=opened.stored.path)


@dataclass(frozen=True, kw_only=True, slots=True)
class OpenedWeights:
    """A checkpoint to be loaded as `dtype`."""

    dtype: str
    stored: TensorSource
    source: TensorSource
    """`stored`, or its dequantized weights."""
    file: ModelConfig
    """The config of `stored`."""
    config: ModelConfig
    """The config of `source`."""

    @property
    def packing(self) -> Packing | None:
        """The quantized storage that loading creates."""
        return _packing_of(self.dtype) if self.config.packing is None else None

    @property
    def can_keep_blocks(self) -> bool:
        """Whether the native kernels compute on quantized weights as stored."""
        return self.dtype in ("auto", "bf16") and native.available()

    def wanted(self, readers: Readers) -> torch.dtype | None:
        """The dtype of plain weights; None: as stored."""
        if readers:
            return torch.bfloat16
        is_packed = _packing_of(self.dtype) is not None
        return None if self.dtype == "auto" else parse_dtype("bf16" if is_packed else self.dtype)


def open_weights(checkpoint: Path | TensorSource, dtype: str) -> OpenedWeights:
    """Open a checkpoint, to be loaded as `dtype`."""
    form = _packing_of(dtype)
    wanted = None if dtype == "auto" else parse_dtype("bf16" if form else dtype)
    stored = checkpoint if isinstance(checkpoint, TensorSource) else open_checkpoint(checkpoint)
    source = stored
    file = config = resolve_mtp_modules(read_config(source), source)
    is_packed, keeps = config.packing is not None, dtype in ("auto", "bf16", config.packing)
    if (is_packed and not keeps) or (config.quantization is not None and wanted is not None):
        # quantization rounds once, from the exact values
        multiplied = torch.float32 if form or wanted is None else wanted
        source, config = dequantized_source(source, config, multiplied)
    return OpenedWeights(dtype=dtype, stored=stored, source=source, file=file, config=config)


def read_parameters(
    opened: OpenedWeights,
    model: nn.Module,
    plan: list[Operation],
    shapes: Shapes,
    readers: Readers,
    place: torch.device,
    progress: Progress,
    *,
    rows_of: Callable[[str, Tensor], Tensor],
) -> dict[str, Tensor]:
    """The unfilled parameters of `model`, a Transformer or parts of one: those of `readers` by
    them, the others by `plan`. rows_of: the rows of a parameter that this process has."""
    form = opened.packing
    parameters = _filled_parameters(model)
    packed = store_packed(model, form) if form else {}

    def own_rows(name: str, tensor: Tensor) -> Tensor:
        # quantize on load takes rows that are not in tiles yet
        return tensor[packed[name].part] if name in packed else rows_of(name, tensor)

    plan = [step for step in plan if not readers.keys() & set(step.parameters())]
    filled = fill_parameters(
        *(opened.source, plan, parameters, opened.wanted(readers), place, progress, packed),
        shapes=shapes,
        rows_of=own_rows,
    )
    return filled | read_blocks(readers, parameters, progress)


def _filled_parameters(model: nn.Module) -> dict[str, Tensor]:
    """The parameters to read from the checkpoint: all but an embedding without rows."""
    return {name: tensor for name, tensor in model.state_dict().items() if len(tensor) > 0}


def _add_empty_embedding(
    filled: dict[str, Tensor],
    model: Transformer,
    opened: OpenedWeights,
    readers: Readers,
    place: torch.device,
) -> None:
    """Add to `filled` the embedding of a share that has no rows of it."""
    if len(embedding := model.embed_tokens.weight) == 0:
        kind = opened.wanted(readers) or opened.source.dtype(file_name(opened.config, EMBEDDING))
        filled[EMBEDDING] = torch.empty(embedding.shape, dtype=kind, device=place)


def _packing_of(dtype: str) -> Packing | None:
    """The packing that `dtype` names."""
    return next((packing for packing in PACKED if packing == dtype), None)


def read_config(source: TensorSource) -> ModelConfig:
    """The config of a checkpoint. Raises UserError naming file and field."""
    return config_from_hf(source.hf_config, source=str(config_file(source)))


def config_file(source: TensorSource) -> Path:
    """The file that holds the config of a checkpoint."""
    return source.path / "config.json" if source.path.is_dir() else source.path


def _check_memory(
    opened: OpenedWeights, plan: list[Operation], shapes: Shapes, readers: Readers, part: float
) -> None:
    """Raise UserError if the weights that loading creates in memory do not fit: unlike views of a
    file they cannot be dropped and read again. part: share of all weights that is loaded.
    """
    stored, source, wanted = opened.stored, opened.source, opened.wanted(readers)
    if opened.packing is not None:
        made = weight_bytes(opened.config, opened.packing) * part
    else:
        steps = [step for step in plan if not readers.keys() & set(step.parameters())]
        names = [name for step in steps for name in step.file_shapes(shapes)]
        sizes = (
            math.prod(source.shape(name)) * (wanted or source.dtype(name)).itemsize
            for name in names
            if stored.dtype(name) != (wanted or source.dtype(name))
        )
        made = sum(sizes)
    if is_larger_than_memory(int(made)):
        raise UserError(
            f"{source.path}: --dtype {opened.dtype} makes {made / 1e9:,.1f} GB of weights in "
            f"memory, and {memory_limit() / 1e9:,.1f} GB are there; use --dtype auto, which "
            "memory-maps the checkpoint"
        )


def _empty_model(config: ModelConfig, source: TensorSource) -> Transformer:
    """The model on the meta device. Raises UserError for sizes that the file cannot fill."""
    layers, experts = config.num_cache_layers, 0
    if config.moe is not None and layers <= len(source.names()):
        experts = config.moe.n_routed_experts * sum(map(config.is_moe_layer, range(layers)))
    for what, count in (
        ("num_hidden_layers", layers),
        ("n_routed_experts of all layers:", experts),
    ):
        if count > len(source.names()):
            raise UserError(
                f"{source.path}: {what} {count} is more than there are tensors "
                f"({len(source.names())})"
            )
    try:
        with torch.device("meta"):
            return Transformer(config)
    except (RuntimeError, OverflowError) as error:
        # on the meta device only sizes beyond 64 bits fail
        raise UserError(f"{source.path}: the config's sizes are too large: {error}") from error
