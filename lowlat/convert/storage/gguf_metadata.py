"""Metadata that a conversion to GGUF takes over from its source, byte for byte and in place.

The source is a GGUF file, or a folder made from one (`checkpoint.gguf.kept_metadata`). Keys that
describe what has changed are computed: the architecture's keys after a change of the model or of
its attention's layout, the vocabulary after a change of the folder's tokenizer.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from lowlat.checkpoint.gguf.file import GGUFFile
from lowlat.checkpoint.gguf.kept_metadata import LAYOUT_KEYS, METADATA_FILE
from lowlat.checkpoint.gguf.layout import GGUFTensorSpec
from lowlat.checkpoint.gguf.metadata_mla import ABSORBED
from lowlat.checkpoint.gguf.metadata_reader import architecture, hf_config
from lowlat.checkpoint.gguf.metadata_writer import gguf_keys
from lowlat.checkpoint.gguf.split import open_parts
from lowlat.checkpoint.hf_folder import contained, open_checkpoint
from lowlat.checkpoint.load import read_config
from lowlat.checkpoint.save import text_files
from lowlat.config.hf.reader import config_from_hf
from lowlat.config.model import ModelConfig

VOCABULARY = "tokenizer."
"""Beginning of the vocabulary's keys."""
SETTINGS = "generation_config.json"
"""The one file of `text_files` that GGUF does not hold."""


class KeptMetadata(NamedTuple):
    """Entries to copy."""

    entries: dict[str, bytes]
    """As `GGUFFile.entry`, by key and in order."""
    has_vocabulary: bool
    """Whether the vocabulary is among them, or the source GGUF file has none."""


@dataclass(frozen=True, slots=True)
class _Described:
    """The metadata kept in a folder, with the tensors of the file to write (`KeysAndTensors`)."""

    path: Path
    metadata: dict[str, Any]
    tensors: Mapping[str, GGUFTensorSpec]

    def read(self, name: str) -> Tensor:
        return next(iter(self.tensors[name].pieces()))


def kept_metadata(
    source: Path,
    config: ModelConfig,
    arch: str,
    keys: dict[str, Any],
    tensors: Sequence[GGUFTensorSpec],
) -> KeptMetadata:
    """What a file with `tensors` of the model `config`, with `keys` of architecture `arch`, takes
    over from `source`; takes out of `keys` what that makes superfluous.

    Raises UserError for a METADATA_FILE that is damaged.
    """
    if not source.is_dir():
        file, old, has_vocabulary = open_parts(source), read_config(open_checkpoint(source)), True
    elif (source / METADATA_FILE).is_file():
        file = GGUFFile(contained(source, METADATA_FILE))
        described = _Described(file.path, file.metadata, {each.name: each for each in tensors})
        raw = hf_config(described, config.vocab_size)
        old = config_from_hf(raw, source=str(file.path))
        has_vocabulary = _has_same_text(file.path, source) and _ends(old) == _ends(config)
    else:
        return KeptMetadata({}, has_vocabulary=False)
    left_out = LAYOUT_KEYS
    own = {key for key in keys if key.startswith(f"{arch}.")}
    is_absorbed = f"{arch}.attention.key_length_mla" in file.metadata
    is_same_layout = is_absorbed == (arch in ABSORBED)
    size = f"{arch}.vocab_size"
    is_same_layout &= file.metadata.get(size, keys.get(size)) == keys.get(size)
    if is_same_layout and gguf_keys(old, arch) == {key: keys[key] for key in own}:
        for key in own:
            del keys[key]
    else:
        left_out = (*left_out, f"{architecture(file)}.")
    if not has_vocabulary:
        left_out = (*left_out, VOCABULARY)
    del keys["general.name"]
    entries = {key: file.entry(key) for key in file.metadata if not key.startswith(left_out)}
    return KeptMetadata(entries, has_vocabulary)


def _has_same_text(metadata: Path, folder: Path) -> bool:
    """Whether the folder's tokenizer and chat template are those of the kept metadata."""
    kept, own = text_files(metadata), text_files(folder)
    own.pop(SETTINGS, None)
    kept.pop(SETTINGS, None)
    return kept == own


def _ends(config: ModelConfig) -> tuple[int | None, tuple[int, ...]]:
    return config.bos_token_id, config.eos_token_ids
