"""A small run of the real trainer in a process of its own, and its saves compared."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lowlat.data.build import build
from lowlat.data.selection import BuildOptions
from lowlat.train.checkpoints.checkpoint import TrainingCheckpoint
from lowlat.train.checkpoints.run_folder import RunFolder
from lowlat.train.checkpoints.store import CheckpointStore
from tests import forked

from .states import bits

INTERVAL = 3
"""Steps between two saves."""

RECIPE = f"""
name = "killed"
seed = 7
precision = "fp32"
[model]
model_type = "deepseek_v3"
hidden_size = 24
intermediate_size = 40
num_hidden_layers = 2
num_attention_heads = 3
num_key_value_heads = 3
q_lora_rank = 11
kv_lora_rank = 13
qk_nope_head_dim = 8
qk_rope_head_dim = 4
v_head_dim = 7
n_routed_experts = 5
num_experts_per_tok = 2
n_shared_experts = 1
moe_intermediate_size = 16
first_k_dense_replace = 1
n_group = 1
topk_group = 1
scoring_func = "sigmoid"
topk_method = "noaux_tc"
norm_topk_prob = true
routed_scaling_factor = 2.5
max_position_embeddings = 64
rms_norm_eps = 1e-6
rope_theta = 10000.0
num_nextn_predict_layers = 1
tie_word_embeddings = true
initializer_range = 0.02
[data]
folder = "tokens"
fim_rate = 0.1
[optimizer]
name = "OPTIMIZER"
[checkpoints]
every_steps = {INTERVAL}
keep_last = KEEP
[evaluation]
every_steps = 7
sequences = 3
[log]
tensorboard = false
[[phase]]
name = "short"
steps = 31
sequence_length = 17
batch_size = [{{ to = 2, steps = 1 }}, {{ to = 6, steps = 20 }}, {{ to = 6 }}]
micro_batch_size = 2
learning_rate = [{{ to = 3e-3, steps = 7 }}, {{ to = 1e-4 }}]
bias_update_speed = 1e-2
[[phase]]
name = "long"
steps = 33
sequence_length = 23
batch_size = 4
micro_batch_size = 2
learning_rate = 1e-4
mtp_weight = 0.1
"""
STEPS = 64


class TrainServer:
    """The process that trains; see `train_server`."""

    def __init__(self) -> None:
        self._process = forked.Popen(
            [sys.executable, "-m", "train_faults.train_server"],
            cwd=Path(__file__).parents[1],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, recipe: Path, folder: Path) -> int:
        """Begin a run; its process id."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{recipe}\t{folder}\n")
        self._process.stdin.flush()
        return int(self._line())

    def status(self) -> int:
        """Wait for the end of the run."""
        return int(self._line())

    def close(self) -> None:
        self._process.communicate(timeout=600)

    def _line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline()


def write_recipe(path: Path, *, optimizer: str, keep_last: int) -> Path:
    """The recipe next to its data, the folder `tokens`."""
    path.write_text(RECIPE.replace("OPTIMIZER", optimizer).replace("KEEP", str(keep_last)))
    return path


def make_tokens(folder: Path) -> None:
    """About 40 KB of words in a few hundred documents."""
    chance = random.Random(3)
    words = ["".join(chance.choices("etaoinshrd", k=chance.randint(1, 9))) for _ in range(200)]
    source = folder.with_name("text")
    source.mkdir()
    for number in range(150):
        text = " ".join(chance.choices(words, k=chance.randint(3, 90)))
        (source / f"{number}.txt").write_text(text)
    build(folder, BuildOptions(sources=(str(source),), held_out=0.1), 300)


def latest(folder: Path) -> TrainingCheckpoint | None:
    """The newest save; a broken one would be reported, which none may be."""
    with RunFolder(folder) as run:
        return CheckpointStore(run, report=pytest.fail).latest()


def logged_step(folder: Path) -> int:
    """The last step that the run was through with when it died."""
    log = folder / "log.jsonl"
    lines = log.read_bytes().split(b"\n")[:-1] if log.exists() else []
    steps = [record["step"] for line in lines if "loss" in (record := json.loads(line))]
    return steps[-1] if steps else 0


def compare(save: TrainingCheckpoint | None, expected: TrainingCheckpoint) -> None:
    """Bit for bit the same state: weights, routing biases, optimiser, random numbers, position."""
    assert save is not None and save.step == expected.step
    assert save.names() == expected.names()
    assert any("e_score_correction_bias" in name for name in save.names())
    assert any(name.startswith("optimizer.") for name in save.names())
    assert any(name.startswith("random.") for name in save.names())
    for name in save.names():
        found, wanted = save.tensor(name), expected.tensor(name)
        assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape), name
        assert torch.equal(bits(found), bits(wanted)), f"step {save.step}: {name}"
    assert computed(save) == computed(expected)


def computed(save: TrainingCheckpoint) -> dict[str, Any]:
    """The facts but for time spent and what the recipes of the two runs differ in."""
    facts = {key: value for key, value in save.metadata.items() if key != "seconds"}
    return {**facts, "recipe": {**facts["recipe"], "checkpoints": None}}
