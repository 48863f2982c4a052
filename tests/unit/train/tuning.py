"""Whole runs from checkpoints in a moment: small models with a byte tokenizer, chats, recipes; as
the tests of fine-tuning make them.
"""

import json
import os
import signal
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowlat.checkpoint.load import load_model
from lowlat.checkpoint.mapping import mtp_copies
from lowlat.checkpoint.save import save_model
from lowlat.config.model import ModelConfig
from lowlat.data.build import build
from lowlat.data.selection import BuildOptions
from lowlat.train.checkpoints.run_folder import RunFolder
from lowlat.train.checkpoints.store import CheckpointStore
from lowlat.train.metrics.live_view import make_view
from lowlat.train.metrics.metrics_log import FolderMetricsLog
from lowlat.train.recipe.schema import parse_recipe
from lowlat.train.run.trainer import Trainer, TrainingResult
from tests.fakes import byte_tokenizer
from tests.lowlat_configs import random_model

from . import tiny

VOCAB = 263
PAIRS = [("ping", "pong"), ("tick", "tock"), ("yes", "no"), ("up", "down"), ("in", "out")]


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a run left."""

    path: Path
    outcome: TrainingResult
    trainer: Trainer

    def records(self, kind: str) -> list[dict[str, Any]]:
        lines = (self.path / "log.jsonl").read_text().splitlines()
        return [record for line in lines if (record := json.loads(line))["kind"] == kind]

    def losses(self) -> list[float]:
        return [record["loss"] for record in self.records("step")]

    def saved(self) -> dict[str, Tensor]:
        save = CheckpointStore(RunFolder(self.path), report=print).latest()
        assert save is not None
        return {name: save.tensor(name).clone() for name in save.names()}


def config(**changes: Any) -> ModelConfig:
    """Of a deepseek_v3 with experts and one MTP module, for tokens that are bytes."""
    fields = {"vocab_size": VOCAB, "num_nextn_predict_layers": 1, "max_position_embeddings": 64}
    return tiny.config(**(fields | changes))


def with_tokenizer(folder: Path) -> Path:
    """A folder of the tokenizer and chat template alone."""
    if not folder.exists():
        byte_tokenizer().save(folder)
    return folder


def checkpoint(
    folder: Path,
    model_config: ModelConfig,
    dtype: torch.dtype = torch.float32,
    *,
    seed: int = 7,
) -> Path:
    """Random weights, a tokenizer of bytes and its chat template, as a model folder. Copies of
    embedding and head in MTP modules equal the main model's, as in released weights.
    """
    model = random_model(model_config, dtype, seed=seed)
    if model_config.mtp_copies:
        model.load_state_dict(mtp_copies(model_config, model.state_dict()), strict=False)
    text = with_tokenizer(folder.with_name("tokenizer"))
    save_model(model, model_config, folder, source=text)
    return folder


def chats(folder: Path, copies: int = 7) -> Path:
    """A token folder of short chats, some of them held out."""
    source = folder.with_name(f"{folder.name}.jsonl")
    lines = [
        {
            "messages": [
                {"role": "user", "content": f"{number}{asked}"},
                {"role": "assistant", "content": answer},
            ]
        }
        for number in range(copies)
        for asked, answer in PAIRS
    ]
    source.write_text("\n".join(map(json.dumps, lines)))
    build(folder, BuildOptions(sources=(str(source),), held_out=0.3), byte_tokenizer())
    return folder


def raw_recipe(**changes: Any) -> dict[str, Any]:
    """Of one phase, in fp32, as TOML says it; `changes` replace keys."""
    phase = {
        "name": "p",
        "steps": 6,
        "sequence_length": 31,
        "batch_size": 4,
        "micro_batch_size": 2,
        "learning_rate": 3e-3,
        "bias_update_speed": 0.0,
    }
    base = {
        "name": "t",
        "precision": "fp32",
        "data": {"folder": "tokens", "document_masks": True},
        "phase": [phase],
        "checkpoints": {"every_steps": 3},
        "evaluation": {"every_steps": 3, "sequences": 4},
        "log": {"tensorboard": False},
    }
    return base | changes


def phases(*changes: dict[str, Any]) -> list[dict[str, Any]]:
    """The phase of `raw_recipe` once for each of `changes`."""
    return [raw_recipe()["phase"][0] | change for change in changes]


def train(
    folder: Path,
    raw: dict[str, Any],
    *,
    base_model: Path | None = None,
    teacher: Path | None = None,
    name: str = "run",
    kind: type[Trainer] = Trainer,
) -> Run:
    """Run `raw`, whose data lies in `folder`, to its end, in `folder`/`name`."""
    recipe = parse_recipe(raw, origin="r.toml")
    with RunFolder(folder / name) as run:
        log = FolderMetricsLog(run, view=make_view(quiet=True), tensorboard_wanted=False)
        with closing(log):
            files = {"base_model": base_model, "teacher": teacher}
            trainer = kind(recipe, run, log, base=folder, origin="r.toml", **files)
            outcome = trainer.run()
    return Run(path=folder / name, outcome=outcome, trainer=trainer)


def stop_after(steps: int, folder: Path, raw: dict[str, Any], **options: Any) -> None:
    """A run that is asked to stop after its save at step `steps`."""

    class Stopping(Trainer):
        def _save(self) -> None:
            super()._save()
            if self.position.step == steps:
                os.kill(os.getpid(), signal.SIGTERM)

    stopped = train(folder, raw, kind=Stopping, **options)
    assert stopped.outcome.step == steps and stopped.outcome.model is None


def loaded(folder: Path) -> dict[str, Tensor]:
    return load_model(folder, dtype="fp32").model.state_dict()


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    assert not changed(left, right)


def changed(left: dict[str, Tensor], right: dict[str, Tensor]) -> Sequence[str]:
    return [name for name in left if not torch.equal(left[name], right[name])]
