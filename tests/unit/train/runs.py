"""Runs of the real trainer on a token folder of a few documents, as the tests of the trainer, of
states and of exports make them.
"""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, final

import numpy as np
import pytest
import torch
from torch import Tensor

from lowlat.data.manifest import Split
from lowlat.train.checkpoints.checkpoint import TrainingCheckpoint
from lowlat.train.checkpoints.run_folder import RunFolder
from lowlat.train.checkpoints.store import CheckpointStore
from lowlat.train.metrics.metrics_log import MetricsLog
from lowlat.train.metrics.record import EvalRecord, StartRecord, StepRecord
from lowlat.train.recipe.schema import Recipe, parse_recipe
from lowlat.train.run.trainer import Trainer, TrainingResult
from tests.unit.data.conftest import END, byte_level, write_tokens

MODEL = {
    "model_type": "deepseek_v3",
    "hidden_size": 14,
    "intermediate_size": 19,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "q_lora_rank": 11,
    "kv_lora_rank": 13,
    "qk_nope_head_dim": 5,
    "qk_rope_head_dim": 4,
    "v_head_dim": 7,
    "n_routed_experts": 6,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "moe_intermediate_size": 9,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "num_nextn_predict_layers": 1,
    "tie_word_embeddings": True,
    "initializer_range": 0.1,
}
PHASES: list[dict[str, Any]] = [
    {
        "name": "short",
        "steps": 5,
        "sequence_length": 11,
        "batch_size": [{"to": 2.0, "steps": 1}, {"to": 6.0, "steps": 3}, {"to": 6.0}],
        "micro_batch_size": 2,
        "learning_rate": [{"to": 1e-2, "steps": 3}, {"to": 1e-3, "shape": "cosine"}],
        "bias_update_speed": 1e-2,
        "z_weight": 1e-3,
    },
    {
        "name": "long",
        "steps": 4,
        "sequence_length": 17,
        "batch_size": 4,
        "micro_batch_size": 2,
        "learning_rate": 1e-3,
        "mtp_weight": 0.1,
    },
]
STEPS = 9


def make_tokens(path: Path, special: tuple[str, ...] = (), held_out: int = 5) -> Path:
    """80 documents of letters, and `held_out` more to evaluate on."""
    tokenizer = byte_level(special=("<|endoftext|>", "<|im_start|>", *FIM_MARKS, *special))
    chance = np.random.default_rng(2)
    documents: dict[Split, list[tuple[list[int], None]]] = {
        split: [
            ([*chance.integers(97, 105, chance.integers(3, 40)), END], None) for _ in range(count)
        ]
        for split, count in (("train", 80), ("held_out", held_out))
    }
    write_tokens(path, tokenizer, documents)
    return path


FIM_MARKS = ("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>")


def recipe(**changes: Any) -> Recipe:
    """Two phases, a ramp of the batch, MTP; `changes` replace keys of the recipe."""
    raw = {
        "name": "test",
        "seed": 3,
        "precision": "fp32",
        "model": MODEL,
        "data": {"folder": "tokens", "fim_rate": 0.3},
        "checkpoints": {"every_steps": 2, "keep_last": 20},
        "evaluation": {"every_steps": 3, "sequences": 5},
        "phase": PHASES,
    }
    return parse_recipe(raw | changes, origin="test")


def phases(*changes: dict[str, Any]) -> list[dict[str, Any]]:
    """The phases, each with its changes."""
    return [old | new for old, new in zip(PHASES, changes, strict=True)]


@final
class Notes(MetricsLog):
    """Keeps all records; asks the run to stop after step `last`."""

    def __init__(self, last: int | None = None) -> None:
        self._last = last
        self.steps: list[StepRecord] = []
        self.evaluations: list[EvalRecord] = []
        self.notes: list[str] = []

    def start(self, record: StartRecord) -> None:
        self.begun_at = record.step

    def step(self, record: StepRecord) -> None:
        self.steps.append(record)
        if record.step == self._last:
            os.kill(os.getpid(), signal.SIGTERM)

    def evaluation(self, record: EvalRecord) -> None:
        self.evaluations.append(record)

    def note(self, text: str) -> None:
        self.notes.append(text)

    def status(self, text: str) -> None:
        pass

    def close(self) -> None:
        pass


@contextmanager
def opened(
    folder: Path, wanted: Recipe, log: Notes | None = None, **options: Any
) -> Iterator[Trainer]:
    """A trainer whose data lies next to `folder`."""
    with RunFolder(folder) as run:
        yield Trainer(wanted, run, log or Notes(), base=folder.parent, origin="recipe", **options)


def train(
    folder: Path, wanted: Recipe, last: int | None = None, **options: Any
) -> tuple[TrainingResult, Notes]:
    """Train until step `last`, or to the end."""
    log = Notes(last)
    with opened(folder, wanted, log, **options) as trainer:
        return trainer.run(), log


@contextmanager
def stopped_after(step: int, signal_number: int) -> Iterator[None]:
    """Trainers get the signal once they have saved `step`, which ends in KeyboardInterrupt."""
    save = Trainer._save

    def stopping(trainer: Trainer) -> None:
        save(trainer)
        if trainer.position.step == step:
            os.kill(os.getpid(), signal_number)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_save", stopping)
        with pytest.raises(KeyboardInterrupt):
            yield


def saved(folder: Path, step: int | None = None) -> TrainingCheckpoint:
    """The save of `step`, or the newest."""
    saves = CheckpointStore(RunFolder(folder), report=pytest.fail)
    save = saves.latest() if step is None else saves.open(step)
    assert save is not None
    return save


def steps(folder: Path) -> list[int]:
    return CheckpointStore(RunFolder(folder), report=pytest.fail).steps()


def tensors(save: TrainingCheckpoint) -> dict[str, Tensor]:
    return {name: save.tensor(name) for name in save.names()}


def assert_same(found: TrainingCheckpoint, expected: TrainingCheckpoint) -> None:
    """Bit for bit: weights, routing biases, optimiser, random numbers, position."""
    left, right = tensors(found), tensors(expected)
    assert left.keys() == right.keys()
    assert any(name.endswith("e_score_correction_bias") for name in left)
    assert any(name.startswith("optimizer.") for name in left)
    assert any(name.startswith("random.") for name in left)
    differing = [name for name in left if not torch.equal(left[name], right[name])]
    assert not differing, differing
    assert [t.dtype for t in left.values()] == [t.dtype for t in right.values()]
    free = {"seconds", "recipe"}
    assert {k: v for k, v in found.metadata.items() if k not in free} == {
        k: v for k, v in expected.metadata.items() if k not in free
    }


def computed(record: StepRecord | EvalRecord) -> dict[str, Any]:
    """A record without what depends on the clock and the machine."""
    clocked = {"seconds", "tokens_per_second", "mfu", "memory_bytes"}
    fields = type(record).__dataclass_fields__
    return {name: getattr(record, name) for name in fields if name not in clocked}
