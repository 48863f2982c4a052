"""Save a model as a checkpoint in the Hugging Face layout: config.json, safetensors shards, index.

Owns sharding and the files next to the weights; the folder appears complete or not at all
(`utils.atomic_files`).
"""

import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from lowlat.checkpoint.gguf.kept_metadata import METADATA_FILE, encode_metadata_of
from lowlat.checkpoint.mapping import operations
from lowlat.checkpoint.safetensors.writer import ShardWriter
from lowlat.checkpoint.shard_layout import INDEX_FILE, MAX_SHARD_BYTES, encode_index, shard_names
from lowlat.config.hf.writer import config_to_hf
from lowlat.config.model import ModelConfig
from lowlat.model.quant import packed_type
from lowlat.model.transformer import Transformer
from lowlat.text.folder import TIKTOKEN_FILE, TOOL_TEMPLATE_FILE
from lowlat.text.gguf_vocab import has_vocabulary
from lowlat.text.tokenizer import Tokenizer
from lowlat.utils.atomic_files import atomic_folder, write_new_file, write_new_files
from lowlat.utils.errors import UserError

COPIED_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    TIKTOKEN_FILE,
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    TOOL_TEMPLATE_FILE,
    "generation_config.json",
)
"""Files of a model folder, other than weights and config, that do not depend on the weights."""


def save_model(
    model: Transformer,
    config: ModelConfig,
    dst: Path,
    *,
    source: Path | None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write `model` as the folder `dst`; tokenizer files come from `source` (folder, .gguf, None).

    Loading `dst` restores every parameter bit for bit, packed weights included. Raises UserError
    as `write_checkpoint`.
    """
    config = replace(config, packing=packed_type(model))
    raw = config_to_hf(config)
    raw["dtype"] = str(model.embed_tokens.weight.dtype).removeprefix("torch.")
    tensors = file_tensors(config, model.state_dict())
    others = files_of_source(source) if source is not None else {}
    write_checkpoint(dst, raw, tensors, max_shard_bytes=max_shard_bytes, extra_files=others)


def file_tensors(
    config: ModelConfig, parameters: Mapping[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a checkpoint file, by Hugging Face names, from parameters by the model's."""
    for operation in operations(config, parameters):
        yield from operation.save(parameters.__getitem__)


def text_files(source: Path) -> dict[str, bytes]:
    """Tokenizer, chat template and generation settings of a folder or .gguf, by file name.

    Empty for a .gguf without vocabulary. Raises UserError if its tokenizer is not supported.
    """
    if source.is_dir():
        return {
            name: file.read_bytes() for name in COPIED_FILES if (file := source / name).is_file()
        }
    if not has_vocabulary(source):
        return {}
    with tempfile.TemporaryDirectory() as folder:
        Tokenizer.from_gguf(source).save(Path(folder))
        return {file.name: file.read_bytes() for file in sorted(Path(folder).iterdir())}


def files_of_source(source: Path) -> dict[str, bytes]:
    """All files, by name, that a folder takes over from its source, a folder or .gguf: those of
    `text_files`, and the metadata of the GGUF file that the model comes from.
    """
    files, kept = text_files(source), source / METADATA_FILE
    if not source.is_dir():
        return files | {METADATA_FILE: encode_metadata_of(source)}
    return files | ({METADATA_FILE: kept.read_bytes()} if kept.is_file() else {})


def write_checkpoint(
    dst: Path,
    config: Mapping[str, Any],
    tensors: Iterable[tuple[str, Tensor]],
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    extra_files: Mapping[str, bytes] | None = None,
) -> None:
    """Write the folder `dst`: config.json, `tensors` as they come, `extra_files` by name.

    One tensor is in memory at a time; a shard ends before the tensor that would make it larger than
    `max_shard_bytes`. `dst` appears complete or not at all (`atomic_folder`). Raises UserError if
    `dst` exists or for disk errors; exceptions of `tensors` pass through.
    """
    if max_shard_bytes < 1:
        raise UserError(f"max_shard_bytes {max_shard_bytes} must be at least 1")
    with atomic_folder(dst) as partial:
        _write_weights(partial, tensors, max_shard_bytes)
        write_new_file(partial / "config.json", [(json.dumps(config, indent=2) + "\n").encode()])
        write_new_files(partial, extra_files or {})


def _write_weights(
    folder: Path, tensors: Iterable[tuple[str, Tensor]], max_shard_bytes: int
) -> None:
    """Write all shards under their final names and, if there are several, the index."""
    shards = _write_shards(folder, tensors, max_shard_bytes)
    weight_map: dict[str, str] = {}
    for shard, name in zip(shards, shard_names(len(shards)), strict=True):
        shard.path.rename(folder / name)
        weight_map |= dict.fromkeys(shard.names, name)
    if len(shards) > 1:
        total = sum(shard.data_bytes for shard in shards)
        write_new_file(folder / INDEX_FILE, [encode_index(weight_map, total)])


def _write_shards(
    folder: Path, tensors: Iterable[tuple[str, Tensor]], max_shard_bytes: int
) -> list[ShardWriter]:
    """Write shards, at least one, under provisional names: their number is not known in advance."""
    shards = [ShardWriter(folder / "shard-1")]
    try:
        for name, tensor in tensors:
            size = shards[-1].data_bytes + tensor.numel() * tensor.dtype.itemsize
            full = size > max_shard_bytes or not shards[-1].has_room(name, tensor)
            if full and shards[-1].names:
                shards[-1].finish()
                shards.append(ShardWriter(folder / f"shard-{len(shards) + 1}"))
            shards[-1].add(name, tensor)
        shards[-1].finish()
    finally:
        shards[-1].close()
    return shards
