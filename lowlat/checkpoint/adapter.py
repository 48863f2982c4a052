"""LoRA adapter files in PEFT's layout (adapter_config.json, adapter_model.safetensors): checked
against the model and read as low-rank updates of its projections.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lowlat.checkpoint.mapping import PLAIN_DTYPES, file_name
from lowlat.checkpoint.safetensors.reader import SafetensorsFile
from lowlat.config.hf.adapter import AdapterConfig, adapter_config
from lowlat.config.hf.families import LOWLAT
from lowlat.config.hf.padded_latent import padded_rank
from lowlat.config.model import GLAConfig, MLAConfig, ModelConfig
from lowlat.model.linear import Linear
from lowlat.model.lora import LowRankUpdate
from lowlat.model.transformer import Transformer
from lowlat.utils.bounded_read import read_bounded
from lowlat.utils.errors import UserError
from lowlat.utils.strict_json import MAX_JSON_BYTES, parse_object, quoted

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
A, B = ".lora_A.weight", ".lora_B.weight"


@dataclass(frozen=True, slots=True)
class Adapter:
    """A LoRA adapter: its updates by path of the projection in the model."""

    folder: Path
    updates: Mapping[str, LowRankUpdate]
    digest: bytes
    """SHA-256 of all that it computes with."""


def read_adapter(folder: Path, config: ModelConfig) -> Adapter:
    """The adapter in `folder` for a model of `config`.

    Raises UserError naming file and tensor or field for options that are not supported, for a
    tensor that does not belong to a projection of the model, and for shapes, dtypes and values that
    no update has.
    """
    where = folder / CONFIG_FILE
    try:
        data = read_bounded(where, MAX_JSON_BYTES, str(where))
    except OSError as error:
        raise UserError(
            f"{where}: cannot be read ({error.strerror}); give the folder of a LoRA adapter"
        ) from error
    raw = parse_object(data, str(where))
    settings = adapter_config(raw, str(where))
    if not (folder / WEIGHTS_FILE).exists() and (folder / "adapter_model.bin").exists():
        raise UserError(
            f"{folder / 'adapter_model.bin'}: only safetensors files are read; save the adapter "
            "with save_pretrained(..., safe_serialization=True)"
        )
    reader = _Reader(SafetensorsFile(folder / WEIGHTS_FILE), settings, config)
    modules = reader.modules()
    places = projections(config)
    if strange := [module for module in modules if module not in places]:
        raise reader.error(
            strange[0] + A, f"has no projection in a model of type {config.model_type}"
        )
    updates: dict[str, LowRankUpdate] = {}
    for module in modules:
        path, shape = places[module]
        updates[path] = reader.update(module, path, shape)
    return Adapter(folder, updates, _digest(updates))


def projections(config: ModelConfig) -> dict[str, tuple[str, tuple[int, int]]]:
    """Path and shape [out, in] in the model by name in checkpoint files, of all projections of
    decoder layers.
    """
    with torch.device("meta"):
        model = Transformer(config)
    return {
        file_name(config, f"{path}.").removesuffix("."): (
            path,
            (module.out_features, module.in_features),
        )
        for path, module in model.named_modules()
        if isinstance(module, Linear) and path.startswith("layers.")
    }


class _Reader:
    """Reads the tensors of an adapter file; every error names file and tensor."""

    def __init__(self, file: SafetensorsFile, settings: AdapterConfig, config: ModelConfig) -> None:
        self._file = file
        self._settings = settings
        self._config = config

    def error(self, name: str, problem: str) -> UserError:
        return UserError(f"{self._file.path}: tensor {quoted(PREFIX + name)} {problem}")

    def modules(self) -> list[str]:
        """Names of the updated modules, in order of the file."""
        found: dict[str, None] = {}
        for name in self._file.extents:
            own = name.removeprefix(PREFIX)
            module = own.removesuffix(A if own.endswith(A) else B)
            if own == name or module == own:
                raise UserError(
                    f"{self._file.path}: tensor {quoted(name)} is no lora_A or lora_B of a module "
                    f"under {PREFIX}; train the adapter with LoRA alone and save it with peft"
                )
            found[module] = None
        if not found:
            raise UserError(f"{self._file.path}: holds no tensors; save the adapter again")
        return list(found)

    def update(self, module: str, path: str, shape: tuple[int, int]) -> LowRankUpdate:
        """The update of a projection [out, in] of the model."""
        a, b = self._read(module + A), self._read(module + B)
        a, b = self._unpadded(module, path, a, b)
        rank = self._settings.rank_of(module)
        for name, own, expected in (
            (module + A, a, (rank, shape[1])),
            (module + B, b, (shape[0], rank)),
        ):
            if own.shape != expected:
                raise self.error(
                    name,
                    f"has shape {list(own.shape)}, but the model and r need {list(expected)}; "
                    "give an adapter of this model",
                )
        b = self._settings.scaling(module) * b
        if not bool(b.to(torch.bfloat16).isfinite().all()):
            raise self.error(module + B, "exceeds the range of bf16 with its scaling")
        return LowRankUpdate(a.contiguous(), b.contiguous())

    def _read(self, name: str) -> Tensor:
        extent = self._file.extents.get(PREFIX + name)
        if extent is None:
            raise self.error(name, "is missing; the adapter is incomplete, save it again")
        if extent.dtype not in PLAIN_DTYPES:
            shown = str(extent.dtype).removeprefix("torch.")
            raise self.error(name, f"is {shown}; save the adapter in float32, bfloat16 or float16")
        if len(extent.shape) != 2 or 0 in extent.shape:
            raise self.error(name, f"has shape {list(extent.shape)}, which is no matrix")
        # A copy: the file may change while the model is served.
        tensor = self._file.read(PREFIX + name).to(torch.float32, copy=True)
        self._file.release(PREFIX + name)
        if not bool(tensor.isfinite().all()):
            raise self.error(name, "holds values that are not finite; train the adapter again")
        return tensor

    def _unpadded(self, module: str, path: str, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """The update without the padding of latents in files of exactly converted models."""
        attention = self._config.attention
        projection = path.rpartition(".")[2]
        if isinstance(attention, GLAConfig) and projection == "kv_b_proj":
            raise self.error(module + A, "updates kv_b_proj of GLA, which is not supported")
        if not isinstance(attention, MLAConfig) or attention.kv_a_layernorm:
            return a, b
        if self._config.model_type == LOWLAT:
            return a, b
        rank, width = attention.kv_lora_rank, padded_rank(attention.kv_lora_rank)
        match projection:
            case "q_proj" if attention.q_bias:
                raise self.error(module + A, "updates q_proj, which the model's files do not have")
            case "kv_a_proj_with_mqa":
                self._require_zero(module + B, b[rank:width])
                b = torch.cat([b[:rank], b[width:]])
            case "kv_b_proj":
                self._require_zero(module + A, a[:, rank:])
                a = a[:, :rank]
        return a, b

    def _require_zero(self, name: str, padding: Tensor) -> None:
        if bool((padding != 0).any()):
            raise self.error(
                name,
                "updates padding of an exactly converted model's latent; train the adapter with "
                "lowlat",
            )


def _digest(updates: Mapping[str, LowRankUpdate]) -> bytes:
    """SHA-256 over paths, shapes and values."""
    content = hashlib.sha256(b"lowlat LoRA adapter")
    for path in sorted(updates):
        for tensor in (updates[path].a, updates[path].b):
            content.update(f"{path} {list(tensor.shape)}\n".encode())
            content.update(tensor.numpy().data)
    return content.digest()
