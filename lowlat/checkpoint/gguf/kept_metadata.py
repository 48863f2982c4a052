"""Metadata of a GGUF file next to safetensors: `gguf_metadata.bin` of a model folder.

A folder made from a GGUF file has no other place for keys such as the model's licence, imatrix
notes, exact vocabulary scores or keys of other programs. The file is a GGUF header without tensors:
every key with its type and bytes, in order. `convert.storage.gguf_metadata` writes the keys into
the next GGUF file.
"""

from pathlib import Path

from lowlat.checkpoint.gguf.layout import encode_metadata
from lowlat.checkpoint.gguf.split import open_parts

METADATA_FILE = "gguf_metadata.bin"
LAYOUT_KEYS = ("general.alignment", "split.")
"""Beginnings of keys that describe a file, not its model."""


def encode_metadata_of(source: Path) -> bytes:
    """The content of METADATA_FILE for a folder made from the GGUF model `source`. Raises UserError
    as `open_parts`.
    """
    file = open_parts(source)
    names = [key for key in file.metadata if not key.startswith(LAYOUT_KEYS)]
    return encode_metadata([file.entry(key) for key in names])
