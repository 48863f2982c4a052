"""`lowlat data`: build, describe and verify tokenized datasets. Parses arguments and prints."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lowlat.cli import options

if TYPE_CHECKING:
    from lowlat.data.documents import ReadOptions

app = typer.Typer(
    name="data",
    help="Build, describe and verify tokenized datasets for training.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Folder = Annotated[Path, typer.Argument(metavar="FOLDER", help="A tokenized dataset.")]


@dataclass(frozen=True, kw_only=True, slots=True)
class VocabularyOptions:
    """Tokenizer to use or vocabulary to train; exactly one of the two."""

    tokenizer: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="Tokenizer to use: of a model folder, tokenizer.json, .gguf file or model name.",
        ),
    ] = None
    train_bpe: Annotated[
        int | None,
        typer.Option(metavar="N", help="Train a byte-level BPE vocabulary of N tokens instead."),
    ] = None

    def check(self) -> None:
        """Raises UserError."""
        from lowlat.data.vocabulary import MAX_VOCAB, MIN_VOCAB
        from lowlat.utils.errors import UserError

        if (self.tokenizer is None) == (self.train_bpe is None):
            raise UserError("give either --tokenizer MODEL or --train-bpe N")
        if self.train_bpe is not None and not MIN_VOCAB <= self.train_bpe <= MAX_VOCAB:
            raise UserError(
                f"--train-bpe {self.train_bpe}: must be from {MIN_VOCAB} to {MAX_VOCAB}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldOutOptions:
    held_out: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE",
            help="Share of the documents to hold out, selected by content hash; by default 0.01, or"
            " 0 with --held-out-source.",
        ),
    ] = None
    held_out_source: Annotated[
        list[str] | None,
        typer.Option(metavar="SOURCE", help="Hold out these documents; may be repeated."),
    ] = None


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceOptions:
    field: Annotated[
        str | None,
        typer.Option(
            help="JSON field or table column that holds the text or the chat messages, by default "
            "text."
        ),
    ] = None
    separator: Annotated[
        str | None,
        typer.Option(
            metavar="LINE", help="Line between two documents of a text file; '' is a blank line."
        ),
    ] = None
    only: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN", help="Read only these files of a folder: '*.txt'; may be repeated."
        ),
    ] = None
    invalid: Annotated[
        str, typer.Option(help="Handling of text that is not UTF-8: error, skip or replace.")
    ] = "error"

    def as_read_options(self) -> "ReadOptions":
        """Raises UserError."""
        from lowlat.data.documents import ReadOptions
        from lowlat.utils.errors import UserError

        invalid = self.invalid
        if invalid != "error" and invalid != "skip" and invalid != "replace":
            raise UserError(f"--invalid '{invalid}' is unknown; choose error, skip or replace")
        return ReadOptions(
            field=self.field,
            separator=self.separator,
            invalid=invalid,
            patterns=tuple(self.only or ()),
        )


@app.command("build")
@options.with_option_groups
def build(
    *,
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="Folder to write; it must not exist.")
    ],
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE",
            help="Text file, .jsonl (one text or chat per line) or .parquet, also as .gz; a "
            "folder of these; or datasets:NAME[:CONFIG[:SPLIT[:COLUMN]]].",
        ),
    ],
    vocabulary: VocabularyOptions,
    split: HeldOutOptions,
    reading: SourceOptions,
    end_of_text: Annotated[
        str | None,
        typer.Option(metavar="TOKEN", help="Special token that ends a document."),
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Build a tokenized dataset from text: deduplicate, hold out, tokenize, write with checksums.

    FOLDER appears complete or not at all. The same sources give the same bytes.
    """
    from lowlat.cli.data_view import print_build, print_json
    from lowlat.data.build import build as run_build
    from lowlat.data.selection import BuildOptions
    from lowlat.data.sources import check_used
    from lowlat.data.vocabulary import load_tokenizer
    from lowlat.utils.progress import make_progress

    vocabulary.check()
    chosen = BuildOptions(
        sources=tuple(sources),
        held_out_sources=tuple(split.held_out_source or ()),
        held_out=split.held_out,
        end_of_text=end_of_text,
        read=reading.as_read_options(),
    )
    check_used([*sources, *chosen.held_out_sources], chosen.read)
    progress = make_progress()
    name = vocabulary.tokenizer
    tokenizer = vocabulary.train_bpe if name is None else load_tokenizer(name, progress)
    assert tokenizer is not None
    report = run_build(folder, chosen, tokenizer, progress)
    if as_json:
        print_json(report.path, report.manifest, seconds=report.seconds)
    else:
        print_build(report)


@app.command("info")
def info(folder: Folder, as_json: options.Json = False) -> None:
    """Describe a tokenized dataset: documents, tokens, tokenizer, sources."""
    from lowlat.cli.data_view import print_json, print_manifest
    from lowlat.data.dataset import TokenizedDataset

    manifest = TokenizedDataset.open(folder).manifest
    if as_json:
        print_json(folder, manifest)
    else:
        print_manifest(folder, manifest)


@app.command("verify")
def verify(folder: Folder, as_json: options.Json = False) -> None:
    """Verify the SHA-256 of every file of a tokenized dataset, and the range of every token id."""
    from lowlat.data.dataset import TokenizedDataset
    from lowlat.utils.progress import make_progress

    opened = TokenizedDataset.open(folder)
    opened.verify(make_progress())
    if as_json:
        print(json.dumps({"path": str(folder), "whole": True, "fingerprint": opened.fingerprint}))
    else:
        print(f"{folder}: whole, fingerprint {opened.fingerprint}")


@app.command("reasoning-gym")
def reasoning_gym(
    *,
    task: Annotated[str, typer.Argument(metavar="TASK", help="Task, such as chain_sum.")],
    file: Annotated[Path, typer.Argument(metavar="FILE", help="JSON Lines file to write.")],
    size: Annotated[int, typer.Option(metavar="N", min=1, help="Number of prompts.")],
    seed: Annotated[int, typer.Option(min=0, help="Seed; another one for held-out prompts.")] = 0,
    config: Annotated[
        str,
        typer.Option(metavar="JSON", help="Settings of the task, such as '{\"min_terms\": 2}'."),
    ] = "{}",
    system_prompt: Annotated[
        str | None, typer.Option(metavar="TEXT", help="System message before each question.")
    ] = None,
    text: Annotated[
        bool, typer.Option("--text", help="Prompts are texts instead of chats.")
    ] = False,
) -> None:
    """Write prompts of a reasoning-gym task for GRPO, scored by reasoning_gym_reward.

    The same arguments give the same bytes.
    """
    from lowlat.train.rewards.reasoning_gym import write_records
    from lowlat.utils.errors import UserError
    from lowlat.utils.strict_json import parse_object

    settings = parse_object(config.encode(), "--config")
    if settings.keys() & {"seed", "size"}:
        raise UserError("--config: give seed and size as --seed and --size")
    settings |= {"seed": seed, "size": size}
    write_records(file, task, settings, system_prompt=system_prompt, is_text=text)
    print(f"written  {file}: {size:,} prompts")
