"""GRPO as a phase of a recipe: whole runs, what they log, and resumption to the same bits."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lowlat.config.model import ModelAttention
from lowlat.ops import native
from lowlat.train.inputs.configs import check_recipe
from lowlat.train.inputs.run_inputs import _fingerprint
from lowlat.train.recipe.schema import parse_recipe
from lowlat.utils.errors import UserError
from tests import configs
from tests.lowlat_configs import TPA, lowlat_config
from tests.unit.train import tuning
from tests.unit.train.test_sparse_runs import INDEXER

if not native.available():
    pytest.skip(native.reason(), allow_module_level=True)

REWARD = """
def reward(prompt, completion, record):
    if record["letter"] == "?":
        raise ValueError("no letter")
    return float(sum(ord(c) < ord(record["letter"]) for c in completion))
"""
LETTERS = ["P", "a", "8", "z", "0"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("grpo")
    tuning.checkpoint(made / "base", tuning.config(), torch.bfloat16)
    write_prompts(made / "prompts.jsonl", LETTERS)
    (made / "reward.py").write_text(REWARD)
    return made


def write_prompts(path: Path, letters: list[str]) -> None:
    records = [
        {"prompt": [{"role": "user", "content": f"say {letter}"}], "letter": letter}
        for letter in letters
    ]
    path.write_text("\n".join(map(json.dumps, records)) + "\n")


def raw_recipe(grpo: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    table = {
        "prompts": "prompts.jsonl",
        "reward_funcs": ["reward.py"],
        "num_generations": 4,
        "max_completion_length": 9,
    }
    phase = {
        "name": "rl",
        "steps": 4,
        "sequence_length": 60,
        "batch_size": 8,
        "micro_batch_size": 4,
        "learning_rate": 1e-2,
        "bias_update_speed": 1e-2,
        "mtp_weight": 0.0,
        "grpo": table | (grpo or {}),
    }
    base = {
        "name": "t",
        "seed": 5,
        "base_model": "base",
        "balance": {"sequence_weight": 0.0},
        "checkpoints": {"every_steps": 1, "keep_last": 9},
        "log": {"tensorboard": False},
        "phase": [phase],
    }
    return base | changes


def train(folder: Path, raw: dict[str, Any], name: str) -> tuning.Run:
    return tuning.train(folder, raw, base_model=folder / "base", name=name)


def samples(run: tuning.Run) -> list[dict[str, Any]]:
    files = sorted((run.path / "samples").glob("*.jsonl"))
    return [json.loads(line) for path in files for line in path.read_text().splitlines()]


FULL = {
    "num_iterations": 2,
    "beta": 0.02,
    "epsilon_high": 0.28,
    "top_p": 0.9,
    "temperature": 0.9,
    "soft_punish_cache": 4,
}


def test_a_run_logs_and_exports(folder: Path) -> None:
    run = train(folder, raw_recipe(FULL), "whole")
    assert run.outcome.is_complete and run.outcome.model is not None
    records = [record["rollouts"] for record in run.records("step")]
    assert [record.get("mismatch") for record in records] == [0.0, None] * 2
    assert [record["rollout_tokens_per_second"] > 0 for record in records] == [True, False] * 2
    assert records[0]["clipped"] == 0.0
    # The reference is the model before the first update.
    assert records[0]["kl"] == 0.0 and records[1]["kl"] > 0.0
    assert all(record["entropy"] > 0 and record["failed"] == 0 for record in records)
    kept = samples(run)
    assert len(kept) == 2 * 8
    of_step = [sample for sample in kept if sample["step"] == 1]
    mean = sum(sample["reward"] for sample in of_step) / 8
    assert records[0]["reward"] == records[1]["reward"] == pytest.approx(mean)
    trained, base = (tuning.loaded(path) for path in (run.outcome.model, folder / "base"))
    changed = [name for name in base if not torch.equal(trained[name], base[name])]
    assert "layers.1.mlp.gate.e_score_correction_bias" in changed
    assert not any(name.startswith("mtp.") for name in changed)
    matrices = [name for name in base if base[name].ndim > 1 and not name.startswith("mtp.")]
    assert set(matrices) <= set(changed)


def test_mtp_modules_learn_what_is_sampled(folder: Path) -> None:
    """Their routing biases, too; the engine drafts with the weights of the last update."""
    raw = raw_recipe(balance={"sequence_weight": 1e-2})
    raw["phase"][0] |= {"steps": 3, "mtp_weight": 0.5}
    run = train(folder, raw, "mtp")
    records = run.records("step")
    assert [record["rollouts"]["mismatch"] for record in records] == [0.0] * 3
    assert all(record["mtp_losses"][0] > 0 for record in records)
    # Near alpha for the gate of the decoder layer and that of the module.
    assert all(0.01 < record["sequence_loss"] < 0.04 for record in records)
    assert run.outcome.model is not None
    trained, base = (tuning.loaded(path) for path in (run.outcome.model, folder / "base"))
    same = [name for name in base if torch.equal(trained[name], base[name])]
    assert not any(name.startswith("mtp.") for name in same)


@pytest.mark.parametrize("stopped", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_stopped_run_resumes_to_the_same_bits(folder: Path, stopped: int) -> None:
    """Between two updates over the same completions, and before new ones."""
    raw = raw_recipe(FULL)
    whole = train(folder, raw, f"whole-{stopped}")
    name = f"stopped-{stopped}"
    tuning.stop_after(stopped, folder, raw, base_model=folder / "base", name=name)
    resumed = train(folder, raw, name)
    tuning.assert_same(resumed.saved(), whole.saved())
    assert samples(resumed) == samples(whole)


@pytest.mark.slow
def test_a_run_stopped_between_grpo_phases_resumes_to_the_same_bits(folder: Path) -> None:
    """The second phase has draws of its own, and no completions of the first."""
    raw = raw_recipe({"num_iterations": 2})
    first = raw["phase"][0] | {"steps": 1}
    raw["phase"] = [first, first | {"name": "rl2"}]
    whole = train(folder, raw, "two-phases")
    tuning.stop_after(1, folder, raw, base_model=folder / "base", name="between-phases")
    resumed = train(folder, raw, "between-phases")
    tuning.assert_same(resumed.saved(), whole.saved())
    assert samples(resumed) == samples(whole)


def test_failed_rewards_fail_their_sample(folder: Path) -> None:
    write_prompts(folder / "failing.jsonl", ["?", "a"])
    raw = raw_recipe({"prompts": "failing.jsonl"})
    raw["phase"][0]["steps"] = 1
    run = train(folder, raw, "failing")
    assert run.records("step")[0]["rollouts"]["failed"] == 4
    failed = [sample for sample in samples(run) if sample["reward"] is None]
    assert len(failed) == 4
    for sample in failed:
        assert sample["advantage"] == 0.0
        assert "no letter" in sample["rewards"]["reward.py"]


@pytest.mark.slow
def test_dynamic_sampling_replaces_groups_without_signal(folder: Path) -> None:
    """Every second prompt gives all completions the same reward."""
    write_prompts(folder / "dull.jsonl", ["\u0000", "a", "\u0000", "P"])
    run = train(folder, raw_recipe({"prompts": "dull.jsonl", "dynamic_sampling": True}), "dynamic")
    assert any(record["rollouts"]["no_signal"] > 0 for record in run.records("step"))
    for step in range(1, 5):
        rewards = [s["reward"] for s in samples(run) if s["step"] == step]
        assert len(set(rewards[:4])) > 1 and len(set(rewards[4:])) > 1


@pytest.mark.slow
def test_lora_trains_its_updates_only(folder: Path) -> None:
    lora = {"rank": 2, "alpha": 4.0, "target_modules": ["q_b_proj", "o_proj", "down_proj"]}
    raw = raw_recipe({"num_iterations": 2}, lora=lora)
    raw["phase"][0] |= {"bias_update_speed": 0.0}
    run = train(folder, raw, "lora")
    assert [r["rollouts"].get("mismatch") for r in run.records("step")] == [0.0, None] * 2
    assert run.outcome.model is not None
    trained, base = (tuning.loaded(path) for path in (run.outcome.model, folder / "base"))
    changed = {name for name in base if not torch.equal(trained[name], base[name])}
    assert changed and all(name.split(".")[-2] in lora["target_modules"] for name in changed)


@pytest.mark.parametrize(
    ("grpo", "changes", "said"),
    [
        ({"num_generations": 1}, {}, "grpo.num_generations: must be greater than or equal to 2"),
        ({"num_generations": 3}, {}, "batch_size: must be a multiple of grpo.num_generations 3"),
        ({"max_completion_length": 60}, {}, "leaves no token of sequence_length 60 for the prompt"),
        ({"reward_weights": [1.0, 2.0]}, {}, "one number for each of the 1 reward_funcs"),
        ({"max_completion_length": 59}, {}, "line 1: the prompt has .* tokens, and 1 fit"),
        ({"reward_funcs": ["absent.py"]}, {}, "absent.py"),
        ({"reward_funcs": ["accuracy_reward"]}, {}, "line 1: has no 'answer' or 'solution'"),
        ({"prompts": "absent.jsonl"}, {}, "absent.jsonl: cannot be read"),
        ({"reward_weights": [math.inf]}, {}, "reward_weights.0: must be a finite number"),
        ({"delta": 1.1}, {}, "delta 1.1 must be above 1 . epsilon_high, 1.2"),
        ({}, {"base_model": None, "model": {}}, "base_model is missing; phases of grpo"),
        ({}, {"precision": "fp32"}, "samples in bf16 on the CPU; set precision 'bf16'"),
        ({}, {"precision": "fp8"}, "samples in bf16 on the CPU; set precision 'bf16'"),
        ({}, {"parallel": {"fsdp": 2}}, "leave all sizes but data at 1"),
        ({}, {"parallel": {"data": 2, "expert": 2}}, "leave all sizes but data at 1"),
    ],
    ids=str,
)
def test_bad_input_is_refused_in_one_line(
    folder: Path, tmp_path: Path, grpo: dict[str, Any], changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(UserError, match=said) as found:
        train(folder, raw_recipe(grpo, **changes), tmp_path.name)
    assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    ("attention", "kind"),
    [
        (replace(configs.MLA, indexer=INDEXER), "DSA"),
        (TPA, "TPA"),
        (replace(configs.MLA, attn_output_gate=True), "gated MLA"),
    ],
    ids=["dsa", "tpa", "gated"],
)
def test_attentions_without_a_backward_pass_are_refused(
    attention: ModelAttention, kind: str
) -> None:
    config = lowlat_config(attention, max_position_embeddings=97)
    recipe = parse_recipe(raw_recipe(), origin="r.toml")
    with pytest.raises(UserError) as found:
        check_recipe(config, recipe, "r.toml")
    assert str(found.value).startswith("r.toml: phase rl: grpo does not support")
    assert f"{kind}" in str(found.value) and "choose another base_model" in str(found.value)


def test_a_recipe_without_data_needs_a_base_model() -> None:
    raw = raw_recipe()
    del raw["base_model"]
    with pytest.raises(UserError, match="base_model is missing"):
        parse_recipe(raw | {"model": {}}, origin="r.toml")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"z_weight": 1e-4}, "z_weight: grpo has no z-loss"),
        ({"data": {"folder": "tokens"}}, "data: a phase of grpo learns from grpo.prompts"),
    ],
)
def test_keys_without_effect_are_refused(changes: dict[str, Any], said: str) -> None:
    raw = raw_recipe()
    raw["phase"][0] |= changes
    with pytest.raises(UserError, match=said):
        parse_recipe(raw, origin="r.toml")


def test_texts_and_chats_are_not_mixed(folder: Path) -> None:
    chat = {"prompt": [{"role": "user", "content": "say"}], "letter": "a"}
    lines = [chat, chat | {"prompt": "say"}]
    (folder / "mixed.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(UserError, match="line 2: mixes texts and chats"):
        train(folder, raw_recipe({"prompts": "mixed.jsonl"}), "mixed")


def test_fingerprints_are_of_reward_files_too(tmp_path: Path) -> None:
    phase = parse_recipe(raw_recipe(), origin="r.toml").phase[0]
    (tmp_path / "prompts.jsonl").write_text("{}")
    found = []
    for text in ("a", "b"):
        (tmp_path / "reward.py").write_text(text)
        found.append(_fingerprint(phase, None, tmp_path))
    assert found[0] != found[1]
