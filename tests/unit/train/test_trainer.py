"""Whole runs: exact resumption, signals, saves at borders of phases, losses that are not finite."""

import errno
import math
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from lowlat.train.recipe.schema import Recipe
from lowlat.train.run.failed_step import diagnose_failed_step, read_batch
from lowlat.train.run.trainer import Trainer
from lowlat.train.step.step import evaluate
from lowlat.utils.errors import UserError
from tests.parameters import slow_except

from . import runs
from .runs import STEPS, opened, train

RESUMED = [
    ("fp32", "adamw", "none"),
    pytest.param("fp32", "muon", "full", marks=pytest.mark.slow),
    ("bf16", "muon", "none"),
    pytest.param("bf16", "adamw", "full", marks=pytest.mark.slow),
    pytest.param("fp8", "adamw", "none", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("precision", "optimizer", "activation_checkpointing"), RESUMED)
def test_a_stopped_run_resumes_exactly(
    base: Path, precision: str, optimizer: str, activation_checkpointing: str
) -> None:
    """Stopped within a phase, at a border, and within the next: the same bits as undisturbed, in
    every save and every record.

    Regression: a state that lacks routing biases, moments, schedule, position or random numbers.
    """
    wanted = runs.recipe(
        precision=precision,
        optimizer={"name": optimizer},
        activation_checkpointing=activation_checkpointing,
    )
    before = torch.get_rng_state()
    whole, log = train(base / "whole", wanted)
    torch.set_rng_state(before)
    assert whole.is_complete and whole.step == STEPS
    records, evaluations = [], []
    for begun, last in ((0, 1), (1, 3), (3, 5), (5, 7), (7, STEPS)):
        if begun:
            torch.manual_seed(last)  # a new process has other random numbers
        outcome, part = train(base / "parts", wanted, last)
        assert part.begun_at == begun and outcome.step == last
        assert outcome.is_complete == (last == STEPS)
        records += part.steps
        evaluations += part.evaluations
    for step in runs.steps(base / "whole"):
        runs.assert_same(runs.saved(base / "parts", step), runs.saved(base / "whole", step))
    assert list(map(runs.computed, records)) == list(map(runs.computed, log.steps))
    assert list(map(runs.computed, evaluations)) == list(map(runs.computed, log.evaluations))
    assert outcome.losses == whole.losses


def test_what_a_run_leaves(base: Path) -> None:
    """Checkpoints at every so many steps and at the end of every phase; records of every step;
    evaluations likewise; and a model.
    """
    wanted = runs.recipe(checkpoints={"every_steps": 4, "keep_last": 20})
    outcome, log = train(base / "run", wanted)
    assert runs.steps(base / "run") == [4, 5, 8, 9]
    assert [record.step for record in log.steps] == list(range(1, STEPS + 1))
    assert [record.phase for record in log.steps] == ["short"] * 5 + ["long"] * 4
    assert [record.batch_tokens for record in log.steps] == [
        *(11 * rows for rows in (2, 4, 4, 6, 6)),
        *(17 * 4,) * 4,
    ]
    assert log.steps[-1].tokens == sum(record.batch_tokens for record in log.steps)
    assert [record.learning_rate for record in log.steps[:3]] == pytest.approx(
        [1e-2 / 3, 2e-2 / 3, 1e-2]
    )
    assert [record.step for record in log.evaluations] == [3, 5, 6, 9]
    assert all(len(record.mtp_losses) == 1 for record in [*log.steps, *log.evaluations])
    assert all(math.isfinite(record.loss) for record in [*log.steps, *log.evaluations])
    assert log.steps[0].loss == pytest.approx(math.log(261), rel=0.15)
    assert log.steps[0].z_loss > 0 and log.steps[-1].z_loss == 0
    assert [expert.layer for expert in log.steps[0].experts] == [1, 2]
    assert all(sum(e.load) == pytest.approx(1) for r in log.steps for e in r.experts)
    assert outcome.model == base / "run" / "model" and outcome.model.is_dir()


def test_evaluations_are_of_the_same_windows(base: Path) -> None:
    """The first ones of the held-out split, in micro-batches; bits per byte follow from nats per
    token and the bytes of the split.
    """
    with opened(base / "run", runs.recipe(), runs.Notes()) as trainer:
        trainer.run()
        log, data = trainer.log, trainer._present
        assert data.held_out is not None and isinstance(log, runs.Notes)
        batch = data.held_out.batch(0, 5)
        losses = evaluate(trainer._passes, [batch], num_ahead=2)
    last = log.evaluations[-1]
    assert (last.loss, *last.mtp_losses) == pytest.approx(losses, rel=1e-6)
    tokens, size = data.dataset.num_tokens("held_out"), data.dataset.num_bytes("held_out")
    assert last.bits_per_byte == pytest.approx(last.loss / math.log(2) * tokens / size)
    assert tokens > size > 0


def test_a_finished_run_has_nothing_left_to_do(base: Path) -> None:
    train(base / "run", runs.recipe())
    outcome, log = train(base / "run", runs.recipe())
    assert outcome.is_complete and outcome.losses == () and log.steps == []
    assert outcome.model == base / "run" / "model"


def test_a_model_whose_saves_are_gone_is_not_taken_for_a_new_one(base: Path) -> None:
    train(base / "run", runs.recipe())
    shutil.rmtree(base / "run" / "saves")
    with (
        pytest.raises(
            UserError, match=r"model: exists, but the checkpoints of its run are gone; move it"
        ),
        opened(base / "run", runs.recipe(seed=7)),
    ):
        pass


@pytest.mark.slow
def test_a_tokenizer_that_cannot_be_written(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Regression: a full disk told by a traceback, and half a tokenizer taken for a whole one."""
    full = OSError(errno.ENOSPC, "No space left on device")
    with monkeypatch.context() as patch:
        patch.setattr("lowlat.train.run.export.write_new_files", Mock(side_effect=full))
        with (
            pytest.raises(UserError, match=r"tokenizer: cannot be written .*free"),
            opened(base / "run", runs.recipe()),
        ):
            pass
    outcome, _ = train(base / "run", runs.recipe())
    assert outcome.model is not None and (outcome.model / "tokenizer.json").stat().st_size > 0


def test_a_stop_before_the_first_step(base: Path) -> None:
    """A run stopped while it began saves nothing, and begins again."""
    outcome, log = train(base / "run", runs.recipe(), 1)
    assert (outcome.step, outcome.is_complete, outcome.model) == (1, False, None)
    assert runs.steps(base / "run") == [1]
    assert "stopped after step 1; the same command resumes from there" in log.notes


BOOM = {"learning_rate": [{"to": 0.01, "steps": 2}, {"to": 1e30, "shape": "constant"}]}


@pytest.mark.parametrize("every", slow_except([2], [1, 2, 50]))
def test_a_loss_that_is_not_finite(base: Path, every: int) -> None:
    """The run ends with the batch of the step and the state before it, whenever the last save was;
    started again it ends at the same step.
    """
    wanted = runs.recipe(
        phase=runs.phases(BOOM, {}), checkpoints={"every_steps": every, "keep_last": 20}
    )
    log = runs.Notes()
    for _ in range(2):
        with (
            opened(base / "run", wanted, log) as trainer,
            pytest.raises(UserError, match=r"step 4: the (loss|gradient) is not finite") as caught,
        ):
            trainer.run()
    assert [record.step for record in log.steps] == [1, 2, 3]
    save = runs.saved(base / "run")
    assert save.step == 3 and save.metadata["rows_of_data"] == 2 + 4 + 4
    path = base / "run" / "failed-step-00000004.safetensors"
    assert str(path) in str(caught.value) and str(base / "run" / "saves") in str(caught.value)
    assert f"lowlat train export {base / 'run'} DST" in str(caught.value)
    seen = diagnose_failed_step(base / "run")
    assert seen.step == 4 and not all(map(math.isfinite, (*seen.losses, seen.grad_norm)))
    assert seen.activation or seen.gradient
    batch = read_batch(path)
    with opened(base / "other", wanted) as trainer:
        expected = trainer._present.train.batch(10, 6)
    assert torch.equal(batch.tokens, expected.tokens)
    assert all(tensor.isfinite().all() for tensor in runs.tensors(save).values())


def test_a_gradient_that_is_not_finite_at_the_first_step(base: Path) -> None:
    """Even the initial weights are saved, from which the run fails again."""
    with opened(base / "run", runs.recipe()) as trainer:
        with torch.no_grad():
            trainer.model.norm.weight[0] = math.nan
        with pytest.raises(UserError, match="step 1: the loss is not finite"):
            trainer.run()
    assert runs.steps(base / "run") == [0]
    assert diagnose_failed_step(base / "run").activation == "norm"
    with (
        opened(base / "run", runs.recipe()) as trainer,
        pytest.raises(UserError, match="step 1: the loss"),
    ):
        trainer.run()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"seed": 4}, "seed was 3 and is 4"),
        ({"model": runs.MODEL | {"n_group": 1}}, "model.n_group was 2 and is 1"),
        ({"optimizer": {"max_grad_norm": 2.0}}, "optimizer.max_grad_norm was 1.0 and is 2.0"),
        ({"precision": "bf16"}, "precision was 'fp32' and is 'bf16'"),
        ({"phase": runs.phases({}, {"steps": 5})}, "phase.1.steps was 4 and is 5"),
        ({"phase": runs.PHASES[:1]}, "phase was"),
        (
            {"data": {"folder": "tokens", "fim_rate": 0.1}},
            "data.fim_rate was 0.3 and is 0.1",
        ),
        (
            {"phase": runs.phases({"learning_rate": 0.1}, {})},
            "phase.0.learning_rate was",
        ),
    ],
)
def test_another_recipe_is_not_resumed(base: Path, changes: dict[str, Any], said: str) -> None:
    train(base / "run", runs.recipe(), 2)
    with pytest.raises(UserError) as caught, opened(base / "run", runs.recipe(**changes)):
        pass
    message = str(caught.value)
    assert said in message and str(base / "run") in message and "\n" not in message
    assert "restore it, or choose another --out" in message


@pytest.mark.slow
def test_what_may_change_between_parts_of_a_run(base: Path) -> None:
    """Names, saves, logs, evaluations and recomputation decide nothing about the numbers."""
    train(base / "whole", runs.recipe())
    train(base / "run", runs.recipe(), 2)
    outcome, _ = train(
        base / "run",
        runs.recipe(
            name="renamed",
            checkpoints={"every_steps": 3, "keep_last": 9},
            evaluation={"every_steps": 100, "sequences": 1},
            log={"every_steps": 2},
            activation_checkpointing="full",
        ),
    )
    assert outcome.is_complete
    runs.assert_same(runs.saved(base / "run", STEPS), runs.saved(base / "whole", STEPS))


def test_other_data_is_not_resumed(base: Path) -> None:
    train(base / "run", runs.recipe(), 2)
    (base / "tokens").unlink()
    runs.make_tokens(base / "tokens", held_out=6)
    with (
        pytest.raises(UserError, match="its data, prompts or reward files have changed"),
        opened(base / "run", runs.recipe()),
    ):
        pass


def batches(trainer: Trainer, count: int) -> list[torch.Tensor]:
    return [trainer._present.train.batch(n, 1).tokens for n in range(count)]


def test_masks_and_infilling(base: Path) -> None:
    """What a phase says about its data reaches its batches, and its losses."""
    plain, other = ({"folder": "tokens"}, {"folder": "tokens", "document_masks": True})
    first: list[float] = []
    for table in (plain, other, plain | {"fim_rate": 1.0}):
        wanted = runs.recipe(data=table, phase=runs.phases({"batch_size": 20.0}, {}))
        _, log = train(base / f"run-{len(first)}", wanted, 1)
        first.append(log.steps[0].loss)
        with opened(base / f"run-{len(first) - 1}", wanted) as trainer:
            batch = trainer._present.train.batch(0, 20)
            assert (batch.documents is not None) == table.get("document_masks", False)
            infilled = bool((batch.tokens > runs.END + 1).any())
            assert infilled == ("fim_rate" in table)
            assert not bool(
                (trainer._present.held_out.batch(0, 5).tokens > runs.END + 1).any()  # pyright: ignore[reportOptionalMemberAccess]
            )
    assert len(set(first)) == 3


def test_a_phase_with_data_of_its_own(base: Path) -> None:
    runs.make_tokens(base / "more", held_out=0)
    wanted = runs.recipe(phase=runs.phases({}, {"data": {"folder": "more"}}))
    outcome, log = train(base / "run", wanted)
    assert outcome.is_complete
    assert [record.step for record in log.evaluations] == [3, 5]
    (note,) = [note for note in log.notes if "no evaluations" in note]
    assert str(base / "more") in note and "--held-out" in note


def test_data_of_another_tokenizer_is_refused(base: Path) -> None:
    """Regression: a later phase whose ids mean other tokens, or lie beyond the embedding."""
    runs.make_tokens(base / "more", special=("<|more|>", "<|still more|>"))
    wanted = runs.recipe(phase=runs.phases({}, {"data": {"folder": "more"}}))
    with (
        pytest.raises(UserError, match=r"phase long: .*more.*tokenizer"),
        opened(base / "run", wanted),
    ):
        pass


YARN = {"rope_scaling": {"type": "yarn", "factor": 4.0}, "max_position_embeddings": 128}


def test_longer_contexts(base: Path) -> None:
    """Weights and optimizer continue with another RoPE, which stays in the phases after; the config
    of saves and model is that of the last phase.
    """
    long = runs.PHASES[1] | {"steps": 2}
    wanted = runs.recipe(
        phase=[
            long | {"name": "short"},
            long | YARN | {"name": "long", "sequence_length": 41},
            long | {"name": "after", "sequence_length": 67},
        ]
    )
    _, log = train(base / "run", wanted, 3)
    assert log.steps[-1].batch_tokens == 4 * 41
    with opened(base / "run", wanted) as trainer:
        rope = trainer.config.rope
        assert (rope.rope_type, rope.factor, rope.rope_theta) == ("yarn", 4.0, 10000.0)
        assert rope.original_max_position_embeddings == 32 and rope.rope_interleave
        assert trainer.config.max_position_embeddings == 128
    outcome, log = train(base / "run", wanted)
    assert outcome.is_complete and log.steps[-1].batch_tokens == 4 * 67
    config = runs.saved(base / "run").metadata["config"]
    assert (config["rope_scaling"]["factor"], config["max_position_embeddings"]) == (4.0, 128)
    assert runs.saved(base / "run", 2).metadata["config"]["rope_scaling"] is None


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"sequence_length": 33}, "phase long: sequence_length 33 exceeds"),
        (
            {"rope_scaling": {"stretch": 2}},
            "phase long: rope_scaling: rope_scaling.stretch (2) is not a setting",
        ),
        (
            {"rope_scaling": {"type": "yarn", "factor": "much"}},
            "phase long: rope_scaling: rope_scaling.factor must be a number",
        ),
        (
            {"rope_scaling": {"type": "spiral"}},
            'phase long: rope_scaling: rope_scaling.type "spiral" is not supported',
        ),
    ],
)
def test_phases_that_cannot_be(base: Path, changes: dict[str, Any], said: str) -> None:
    """Said before the first step.

    Regression: a run that ends after days, where its second phase begins.
    """
    with (
        pytest.raises(UserError) as caught,
        opened(base / "run", runs.recipe(phase=runs.phases({}, changes))),
    ):
        pass
    assert said in str(caught.value)


def test_a_vocabulary_too_small_for_the_data(base: Path) -> None:
    wanted = runs.recipe(model=runs.MODEL | {"vocab_size": 100})
    with (
        pytest.raises(UserError, match="261 token ids, but the model's vocab_size is 100"),
        opened(base / "run", wanted),
    ):
        pass


def test_how_a_checkpoint_is_stored_is_no_part_of_a_model(base: Path) -> None:
    """Released configs say it, and are copied into recipes."""
    stored = {"quant_method": "fp8", "weight_block_size": [128, 128], "fmt": "e4m3"}
    wanted = runs.recipe(model=runs.MODEL | {"quantization_config": stored})
    with (
        pytest.raises(UserError, match=r"\[model\]: quantization_config .* leave it out"),
        opened(base / "run", wanted),
    ):
        pass


def test_the_seed_decides(base: Path) -> None:
    def last(folder: str, wanted: Recipe) -> dict[str, torch.Tensor]:
        train(base / folder, wanted, 2)
        return runs.tensors(runs.saved(base / folder))

    one, same, other = (last(str(n), runs.recipe(seed=seed)) for n, seed in enumerate((3, 3, 4)))
    weight = "model.layers.0.self_attn.o_proj.weight"
    assert torch.equal(one[weight], same[weight]) and not torch.equal(one[weight], other[weight])
