"""Synthetic tasks of the attention study: associative recall (MQAR, arXiv 2312.04927) and copying.

A recall document lists pairs of a key and a value, then repeats all pairs in another order; the
values of the second list can be known. A copy document has a random string twice. All tokens come
from a fixed selection of the vocabulary. `add_tasks` mixes such documents into the training split
of a tokenized dataset, so that one training gives the loss on text and the accuracy on tasks.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from lowlat import api
from lowlat.data.dataset import TokenizedDataset
from lowlat.data.manifest import Split, SplitManifest
from lowlat.data.writer import SHARD_TOKENS, SplitWriter, write_manifest, write_tokenizer
from lowlat.generate.model import Model
from lowlat.utils.atomic_files import atomic_folder
from lowlat.utils.errors import UserError
from lowlat.utils.progress import Progress

SOURCE = "recall and copying tasks"
"""Source in the manifest of a dataset with tasks."""
KEYS = 256
"""Keys, and as many values; copied strings consist of both."""
LENGTHS = (4, 192)
"""Shortest and longest task in training: pairs, or half the tokens of a string."""
MEASURED = (16, 64, 192)
"""Lengths whose accuracy is measured."""
DOCUMENTS = 16
"""Documents per task and length to measure."""
TRAINING_SEED, MEASURING_SEED = 1, 2


@dataclass(frozen=True, slots=True)
class Task:
    """Tokens of a document, and the positions of those that can be known."""

    ids: np.ndarray
    answers: np.ndarray


@dataclass(frozen=True, slots=True)
class TaskTokens:
    """The tokens that tasks consist of."""

    marks: tuple[int, int, int]
    """Start of a recall document, start of a copy document, start of their second part."""
    keys: np.ndarray
    values: np.ndarray

    @classmethod
    def of(cls, data: TokenizedDataset) -> "TaskTokens":
        """The selection from the vocabulary of `data`. Raises UserError if it is too small."""
        special = data.tokenizer().special_ids | {data.manifest.end_of_text}
        usable = np.array([token for token in range(data.vocab_size) if token not in special])
        count = 2 * KEYS + 3
        if len(usable) < count:
            raise UserError(f"{data.path}: has {len(usable)} plain tokens, tasks need {count}")
        chosen = np.random.default_rng(0).choice(usable, count, replace=False)
        first, second, third = chosen[:3].tolist()
        return cls((first, second, third), *np.split(chosen[3:], 2))

    def recall(self, pairs: int, random: np.random.Generator) -> Task:
        """`pairs` different keys with their values, twice."""
        table = np.stack([random.permutation(self.keys)[:pairs], random.choice(self.values, pairs)])
        again = table[:, random.permutation(pairs)]
        first = (self.marks[0], *table.T.flatten(), self.marks[2])
        ids = np.array([*first, *again.T.flatten()])
        return Task(ids, np.arange(len(first) + 1, len(ids), 2))

    def copying(self, length: int, random: np.random.Generator) -> Task:
        """A string of 2 `length` tokens, twice."""
        text = random.choice(np.concatenate([self.keys, self.values]), 2 * length)
        ids = np.array([self.marks[1], *text, self.marks[2], *text])
        return Task(ids, np.arange(len(ids) - len(text), len(ids)))

    def training(self, random: np.random.Generator) -> Task:
        """A task of random kind, and of random length on a logarithmic scale."""
        low, high = LENGTHS
        length = round(low * (high / low) ** random.random())
        return (self.recall, self.copying)[random.integers(2)](length, random)


def add_tasks(
    data: TokenizedDataset, destination: Path, *, share: float, progress: Progress
) -> TokenizedDataset:
    """Write the dataset `destination`: `data`, with tasks between its training documents that make
    up `share` of the training tokens. The held-out split is that of `data`.

    Raises UserError for a share outside 0 to 1, for chats, and as `TaskTokens.of`.
    """
    if not 0 < share < 1:
        raise UserError(f"--share {share}: give a share of the training tokens between 0 and 1")
    if data.has_mask("train"):
        raise UserError(f"{data.path}: holds chats; give a dataset of text")
    tokens, random = TaskTokens.of(data), np.random.default_rng(TRAINING_SEED)
    with atomic_folder(destination) as folder, ExitStack() as stack:
        splits: dict[Split, SplitManifest] = {}
        for split in ("train", "held_out"):
            writer = SplitWriter(folder, split, data.manifest.dtype)
            stack.callback(writer.close)
            written, bytes_each = 0, data.num_bytes(split) // max(1, data.num_documents(split))
            with progress.task(f"writing {split}", data.num_tokens(split)) as task:
                for ids in _documents(data, split):
                    writer.add(ids)
                    writer.end_document(bytes_each)
                    task.advance(len(ids))
                    while split == "train" and written < share * writer.tokens:
                        own = np.append(tokens.training(random).ids, data.manifest.end_of_text)
                        writer.add(own)
                        writer.end_document(0)
                        written += len(own)
            splits[split] = writer.finish()
        manifest = replace(
            data.manifest,
            splits=splits,
            sources=(*data.manifest.sources, SOURCE),
            shard_tokens=SHARD_TOKENS,
            tokenizer=write_tokenizer(folder, data.tokenizer()),
        )
        write_manifest(folder, manifest)
    return TokenizedDataset.open(destination)


def _documents(data: TokenizedDataset, split: Split) -> Iterator[np.ndarray]:
    start = 0
    for end in data.ends(split).tolist():
        yield data.tokens(split, np.arange(start, end))
        start = end


def has_tasks(data: TokenizedDataset) -> bool:
    """Whether `data` has tasks in its training split."""
    return SOURCE in data.manifest.sources


def accuracies(folder: Path, data: TokenizedDataset) -> dict[str, dict[str, float]]:
    """Share of known tokens that the model in `folder` predicts (greedy), by task and length."""
    model = api.load(str(folder), dtype="fp32", speculates=False)
    tokens, random = TaskTokens.of(data), np.random.default_rng(MEASURING_SEED)
    makers = {"recall": tokens.recall, "copying": tokens.copying}
    return {
        name: {
            str(length): _accuracy(model, [make(length, random) for _ in range(DOCUMENTS)])
            for length in MEASURED
        }
        for name, make in makers.items()
    }


def _accuracy(model: Model, tasks: list[Task]) -> float:
    right = total = 0
    for task in tasks:
        predicted = model.logits(task.ids.tolist()).argmax(dim=-1).numpy()
        right += int((predicted[task.answers - 1] == task.ids[task.answers]).sum())
        total += len(task.answers)
    return right / total
