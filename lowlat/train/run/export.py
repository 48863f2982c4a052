"""Export of a training checkpoint as a model folder in the Hugging Face layout, or as a LoRA
adapter.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from lowlat.checkpoint.mapping import ROUTER_BIAS, SCALE_SUFFIX, mtp_copies
from lowlat.checkpoint.save import file_tensors, text_files, write_checkpoint
from lowlat.config.hf.reader import config_from_hf
from lowlat.config.hf.writer import config_to_hf
from lowlat.config.model import ModelConfig, QuantConfig
from lowlat.model.transformer import Transformer
from lowlat.ops.fp8 import quantize_blocks
from lowlat.ops.fp8_training import ScaleFormat
from lowlat.train.checkpoints.checkpoint import TrainingCheckpoint, folder_name
from lowlat.train.checkpoints.run_folder import RunFolder
from lowlat.train.checkpoints.store import CheckpointStore
from lowlat.train.inputs.model_files import teacher_fingerprint, weights_fingerprint
from lowlat.train.layers.stacked_experts import unstacked
from lowlat.train.parallel.mesh import ProcessMesh
from lowlat.train.recipe.schema import Recipe, parse_recipe
from lowlat.train.run.adapter import write_adapter
from lowlat.train.run.build import load_base_model
from lowlat.train.run.state import MODEL, part
from lowlat.train.step.lora import base_dtype, merged
from lowlat.utils.atomic_files import atomic_folder, write_new_files
from lowlat.utils.device import parse_dtype
from lowlat.utils.errors import UserError
from lowlat.utils.progress import Progress

TOKENIZER = "tokenizer"
"""Folder in a run folder with the tokenizer and chat template of its models."""

STORED = ("bf16", "fp16", "fp32", "fp8")
"""Data types of exported models."""

_log = logging.getLogger(__name__)


def keep_tokenizer(run: Path, text: Path) -> None:
    """Copy tokenizer and chat template of the folder or .gguf `text` into the run folder. Raises
    UserError if writing fails.
    """
    folder = run / TOKENIZER
    if folder.exists():
        return
    files = text_files(text)
    with atomic_folder(folder) as partial:
        write_new_files(partial, files)


def refuse_older_model(model: Path, mesh: ProcessMesh) -> None:
    """Raises UserError if a run without checkpoints has an exported model: its checkpoints were
    deleted. Collective.
    """
    if mesh.broadcast(int(model.exists())):
        raise UserError(
            f"{model}: exists, but the checkpoints of its run are gone; move it away, or choose "
            "another --out"
        )


def export(
    config: ModelConfig, weights: Mapping[str, Tensor], dst: Path, *, dtype: str, text: Path
) -> None:
    """Write `weights` (parameters of a model, with stacked experts) as the folder `dst`.

    dtype: fp32, bf16, fp16, or fp8 for 128x128 blocks as in released DeepSeek-V3 weights; routing
    biases stay fp32. With config.mtp_copies every MTP module gets copies of embedding and head, as
    in released weights. Tokenizer and chat template come from the folder `text`. Raises UserError
    as `write_checkpoint`.
    """
    parameters = dict(unstacked(weights))
    if config.mtp_copies:
        parameters = mtp_copies(config, parameters) | parameters
    if dtype == "fp8":
        save_fp8(config, parameters, dst, source=text)
        return
    stored = parse_dtype(dtype)
    raw = config_to_hf(config) | {"dtype": str(stored).removeprefix("torch.")}
    tensors = (
        (name, tensor if name.endswith(ROUTER_BIAS) else tensor.to(stored))
        for name, tensor in file_tensors(config, parameters)
    )
    write_checkpoint(dst, raw, tensors, extra_files=text_files(text))


def save_fp8(
    config: ModelConfig,
    parameters: Mapping[str, Tensor],
    dst: Path,
    *,
    source: Path | None,
    scale_fmt: ScaleFormat = None,
    dtype: torch.dtype = torch.bfloat16,
) -> ModelConfig:
    """Write `parameters` (names of a model without stacked experts) as the folder `dst` in the
    layout of released FP8 checkpoints; returns the written config.

    Weights that FP8 training quantizes are stored as fp8 with weight_scale_inv per 128x128 block,
    bit-identical to the training's. Other weights are rounded to `dtype`; router biases stay fp32.
    Tokenizer files come from `source` (folder, .gguf, None). One quantized tensor is in memory at a
    time. Raises UserError as `write_checkpoint`, and naming a weight that is not finite.
    """
    quantized = replace(config, quantization=QuantConfig(scale_fmt=scale_fmt))
    raw = config_to_hf(quantized)
    raw["dtype"] = str(dtype).removeprefix("torch.")
    stored = _Fp8Parameters(quantized, parameters, dtype)
    with_text = text_files(source) if source is not None else {}
    write_checkpoint(dst, raw, file_tensors(quantized, stored), extra_files=with_text)
    return quantized


class _Fp8Parameters(Mapping[str, Tensor]):
    """Parameters of an FP8 checkpoint, quantized lazily from the master weights."""

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


def export_save(
    run: Path,
    dst: Path,
    *,
    step: int | None,
    dtype: str,
    progress: Progress | None = None,
) -> int:
    """Write a checkpoint of the run folder `run` as the model folder `dst`, LoRA updates merged.

    step: that of the checkpoint; None is the latest intact one. Returns it. Raises UserError if
    there is no such checkpoint or dtype, and as `export`.
    """
    if dtype not in STORED:
        raise UserError(f"--dtype '{dtype}' is unknown; choose one of {', '.join(STORED)}")
    save = open_save(run, step, progress)
    config, recipe, weights = contents(save)
    if recipe.lora is not None:
        base = load_base_model(base_model_of(save), config, base_dtype(recipe)).state_dict()
        weights = dict(merged(base | weights, recipe.lora))
    config = replace(config, mtp_copies=bool(save.metadata.get("mtp_copies")))
    export(config, weights, dst, dtype=dtype, text=run / TOKENIZER)
    return save.step


def export_adapter(
    run: Path, dst: Path, *, step: int | None, progress: Progress | None = None
) -> int:
    """Write the LoRA updates of a checkpoint in peft's layout as the folder `dst`; returns its
    step.

    Raises UserError if `run` did not train with LoRA, and as `write_adapter`.
    """
    save = open_save(run, step, progress)
    config, recipe, updates = contents(save)
    if recipe.lora is None:
        raise UserError(f"{run}: was trained without lora; leave out --adapter")
    write_adapter(
        config, updates, recipe.lora, dst, base_model=Path(str(save.metadata["base_model"]))
    )
    return save.step


def open_save(run: Path, step: int | None, progress: Progress | None = None) -> TrainingCheckpoint:
    """Checkpoint of `step` in the run folder `run`, or its latest intact one. Raises UserError."""
    if not run.is_dir():
        raise UserError(f"{run}: no such folder; name the folder of a run")
    saves = CheckpointStore(RunFolder(run), report=_log.warning)
    if step is not None and step not in saves.steps():
        there = ", ".join(map(str, saves.steps()))
        remedy = f"--step may be {there}" if there else "it has none yet"
        raise UserError(f"{run}: has no checkpoint of step {step}; {remedy}")
    save = (
        saves.latest(progress)
        if step is None
        else TrainingCheckpoint(saves.folder / folder_name(step))
    )
    if save is None:
        raise UserError(f"{run}: has no checkpoint yet")
    return save


def contents(save: TrainingCheckpoint) -> tuple[ModelConfig, Recipe, dict[str, Tensor]]:
    """Model config, recipe and parameters of a checkpoint."""
    config = config_from_hf(dict(save.metadata["config"]), source=str(save.folder))
    recipe = parse_recipe(dict(save.metadata["recipe"]), origin=str(save.folder))
    tensors = {name: save.tensor(name) for name in save.names() if name.startswith(MODEL)}
    return config, recipe, part(tensors, MODEL)


def teacher_of(save: TrainingCheckpoint) -> Path:
    """Teacher that `save` was trained with. Raises UserError if it is missing or has changed."""
    path = save.metadata.get("teacher_files")
    if path is None:
        raise UserError(f"{save.folder}: has no path of its teacher; train another step")
    return _unchanged(Path(str(path)), teacher_fingerprint, save.metadata["teacher"], save)


def base_model_of(save: TrainingCheckpoint) -> Path:
    """The frozen base model of a LoRA run. Raises UserError if it is missing or has changed."""
    base_model = Path(str(save.metadata["base_model"]))
    return _unchanged(base_model, weights_fingerprint, save.metadata["data"][-1], save)


def _unchanged(
    path: Path, fingerprint: Callable[[Path], str], known: object, save: TrainingCheckpoint
) -> Path:
    """`path`, if its fingerprint is `known`. Raises UserError."""
    if not path.exists() or fingerprint(path) != known:
        what = "has other weights now" if path.exists() else "does not exist"
        raise UserError(f"{path}: {what}; restore the weights that {save.folder} was trained with")
    return path
