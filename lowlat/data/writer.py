"""Writer of a tokenized dataset's files: token shards, document ends, loss masks, with checksums.

`build` makes the folder appear complete or not at all (`atomic_folder`).
"""

import hashlib
import json
from pathlib import Path

import numpy as np

from lowlat.data.manifest import (
    MANIFEST_FILE,
    TOKENIZER_FILES,
    DatasetManifest,
    ShardManifest,
    Split,
    SplitManifest,
    ends_file,
    mask_file,
    shard_file,
    to_json,
)
from lowlat.text.tokenizer import Tokenizer

SHARD_TOKENS = 1 << 28
"""Ids per file: half a gigabyte of 16-bit ids."""


class SplitWriter:
    """Writes the files of one split. Raises OSError."""

    def __init__(
        self, folder: Path, split: Split, dtype: np.dtype, shard_tokens: int = SHARD_TOKENS
    ) -> None:
        self.tokens = 0
        self.documents = 0
        self._folder, self._dtype = folder, dtype
        self._split: Split = split
        self._shard_tokens = shard_tokens
        self._shards: list[ShardManifest] = []
        self._shard: _HashedFile | None = None
        self._ends = _HashedFile(folder / ends_file(split))
        self._mask: _MaskFile | None = None
        self._text_bytes = 0

    def add(self, ids: np.ndarray, loss_mask: np.ndarray | None = None) -> None:
        """Append tokens of the current document; without `loss_mask` all are targets."""
        if loss_mask is not None and self._mask is None:
            self._mask = _MaskFile(self._folder / mask_file(self._split))
            self._mask.add_targets(self.tokens)
        if self._mask is not None:
            targets = np.ones(len(ids), np.bool_) if loss_mask is None else loss_mask
            self._mask.add(targets)
        self.tokens += len(ids)
        data = ids.astype(self._dtype)
        while len(data):
            if self._shard is None:
                name = shard_file(self._split, len(self._shards))
                self._shard = _HashedFile(self._folder / name)
            room = self._shard_tokens - self._shard.size // self._dtype.itemsize
            self._shard.write(data[:room].tobytes())
            data = data[room:]
            if len(data):
                self._finish_shard()

    def end_document(self, text_bytes: int) -> None:
        """End the current document, of `text_bytes` bytes of text."""
        self.documents += 1
        self._text_bytes += text_bytes
        self._ends.write(self.tokens.to_bytes(8, "little"))

    def finish(self) -> SplitManifest:
        """Close all files; returns the manifest. A split without documents leaves no files."""
        if self._shard is not None:
            self._finish_shard()
        ends = self._ends.finish()
        if not self.documents:
            self._ends.path.unlink()
        return SplitManifest(
            documents=self.documents,
            tokens=self.tokens,
            predicted=self.tokens if self._mask is None else self._mask.targets,
            text_bytes=self._text_bytes,
            shards=tuple(self._shards),
            ends_sha256=ends,
            mask_sha256=None if self._mask is None else self._mask.finish(),
        )

    def close(self) -> None:
        """Close the files, complete or not."""
        for file in (self._shard, self._ends, self._mask):
            if file is not None:
                file.close()

    def _finish_shard(self) -> None:
        assert self._shard is not None
        name, tokens = self._shard.path.name, self._shard.size // self._dtype.itemsize
        self._shards.append(ShardManifest(file=name, tokens=tokens, sha256=self._shard.finish()))
        self._shard = None


def write_tokenizer(folder: Path, tokenizer: Tokenizer) -> dict[str, str]:
    """Write the files of `tokenizer`; returns their SHA-256 by name. Raises OSError."""
    tokenizer.save(folder)
    return {
        name: hashlib.sha256(path.read_bytes()).hexdigest()
        for name in TOKENIZER_FILES
        if (path := folder / name).is_file()
    }


def write_manifest(folder: Path, manifest: DatasetManifest) -> None:
    """Write tokens.json. Raises OSError."""
    text = json.dumps(to_json(manifest), indent=2, ensure_ascii=False) + "\n"
    (folder / MANIFEST_FILE).write_text(text, encoding="utf-8")


class _HashedFile:
    """A file that hashes what is written to it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = 0
        self._digest = hashlib.sha256()
        self._file = path.open("xb")

    def write(self, data: bytes) -> None:
        self._file.write(data)
        self._digest.update(data)
        self.size += len(data)

    def finish(self) -> str:
        self._file.flush()
        self.close()
        return self._digest.hexdigest()

    def close(self) -> None:
        self._file.close()


class _MaskFile:
    """Bits in a file, lowest first."""

    def __init__(self, path: Path) -> None:
        self.targets = 0
        self._file = _HashedFile(path)
        self._rest = np.zeros(0, np.bool_)

    def add_targets(self, count: int) -> None:
        """Append `count` set bits."""
        step = 1 << 24
        for first in range(0, count, step):
            self.add(np.ones(min(step, count - first), np.bool_))

    def add(self, bits: np.ndarray) -> None:
        self.targets += int(bits.sum())
        bits = np.concatenate((self._rest, bits))
        whole = len(bits) // 8 * 8
        self._file.write(np.packbits(bits[:whole], bitorder="little").tobytes())
        self._rest = bits[whole:]

    def finish(self) -> str:
        self._file.write(np.packbits(self._rest, bitorder="little").tobytes())
        return self._file.finish()

    def close(self) -> None:
        self._file.close()
