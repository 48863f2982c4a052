"""Token folders of known documents, over a byte tokenizer with marks for infilling."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from lowlat.data.dataset import TokenizedDataset
from lowlat.data.manifest import (
    SPLITS,
    DatasetManifest,
    Split,
    id_type,
)
from lowlat.data.packing import PackedChats, PackedSequences
from lowlat.data.vocabulary import CHAT_TEMPLATE, end_of_text
from lowlat.data.writer import SplitWriter, write_manifest, write_tokenizer
from lowlat.text.fim_tokens import FIM, fim_tokens
from lowlat.text.tokenizer import Tokenizer
from lowlat.utils.atomic_files import atomic_folder
from tests.fakes import byte_backend, wrapped

END = 256
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *FIM)

Make = Callable[..., TokenizedDataset]


def byte_level(template: str | None = CHAT_TEMPLATE, special: Sequence[str] = SPECIAL) -> Tokenizer:
    """Ids 0 to 255 are bytes, then the special tokens; nothing is put around a text."""
    return wrapped(byte_backend(special), bos=special[0], eos=special[:1], chat_template=template)


def write_tokens(
    path: Path,
    tokenizer: Tokenizer,
    documents: Mapping[Split, Iterable[tuple[Sequence[int], Sequence[bool] | None]]],
    *,
    shard_tokens: int = 1 << 20,
    begin_of_text: int | None = None,
) -> None:
    """A token folder of documents: ids with their end token, and their masks."""
    with atomic_folder(path) as folder:
        dtype = id_type(tokenizer.vocab_size)
        writers: dict[Split, SplitWriter] = {
            split: SplitWriter(folder, split, dtype, shard_tokens) for split in SPLITS
        }
        for split in SPLITS:
            for ids, mask in documents[split]:
                writers[split].add(np.array(ids), None if mask is None else np.array(mask))
                writers[split].end_document(len(ids) - 1 - (begin_of_text is not None))
        manifest = DatasetManifest(
            vocab_size=tokenizer.vocab_size,
            end_of_text=end_of_text(tokenizer),
            begin_of_text=begin_of_text,
            fim=fim_tokens(tokenizer),
            tokenizer=write_tokenizer(folder, tokenizer),
            shard_tokens=shard_tokens,
            splits={split: writer.finish() for split, writer in writers.items()},
            sources=("made",),
            dropped={},
        )
        write_manifest(folder, manifest)


def texts(count: int, longest: int = 90) -> list[list[int]]:
    """Documents of 1 to `longest` printable bytes, all different."""
    rng = np.random.default_rng(5)
    return [
        [*f"{index}:".encode(), *rng.integers(33, 127, rng.integers(1, longest)).tolist()]
        for index in range(count)
    ]


@pytest.fixture
def make_folder(tmp_path: Path) -> Make:
    """Write documents of ids (an end token is put after each) and open the folder."""

    def make(
        train: Sequence[Sequence[int]],
        *,
        held_out: Sequence[Sequence[int]] = (),
        masks: Sequence[Sequence[bool]] | None = None,
        shard_tokens: int = 1 << 20,
        name: str = "tokens",
        special: Sequence[str] = SPECIAL,
        head: Sequence[int] = (),
    ) -> TokenizedDataset:
        documents: dict[Split, list[tuple[Sequence[int], Sequence[bool] | None]]] = {
            split: [
                ([*head, *ids, END], None if masks is None else [*masks[index], False])
                for index, ids in enumerate(texts)
            ]
            for split, texts in (("train", train), ("held_out", held_out))
        }
        write_tokens(
            tmp_path / name,
            byte_level(special=special),
            documents,
            shard_tokens=shard_tokens,
            begin_of_text=head[0] if head else None,
        )
        return TokenizedDataset.open(tmp_path / name)

    return make


PACKING = {"split": "train", "seed": 11, "fim_rate": 0.0}
"""Options of packed rows that tests do not change."""


def assert_found_by_number(
    ahead: PackedSequences | PackedChats, behind: PackedSequences | PackedChats
) -> None:
    """Rows that `ahead` reads as they come are those that `behind` reads alone, out of order."""
    count = 3 * ahead.per_epoch
    whole = ahead.batch(0, count)
    for number in [*range(count - 1, -1, -7), 0, 2, 1]:
        row = behind.batch(number, 1)
        assert torch.equal(row.tokens[0], whole.tokens[number])
        assert torch.equal(row.loss_mask[0], whole.loss_mask[number])
        assert row.documents is not None and whole.documents is not None
        assert row.documents[0] == whole.documents[number]
