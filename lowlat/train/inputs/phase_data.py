"""Training data of a phase: the packed sequences of its tokenized dataset, train and held-out.

Checks datasets against the recipe: same tokenizer, enough tokens, targets.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tokenizers

from lowlat.checkpoint.save import text_files
from lowlat.data.dataset import TokenizedDataset
from lowlat.data.manifest import TOKENIZER_FILE, Split
from lowlat.data.packing import PackedChats, PackedRows, PackedSequences
from lowlat.data.shuffle import mixed
from lowlat.train.recipe.schedule import data_begins, data_of
from lowlat.train.recipe.schema import Recipe
from lowlat.utils.errors import UserError


@dataclass(frozen=True, kw_only=True, slots=True)
class PhaseData:
    """The data of one phase: packed text documents, or packed chats."""

    dataset: TokenizedDataset
    """Dataset of both splits."""
    train: PackedRows
    """Training sequences."""
    held_out: PackedRows | None
    """Evaluation sequences; None if there are none."""
    no_evaluation: str = ""
    """Why `held_out` is None, and the remedy."""
    document_masks: bool = False
    """Whether documents packed into one sequence are masked from one another; their first tokens
    are then no targets.
    """


def phase_dataset(recipe: Recipe, index: int, base: Path) -> TokenizedDataset | None:
    """Open the tokenized dataset of phase `index`, if it has one; relative paths start at `base`.
    Raises UserError.
    """
    table = data_of(recipe, index)
    return None if table is None else TokenizedDataset.open(base / table.folder)


def phase_data(recipe: Recipe, index: int, dataset: TokenizedDataset, num_ahead: int) -> PhaseData:
    """The sequences that phase `index` reads from `dataset`. Raises UserError if there are none.

    num_ahead: 1 + num_nextn_predict_layers, tokens that follow the inputs of a sequence.
    """
    phase, table = recipe.phase[index], data_of(recipe, index)
    assert table is not None

    def sequences(split: Split, seed: int, fim_rate: float) -> PackedRows:
        kind = PackedChats if dataset.has_mask(split) else PackedSequences
        return kind(
            dataset,
            split=split,
            sequence_length=phase.sequence_length,
            num_ahead=num_ahead,
            seed=seed,
            document_masks=table.document_masks,
            fim_rate=fim_rate,
        )

    train = sequences("train", _order_seed(recipe, index), table.fim_rate)
    enough = dataset.num_tokens("held_out") >= phase.sequence_length + num_ahead
    held_out = sequences("held_out", 0, 0.0) if enough or dataset.has_mask("held_out") else None
    why = ""
    if held_out is None:
        why = f"{dataset.path} holds out less than one sequence; build it with --held-out"
    elif not held_out.has_targets(recipe.evaluation.sequences):
        held_out = None
        why = (
            f"the held-out sequences of {dataset.path} have no target; raise sequence_length "
            f"({phase.sequence_length}) or build it with more documents held out"
        )
    return PhaseData(
        dataset=dataset,
        train=train,
        held_out=held_out,
        no_evaluation=why,
        document_masks=table.document_masks,
    )


def data_notes(recipe: Recipe, data: Sequence[PhaseData | None]) -> Iterator[str]:
    """One line per phase of `recipe` that runs without evaluation or truncates chats."""
    for phase, own in zip(recipe.phase, data, strict=True):
        if own is None:
            continue
        if own.held_out is None:
            yield f"phase {phase.name}: no evaluations, {own.no_evaluation}"
        if isinstance(own.train, PackedChats) and own.train.truncated.chats:
            cut = own.train.truncated
            yield (
                f"phase {phase.name}: {cut.chats:,} of {own.dataset.num_documents('train'):,} "
                f"chats are longer than a sequence and lose their last {cut.tokens:,} tokens; "
                f"sequence_length = {cut.longest - 1} holds all"
            )


def check_tokenizers(
    recipe: Recipe,
    datasets: Sequence[TokenizedDataset | None],
    models: Sequence[Path],
    origin: str,
) -> None:
    """Raises UserError unless the datasets of all phases have the same tokenizer, whose ids stand
    for the same tokens in every checkpoint of `models` that has a tokenizer.
    """
    first = next((dataset for dataset in datasets if dataset is not None), None)
    if first is None:
        return
    for dataset, phase in zip(datasets, recipe.phase, strict=True):
        if dataset is None:
            continue
        if dataset.manifest.tokenizer[TOKENIZER_FILE] != first.manifest.tokenizer[TOKENIZER_FILE]:
            raise UserError(
                f"{origin}: phase {phase.name}: {dataset.path} was built with another tokenizer "
                f"than {first.path}; build it again with that one"
            )
    for model in models:
        _check_vocabulary(model, first, origin)


def _check_vocabulary(model: Path, dataset: TokenizedDataset, origin: str) -> None:
    file = text_files(model).get(TOKENIZER_FILE)
    if file is None:
        return
    both = (file, (dataset.path / TOKENIZER_FILE).read_bytes())
    known, used = (tokenizers.Tokenizer.from_buffer(data).get_vocab() for data in both)
    tokens = {id: token for token, id in known.items()}
    if any(tokens.get(id, token) != token for token, id in used.items()):
        raise UserError(
            f"{origin}: {dataset.path} was built with another tokenizer than that of {model}; "
            "build it again with that one"
        )


def check_targets(recipe: Recipe, data: Sequence[PhaseData | None], origin: str) -> None:
    """Raises UserError naming the first phase whose training sequences have no target."""
    for phase, own in zip(recipe.phase, data, strict=True):
        if own is None or own.train.has_targets():
            continue
        where = f"{origin}: phase {phase.name}: no sequence of {own.dataset.path} has a target"
        if isinstance(own.train, PackedChats) and own.train.truncated.chats:
            raise UserError(
                f"{where}: every answer begins after sequence_length {phase.sequence_length}; "
                f"sequence_length = {own.train.truncated.longest - 1} holds all"
            )
        raise UserError(f"{where}; build it from texts, or from chats with answers")


def _order_seed(recipe: Recipe, index: int) -> int:
    """Shuffle seed of phase `index`.

    A phase that continues the data of an earlier phase has the same seed. Other data has a distinct
    seed.
    """
    first = data_begins(recipe, index)
    return int(mixed(np.array([first]), recipe.seed)[0]) if first else recipe.seed
