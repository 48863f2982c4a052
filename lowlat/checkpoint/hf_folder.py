"""Open a checkpoint: a Hugging Face folder (one safetensors file or indexed shards) or a GGUF file.

Owns which files belong to a model and that they agree with the index; the files themselves are read
by `safetensors.reader` and `gguf.source`.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from torch import Tensor

from lowlat.checkpoint.gguf.source import open_gguf
from lowlat.checkpoint.language_part import language_part
from lowlat.checkpoint.mapped_file import MappedFile
from lowlat.checkpoint.safetensors.reader import SafetensorsFile
from lowlat.checkpoint.shard_layout import INDEX_FILE, SINGLE_FILE
from lowlat.checkpoint.tensor_source import StoredTensor, TensorSource
from lowlat.checkpoint.vendors.source import vendor_source
from lowlat.checkpoint.vendors.stacked_experts import split_fp8_experts
from lowlat.utils.errors import UserError
from lowlat.utils.gguf_parts import existing_parts
from lowlat.utils.strict_json import MAX_JSON_BYTES, parse_object, quoted


def open_checkpoint(path: Path) -> TensorSource:
    """Open the checkpoint at `path`: read and check every header, touch no tensor data.

    Raises UserError naming the file (and tensor) that is missing, damaged or outside the folder.
    """
    if path.suffix.lower() == ".gguf" and not path.is_dir():
        return open_gguf(path)
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    if not path.is_dir():
        raise UserError(f"{path}: is neither a model folder nor a .gguf file")
    return _open_folder(path)


def weight_files(path: Path) -> list[Path]:
    """The weight files of the checkpoint at `path`, all parts if it is a split GGUF model; other
    files in a folder are ignored.

    Raises UserError for a folder without weights and for a malformed index.
    """
    if not path.is_dir():
        return existing_parts(path)
    if (path / SINGLE_FILE).exists():
        return [path / SINGLE_FILE]
    return [path / shard for shard in sorted(set(_weight_map(path).values()))]


@final
@dataclass(frozen=True, slots=True)
class _FileTensor(StoredTensor):
    """A tensor as a safetensors file holds it."""

    file: SafetensorsFile
    name: str

    @property
    def where(self) -> str:
        return f"{self.file.path}: tensor {quoted(self.name)}"

    def read(self) -> Tensor:
        return self.file.read(self.name)

    def rows(self, start: int, stop: int) -> Tensor:
        return self.read()[start:stop]

    def release(self) -> None:
        self.file.release(self.name)


def _open_folder(folder: Path) -> TensorSource:
    """A folder with config.json and `model.safetensors`, or shards named by an index."""
    config = read_json(contained(folder, "config.json"))
    if (folder / SINGLE_FILE).exists():
        file = SafetensorsFile(contained(folder, SINGLE_FILE))
        files = dict.fromkeys(file.extents, file)
    else:
        files = _open_shards(folder)
    tensors = {
        name: _FileTensor(file.extents[name].shape, file.extents[name].dtype, file, name)
        for name, file in files.items()
    }
    versions = tuple(dict.fromkeys(file.version for file in files.values()))
    source = language_part(TensorSource(folder, config, tensors, versions))
    return vendor_source(split_fp8_experts(source))


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises UserError if it is missing, too large or invalid."""
    file = MappedFile(path)
    if file.size > MAX_JSON_BYTES:
        raise UserError(f"{path}: {file.size} bytes are too many for a JSON file of a model")
    return parse_object(file.bytes(0, file.size), str(path))


def contained(folder: Path, name: str) -> Path:
    """The real path of file `name` of a model folder, links followed.

    A link must stay inside the folder, or lead to the blobs next to the snapshots of a hub cache
    (models--ORG--NAME/snapshots/REVISION/FILE -> ../../blobs/HASH). Raises UserError otherwise,
    and where the file does not exist.
    """
    home = Path(os.path.realpath(folder))
    real = Path(os.path.realpath(folder / name))
    roots = [home]
    if home.parent.name == "snapshots":
        roots.append(home.parent.parent / "blobs")
    if not any(real.is_relative_to(root) for root in roots):
        raise UserError(
            f"{folder / name}: is a link to a place outside the model folder; copy the file instead"
        )
    if not real.exists():
        raise UserError(f"{folder / name}: the file is missing; download it again")
    return real


def _open_shards(folder: Path) -> dict[str, SafetensorsFile]:
    """Tensor name -> shard, in the index's order. Index and shards must name the same tensors."""
    index, weight_map = folder / INDEX_FILE, _weight_map(folder)
    shards = {
        name: SafetensorsFile(contained(folder, name)) for name in sorted(set(weight_map.values()))
    }
    for tensor, shard in weight_map.items():
        if tensor not in shards[shard].extents:
            raise UserError(
                f"{index}: tensor {quoted(tensor)} is not in {shard}, where the index puts it"
            )
    for shard, file in shards.items():
        for tensor in file.extents:
            if weight_map.get(tensor) != shard:
                raise UserError(
                    f"{folder / shard}: tensor {quoted(tensor)} is here, but not according to "
                    f"{index}"
                )
    return {tensor: shards[shard] for tensor, shard in weight_map.items()}


def _weight_map(folder: Path) -> dict[str, str]:
    """The shard of every tensor. Raises UserError without an index, or for a malformed one."""
    where = folder / INDEX_FILE
    if not where.exists():
        raise UserError(_no_weights(folder))
    weight_map = read_json(contained(folder, INDEX_FILE)).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{where}: weight_map must be an object that maps tensors to shard files")
    for tensor, shard in weight_map.items():
        if not isinstance(shard, str) or not _plain_name(shard):
            raise UserError(
                f"{where}: tensor {quoted(tensor)}: shard {quoted(str(shard))} is not the plain "
                "name of a .safetensors file"
            )
    return weight_map


def _plain_name(name: str) -> bool:
    printable = name.isprintable() and not set(name) & set("/\\:")
    return (
        printable
        and name.endswith(".safetensors")
        and not name.startswith(".")
        and len(name) <= 255
    )


def _no_weights(folder: Path) -> str:
    if any(folder.glob("pytorch_model*.bin")):
        return (
            f"{folder}: only pickle weights (pytorch_model*.bin), which can run code; save the "
            "model as safetensors"
        )
    return f"{folder}: neither {SINGLE_FILE} nor {INDEX_FILE} is there; the model is incomplete"
