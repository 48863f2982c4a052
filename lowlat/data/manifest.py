"""Manifest of a tokenized dataset (tokens.json): counts and checksums, to and from JSON.

Files of a dataset, which `writer` writes and `dataset` reads:

    tokens.json            the manifest: version, counts, checksums
    train-00000.bin ...    token ids, little-endian; all shards but the last have the same size
    train-ends.bin         end of each document in tokens, little-endian 64-bit
    train-mask.bin         loss mask, one bit per token, lowest bit first; only with chats
    held_out-*             the same for the held-out split
    tokenizer.json ...     the tokenizer, as in a Hugging Face folder
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from lowlat.text.fim_tokens import FimTokens
from lowlat.utils.json_fields import JsonFields

VERSION = 1
MANIFEST_FILE = "tokens.json"
TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_FILES = (TOKENIZER_FILE, "tokenizer_config.json", "generation_config.json")
MAX_COUNT = 2**53
"""Largest integer that JSON parsers represent exactly."""

Split = Literal["train", "held_out"]
SPLITS: tuple[Split, ...] = ("train", "held_out")


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardManifest:
    """One file of token ids."""

    file: str
    tokens: int
    sha256: str


@dataclass(frozen=True, kw_only=True, slots=True)
class SplitManifest:
    """One split of a tokenized dataset."""

    documents: int
    tokens: int
    """Number of tokens, begin and end tokens included."""
    predicted: int
    """Number of tokens that are targets."""
    text_bytes: int
    """UTF-8 bytes of the text."""
    shards: tuple[ShardManifest, ...]
    """Files of ids, in order."""
    ends_sha256: str
    """SHA-256 of the file of document ends."""
    mask_sha256: str | None
    """SHA-256 of the loss mask; None if every token is a target."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetManifest:
    """Manifest of a tokenized dataset."""

    vocab_size: int
    """One more than the highest id of the tokenizer."""
    end_of_text: int
    """Id that ends every document."""
    begin_of_text: int | None
    """Id that begins every text document, if the tokenizer adds one."""
    fim: FimTokens | None
    tokenizer: Mapping[str, str]
    """SHA-256 of the tokenizer's files, by name."""
    shard_tokens: int
    """Ids in every shard but the last of a split."""
    splits: Mapping[Split, SplitManifest]
    """Both splits, including empty ones."""
    sources: tuple[str, ...]
    """Sources, as given by the user."""
    dropped: Mapping[str, int]
    """Number of dropped documents by reason."""

    @property
    def dtype(self) -> np.dtype:
        """Data type of the ids: 16 bits if they suffice."""
        return id_type(self.vocab_size)


def id_type(vocab_size: int) -> np.dtype:
    """The smallest little-endian type for ids below `vocab_size`."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def shard_file(split: Split, index: int) -> str:
    return f"{split}-{index:05}.bin"


def ends_file(split: Split) -> str:
    return f"{split}-ends.bin"


def mask_file(split: Split) -> str:
    return f"{split}-mask.bin"


def to_json(manifest: DatasetManifest) -> dict[str, Any]:
    """`manifest` as the JSON object of tokens.json, where the splits are fields of their own."""
    raw: dict[str, Any] = {
        "format": "lowlat tokens",
        "version": VERSION,
        "dtype": manifest.dtype.name,
    }
    for name, value in asdict(manifest).items():
        raw |= value if name == "splits" else {name: value}
    return raw


def from_json(raw: dict[str, Any], source: str) -> DatasetManifest:
    """Parse the manifest `raw`. Raises UserError naming `source` and the field: another version,
    unexpected names, inconsistent counts.
    """
    fields = JsonFields(raw, source)
    if fields.value("format") != "lowlat tokens":
        raise fields.error("format", "is not 'lowlat tokens': not a tokenized dataset")
    if fields.value("version") != VERSION:
        remedy = "build the folder again with this version of lowlat"
        raise fields.error("version", f"{raw.get('version')!r} is not {VERSION}; {remedy}")
    vocab_size = fields.integer("vocab_size", maximum=1 << 31)
    highest = vocab_size - 1
    shard_tokens = fields.integer("shard_tokens", maximum=MAX_COUNT)
    if fields.value("dtype") != id_type(vocab_size).name:
        raise fields.wrong("dtype", f"{id_type(vocab_size).name} for {vocab_size} ids")
    fim = fields.table("fim")
    begin = fields.optional_integer("begin_of_text", minimum=0, maximum=highest)
    manifest = DatasetManifest(
        vocab_size=vocab_size,
        end_of_text=fields.integer("end_of_text", minimum=0, maximum=highest),
        begin_of_text=begin,
        fim=None if fim is None else _read_fim(fim, highest),
        tokenizer=_read_tokenizer(fields),
        shard_tokens=shard_tokens,
        splits={split: _read_split(fields, source, split, shard_tokens) for split in SPLITS},
        sources=fields.strings("sources"),
        dropped=_read_dropped(fields),
    )
    fields.reject_unread("is unknown; build the folder again", allow_empty=False)
    return manifest


def _read_fim(fields: JsonFields, highest: int) -> FimTokens:
    names = ("prefix", "suffix", "middle")
    return FimTokens(**{name: fields.integer(name, minimum=0, maximum=highest) for name in names})


def _read_tokenizer(fields: JsonFields) -> dict[str, str]:
    table = fields.table("tokenizer")
    names = () if table is None else tuple(fields.value("tokenizer"))
    if table is None or TOKENIZER_FILE not in names or not {*names} <= {*TOKENIZER_FILES}:
        expected = f"an object of checksums of {TOKENIZER_FILE} and its companion files"
        raise fields.wrong("tokenizer", expected)
    return {name: _checksum(table, name) for name in names}


def _read_dropped(fields: JsonFields) -> dict[str, int]:
    table = fields.table("dropped")
    names = fields.value("dropped") or {}
    if table is None:
        return {}
    return {name: table.integer(name, minimum=0, maximum=MAX_COUNT) for name in names}


def _read_split(fields: JsonFields, source: str, split: Split, shard_tokens: int) -> SplitManifest:
    table = fields.table(split)
    if table is None:
        raise fields.error(split, "is missing; build the folder again")
    counts = {
        name: table.integer(name, minimum=0, maximum=MAX_COUNT)
        for name in ("documents", "tokens", "predicted", "text_bytes")
    }
    tokens = counts["tokens"]
    if counts["documents"] > tokens or counts["predicted"] > tokens:
        raise table.error("tokens", "contradicts documents or predicted; build the folder again")
    mask = table.value("mask_sha256")
    return SplitManifest(
        **counts,
        shards=_read_shards(table, source, split, tokens, shard_tokens),
        ends_sha256=_checksum(table, "ends_sha256"),
        mask_sha256=None if mask is None else _checksum(table, "mask_sha256"),
    )


def _read_shards(
    table: JsonFields, source: str, split: Split, tokens: int, shard_tokens: int
) -> tuple[ShardManifest, ...]:
    """The shards of a split; all but the last must be full."""
    items = table.items("shards")
    if len(items) != -(-tokens // shard_tokens):
        what = f"does not list {tokens} tokens in files of {shard_tokens}"
        raise table.error("shards", f"{what}; build the folder again")
    shards = []
    for index, raw in enumerate(items):
        shard = JsonFields(raw, source, f"{split}.shards[{index}].")
        if shard.value("file") != shard_file(split, index):
            raise shard.wrong("file", f"'{shard_file(split, index)}'")
        expected = min(shard_tokens, tokens - index * shard_tokens)
        if shard.value("tokens") != expected:
            raise shard.wrong("tokens", f"{expected}")
        shards.append(
            ShardManifest(
                file=shard_file(split, index), tokens=expected, sha256=_checksum(shard, "sha256")
            )
        )
    return tuple(shards)


def _checksum(fields: JsonFields, name: str) -> str:
    value = fields.value(name)
    if not isinstance(value, str) or len(value) != 64 or set(value) - set("0123456789abcdef"):
        raise fields.wrong(name, "a SHA-256 in hexadecimal")
    return value
