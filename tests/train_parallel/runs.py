"""A recipe with a token folder, run by the command line in one or several processes."""

import json
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch import Tensor

from lowlat.data.build import build
from lowlat.data.documents import ReadOptions
from lowlat.data.selection import BuildOptions
from tests.fakes import byte_tokenizer
from tests.train_parallel.processes import finish

PROGRAM = [
    "-c",
    "from lowlat.plan import rate; rate.SIDES['cpu'] = 64; "  # its speed is of no interest
    "from lowlat.cli.main import run; run()",
]

TOLERANCE = 1e-5
"""Of a tensor of the state, in its norm."""
SEED = 9
"""One of which no gate chooses by less than 1e-5, see `choices`."""
RECIPE = f"""
name = "tiny"
seed = {SEED}
precision = "fp32"

[model]
model_type = "deepseek_v3"
hidden_size = 20
intermediate_size = 28
num_hidden_layers = 2
num_attention_heads = 4
num_key_value_heads = 4
q_lora_rank = 13
kv_lora_rank = 11
qk_nope_head_dim = 7
qk_rope_head_dim = 6
v_head_dim = 5
n_routed_experts = 8
num_experts_per_tok = 3
n_shared_experts = 1
moe_intermediate_size = 12
first_k_dense_replace = 1
n_group = 4
topk_group = 3
scoring_func = "sigmoid"
topk_method = "noaux_tc"
norm_topk_prob = true
routed_scaling_factor = 1.7
max_position_embeddings = 64
rms_norm_eps = 1e-6
rope_theta = 100.0
num_nextn_predict_layers = 1
tie_word_embeddings = true
initializer_range = 0.2

[data]
folder = "tokens"

[optimizer]
eps = 1e-5

[[phase]]
name = "first"
steps = 4
sequence_length = 16
batch_size = 8
micro_batch_size = 2
learning_rate = 0.003
bias_update_speed = 0.01

[[phase]]
name = "second"
steps = 4
sequence_length = 24
batch_size = 8
micro_batch_size = 2
learning_rate = 0.001
bias_update_speed = 0.01

[checkpoints]
every_steps = 100

[evaluation]
every_steps = 3
sequences = 7
"""


def write_recipe(folder: Path) -> Path:
    """A recipe in `folder` and the tokens it names."""
    text = folder / "texts"
    text.mkdir(parents=True)
    for index in range(61):
        (text / f"{index:02}.txt").write_text(f"{index} times {index} is {index * index}.\n" * 3)
    options = BuildOptions(sources=(str(text),), held_out=0.2, read=ReadOptions())
    build(folder / "tokens", options, byte_tokenizer())
    recipe = folder / "recipe.toml"
    recipe.write_text(RECIPE)
    return recipe


def state(run: Path) -> dict[str, Tensor]:
    """Weights and optimiser of the newest save."""
    newest = sorted((run / "saves").glob("step-*"))[-1]
    tensors = load_file(newest / "state.safetensors")
    return {name: tensor for name, tensor in tensors.items() if not name.startswith("random.")}


def losses(run: Path) -> list[tuple[str, int, float]]:
    """(kind, step, loss) of every record, in order; of repeated steps the last."""
    found = {}
    for line in (run / "log.jsonl").read_text().splitlines():
        record = json.loads(line)
        if record["kind"] in ("step", "evaluation"):
            found[record["kind"], record["step"]] = record["loss"]
    return [(kind, step, loss) for (kind, step), loss in found.items()]


def assert_same_end(alone: Path, moved: Path) -> None:
    """The run `moved` has the losses, the end and the export of the run `alone`."""
    expected, found = state(alone), state(moved)
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        error = (found[name].double() - tensor.double()).norm()
        assert error <= TOLERANCE * tensor.double().norm().clamp(min=1e-12), name
    pairs = list(zip(losses(alone), losses(moved), strict=True))
    assert all(one[:2] == other[:2] for one, other in pairs)
    assert [other[2] for _, other in pairs] == pytest.approx([one[2] for one, _ in pairs], rel=1e-5)
    assert (moved / "model" / "config.json").exists()


def wait_for_step(run: Path, step: int, processes: Sequence[subprocess.Popen[str]]) -> None:
    """Until the log of `run` has `step`."""
    log = run / "log.jsonl"
    while all(process.poll() is None for process in processes):
        if log.exists() and f'"kind":"step","step":{step},' in log.read_text():
            return
        time.sleep(0.01)
    raise AssertionError(f"the run ended before step {step}: {finish(processes)}")
