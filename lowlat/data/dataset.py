"""Reader of a tokenized dataset: memory-mapped files, validation, and random access to tokens.

`packing` decides the order of reads; `writer` writes the files.
"""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Int64, Integer

from lowlat.checkpoint.mapped_file import MappedFile
from lowlat.data.manifest import (
    MANIFEST_FILE,
    SPLITS,
    DatasetManifest,
    Split,
    ends_file,
    from_json,
    mask_file,
)
from lowlat.text.tokenizer import Tokenizer
from lowlat.utils.errors import UserError
from lowlat.utils.progress import Progress, SilentProgress, Task
from lowlat.utils.strict_json import parse_object

CHUNK = 1 << 22
"""Bytes hashed at once."""
REMEDY = "restore the file or build the folder again"


class TokenizedDataset:
    """Tokenized documents of one folder, memory-mapped read-only.

    Replacing a file does not affect an open dataset. Truncating a file crashes the process when it
    reads a lost page, so replace folders and never rewrite them in place.
    """

    def __init__(self, path: Path, manifest: DatasetManifest, fingerprint: str) -> None:
        """Use `open`."""
        self.path = path
        self.manifest = manifest
        self.fingerprint = fingerprint
        """SHA-256 of tokens.json, which has the checksums of all other files."""
        self._splits = {split: _MappedSplit(path, manifest, split) for split in SPLITS}

    @classmethod
    def open(cls, path: Path) -> "TokenizedDataset":
        """Open the folder `path` and check sizes and document ends; `verify` checks checksums.

        Raises UserError naming the file and the remedy.
        """
        file = path / MANIFEST_FILE
        if not path.is_dir():
            raise UserError(f"{path}: no such folder; build it with lowlat data build")
        if not file.is_file():
            raise UserError(f"{file}: not found; build the folder with lowlat data build")
        try:
            data = file.read_bytes()
        except OSError as error:
            raise UserError(f"{file}: cannot be read ({error.strerror})") from error
        manifest = from_json(parse_object(data, str(file)), str(file))
        return cls(path, manifest, hashlib.sha256(data).hexdigest())

    @property
    def vocab_size(self) -> int:
        """One more than the highest id of the tokenizer; every id in the dataset is smaller."""
        return self.manifest.vocab_size

    def num_tokens(self, split: Split) -> int:
        return self.manifest.splits[split].tokens

    def num_documents(self, split: Split) -> int:
        return self.manifest.splits[split].documents

    def num_bytes(self, split: Split) -> int:
        """UTF-8 bytes of the text of `split`."""
        return self.manifest.splits[split].text_bytes

    def has_mask(self, split: Split) -> bool:
        """Whether `split` has a loss mask: some tokens are no targets."""
        return self.manifest.splits[split].mask_sha256 is not None

    def tokenizer(self) -> Tokenizer:
        return Tokenizer.from_folder(self.path)

    def ends(self, split: Split) -> Int64[np.ndarray, " documents"]:
        """End of each document, in tokens from the start of `split`."""
        return self._splits[split].ends

    def tokens(
        self, split: Split, positions: Integer[np.ndarray, "..."]
    ) -> Int64[np.ndarray, "..."]:
        """Ids at `positions` of `split`. Raises UserError for an id beyond the vocabulary."""
        ids = self._splits[split].tokens(positions)
        if ids.size and ids.max() >= self.vocab_size:
            where = f"{self.path}: {split} has id {ids.max()}"
            raise UserError(f"{where}, beyond the vocabulary of {self.vocab_size}; {REMEDY}")
        return ids

    def loss_mask(
        self, split: Split, positions: Integer[np.ndarray, "..."]
    ) -> Bool[np.ndarray, "..."]:
        """Whether the tokens at `positions` of `split` are targets."""
        return self._splits[split].loss_mask(positions)

    def verify(self, progress: Progress | None = None) -> None:
        """Verify the SHA-256 of every file and that every id is in the vocabulary.

        Raises UserError naming the first corrupt file.
        """
        progress = SilentProgress() if progress is None else progress
        checked = list(self._files())
        total = sum(os.path.getsize(path) for path, _, _ in checked if os.path.exists(path))
        with progress.task(f"Checking {self.path.name}", total, "bytes") as task:
            for path, sha256, is_shard in checked:
                self._verify_file(path, sha256, is_shard, task)

    def _files(self) -> Iterator[tuple[Path, str, bool]]:
        """Every file with a checksum: path, SHA-256, whether it contains ids."""
        for name, sha256 in self.manifest.tokenizer.items():
            yield self.path / name, sha256, False
        for split, manifest in self.manifest.splits.items():
            for shard in manifest.shards:
                yield self.path / shard.file, shard.sha256, True
            if manifest.documents:
                yield self.path / ends_file(split), manifest.ends_sha256, False
            if manifest.mask_sha256 is not None:
                yield self.path / mask_file(split), manifest.mask_sha256, False

    def _verify_file(self, path: Path, sha256: str, is_shard: bool, task: Task) -> None:
        digest, highest = hashlib.sha256(), 0
        try:
            with path.open("rb") as file:
                while chunk := file.read(CHUNK):
                    digest.update(chunk)
                    if is_shard and len(chunk) % self.manifest.dtype.itemsize == 0:
                        highest = max(highest, int(np.frombuffer(chunk, self.manifest.dtype).max()))
                    task.advance(len(chunk))
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror}); {REMEDY}") from error
        if digest.hexdigest() != sha256:
            raise UserError(f"{path}: differs from its SHA-256 in {MANIFEST_FILE}; {REMEDY}")
        if highest >= self.vocab_size:
            what = f"has id {highest}, beyond the vocabulary of {self.vocab_size}"
            raise UserError(f"{path}: {what}; {REMEDY}")


class _MappedSplit:
    """The mapped files of one split."""

    def __init__(self, folder: Path, manifest: DatasetManifest, split: Split) -> None:
        own = manifest.splits[split]
        self._shard_tokens = manifest.shard_tokens
        self._shards = [
            _mapped(folder / shard.file, manifest.dtype, shard.tokens) for shard in own.shards
        ]
        ends = folder / ends_file(split)
        self.ends = _mapped(ends, np.dtype("<i8"), own.documents)
        _check_ends(self.ends, own.tokens, ends)
        self._mask = None
        if own.mask_sha256 is not None:
            self._mask = _mapped(folder / mask_file(split), np.dtype("u1"), -(-own.tokens // 8))

    def tokens(self, positions: Integer[np.ndarray, "..."]) -> Int64[np.ndarray, "..."]:
        if len(self._shards) == 1:
            return self._shards[0][positions].astype(np.int64)
        index = positions // self._shard_tokens
        inside = positions - index * self._shard_tokens
        ids = np.empty(positions.shape, np.int64)
        for shard in np.unique(index):
            chosen = index == shard
            ids[chosen] = self._shards[shard][inside[chosen]]
        return ids

    def loss_mask(self, positions: Integer[np.ndarray, "..."]) -> Bool[np.ndarray, "..."]:
        if self._mask is None:
            return np.ones(positions.shape, np.bool_)
        bits = self._mask[positions >> 3] >> (positions & 7).astype(np.uint8)
        return (bits & 1).astype(np.bool_)


def _mapped(path: Path, dtype: np.dtype, count: int) -> np.ndarray:
    """Memory-map the file `path`, which must have exactly `count` numbers."""
    if count == 0:
        return np.empty(0, dtype)
    if path.resolve().parent != path.parent.resolve():
        raise UserError(f"{path}: is a link out of the folder; put the file itself there")
    if not path.is_file():
        raise UserError(f"{path}: not found; {REMEDY}")
    mapped, expected = MappedFile(path), count * dtype.itemsize
    if mapped.size != expected:
        raise UserError(f"{path}: has {mapped.size} bytes, not {expected}; {REMEDY}")
    return mapped.tensor(0, torch.uint8, (mapped.size,)).numpy().view(dtype)


def _check_ends(ends: np.ndarray, tokens: int, path: Path) -> None:
    """Raises UserError unless ends increase strictly from above 0 to `tokens`."""
    last = int(ends[-1]) if len(ends) else 0
    rises = len(ends) == 0 or (ends[0] > 0 and bool((ends[1:] > ends[:-1]).all()))
    if last != tokens or not rises:
        raise UserError(f"{path}: does not cut {tokens} tokens into documents; {REMEDY}")
