"""Learning from a teacher: what is measured and moved, exact resumption."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lowlat.attention.flash import FlashAttention
from lowlat.checkpoint.load import load_model
from lowlat.checkpoint.save import save_model
from lowlat.data.batch import Batch
from lowlat.data.dataset import TokenizedDataset
from lowlat.data.packing import PackedChats, PackedSequences
from lowlat.model.transformer import Transformer
from lowlat.train.recipe.schema import parse_recipe
from lowlat.train.run.failed_step import diagnose_failed_step
from lowlat.train.step.loss import batch_loss, count_targets
from lowlat.train.step.teacher import Teacher
from lowlat.utils.errors import UserError
from tests.parameters import slow_except

from . import recovering, tiny, tuning


@pytest.fixture
def folder(teacher_folder: Path) -> Path:
    return teacher_folder


def loaded(path: Path, dtype: torch.dtype = torch.float64) -> Transformer:
    return load_model(path, dtype=str(dtype).removeprefix("torch.").replace("float", "fp")).model


def held_out(
    folder: Path, rows: int = 4, kind: type[PackedSequences] | type[PackedChats] = PackedSequences
) -> Batch:
    windows = kind(
        TokenizedDataset.open(folder / "tokens"),
        split="held_out",
        sequence_length=31,
        num_ahead=1,
        seed=0,
        document_masks=True,
        fim_rate=0.0,
    )
    return windows.batch(0, min(rows, windows.per_epoch))


def whole_logits(model: Transformer, batch: Batch) -> Tensor:
    attention = FlashAttention(batch.lengths(1))
    length = batch.sequence_length(1)
    positions = attention.positions()
    hidden = model(batch.tokens[:, :length].flatten(), positions, attention)
    return model.logits(hidden)


def divergence(folder: Path, name: str, batch: Batch) -> Tensor:
    """Mean KL over the targets of `batch` by whole logits, in fp64."""
    taught = whole_logits(loaded(folder / "teacher"), batch).log_softmax(1)
    own = whole_logits(loaded(folder / name), batch).log_softmax(1)
    kept = batch.loss_mask[:, 1:].flatten()
    return (taught.exp() * (taught - own)).sum(1)[kept].mean()


def test_an_exact_student_diverges_by_rounding(folder: Path) -> None:
    """The converted model is the teacher: there is nothing to learn."""
    run = recovering.train(folder, recovering.raw({"steps": 1}, base_model="student"))
    found = [run.records(kind)[0]["divergence"] for kind in ("step", "evaluation")]
    assert max(map(abs, found)) < 1e-6
    assert run.records("step")[0]["grad_norm"] < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("optimiser", ["adamw", "muon"])
def test_a_damaged_student_heals(folder: Path, optimiser: str) -> None:
    """Held-out KL falls, to what the exported model really has; what was measured before the first
    step is that of the base_model.
    """
    table = {"name": optimiser, "weight_decay": 0.0}
    rate = {"learning_rate": 2e-3, "steps": 20}
    recipe = recovering.raw(rate, optimizer=table, evaluation={"every_steps": 50, "sequences": 4})
    run = recovering.train(folder, recipe)
    first, last = run.records("evaluation")
    batch = held_out(folder, kind=PackedChats)  # the text has a mask, so whole documents are packed
    assert (first["step"], last["step"]) == (0, 20)
    before = divergence(folder, "damaged", batch)
    after = divergence(folder, "run/model", batch)
    assert first["divergence"] == pytest.approx(before.item(), rel=1e-3)
    assert last["divergence"] == pytest.approx(after.item(), rel=1e-3)
    assert after < 0.5 * before
    assert run.records("step")[-1]["divergence"] < 0.5 * run.records("step")[0]["divergence"]


def test_only_attention_moves(folder: Path) -> None:
    """Frozen parameters take no gradient and no state of the optimiser, keep every bit, and are in
    saves and exports all the same.
    """
    run = recovering.train(folder, recovering.raw({"steps": 2}))
    base_model, end = tuning.loaded(folder / "damaged"), tuning.loaded(run.path / "model")
    moved = set(tuning.changed(base_model, end))
    own = {name for name in base_model if ".self_attn." in name}
    assert moved == own
    saved = run.saved()
    assert {name.removeprefix("model.") for name in saved if name.startswith("model.")} == {
        *base_model
    }
    with_state = {n.removeprefix("optimizer.exp_avg.") for n in saved if ".exp_avg." in n}
    assert with_state == own
    frozen = [p for n, p in run.trainer.model.named_parameters() if n not in own]
    assert all(p.grad is None and not p.requires_grad for p in frozen)


def test_what_stays_is_held_as_products_take_it(folder: Path) -> None:
    """In bf16: matrices in bf16, rounded once from the checkpoint's fp32; what moves, norms and
    their like in fp32. A run resumes from its checkpoint to the same bits.
    """
    phase = {"steps": 4}
    recipe = recovering.raw(
        phase, precision="bf16", checkpoints={"every_steps": 1, "keep_last": 20}
    )
    given = {"base_model": folder / "damaged", "teacher": folder / "teacher"}
    whole = recovering.train(folder, recipe, name="whole")
    tuning.stop_after(2, folder, recipe, name="parts", **given)
    parts = recovering.train(folder, recipe, name="parts")
    tuning.assert_same(parts.saved(), whole.saved())
    base_model = tuning.loaded(folder / "damaged")
    for run in (whole, parts):
        for name, parameter in run.trainer.model.named_parameters():
            stays = not parameter.requires_grad and parameter.ndim > 1
            assert parameter.dtype == (torch.bfloat16 if stays else torch.float32), name
            assert not stays or torch.equal(parameter, base_model[name].bfloat16()), name


def test_gates_of_experts_that_stay_are_fp32() -> None:
    """They compute in it; embeddings, experts and heads are held in bf16."""
    from lowlat.train.layers.stacked_experts import stack_experts
    from lowlat.train.step.trainable import cast_frozen, freeze_all_but_attention
    from tests.lowlat_configs import random_model

    model = random_model(tuning.config(), torch.float32)
    stack_experts(model)
    freeze_all_but_attention(model)
    cast_frozen(model, torch.bfloat16)
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    for name, dtype in dtypes.items():
        is_wide = ".self_attn." in name or "norm" in name or ".gate." in name
        assert dtype == (torch.float32 if is_wide else torch.bfloat16), name
    assert any(".gate." in name for name in dtypes) and any(".experts." in n for n in dtypes)


def test_attention_alone_without_a_teacher(folder: Path) -> None:
    recipe = recovering.raw({"steps": 2})
    del recipe["distillation"]
    run = recovering.train(folder, recipe, teacher=None)
    base_model, end = tuning.loaded(folder / "damaged"), tuning.loaded(run.path / "model")
    assert {name for name in base_model if ".self_attn." in name} == set(
        tuning.changed(base_model, end)
    )
    assert "divergence" not in run.records("step")[0]


def test_biases_of_attention_move_and_its_norms_do_not(tmp_path: Path) -> None:
    """A DeepSeek with latent norms and biases; MTP modules have attention as well."""
    from dataclasses import replace

    plain = tuning.config(moe=None)
    attention = replace(plain.attention, attention_bias=True)  # pyright: ignore[reportArgumentType]
    config = replace(plain, attention=attention)
    tuning.checkpoint(tmp_path / "base", config)
    tuning.chats(tmp_path / "tokens")
    recipe = tuning.raw_recipe(base_model="base", trainable="attention")
    run = tuning.train(tmp_path, recipe, base_model=tmp_path / "base")
    moved = tuning.changed(tuning.loaded(tmp_path / "base"), tuning.loaded(run.path / "model"))
    assert any(name.endswith("bias") for name in moved)
    assert any(name.startswith("mtp.0.block.self_attn") for name in moved)
    assert all(".self_attn." in name and "norm" not in name for name in moved)


@pytest.mark.parametrize("stopped", slow_except([3], [3, 5]))
@pytest.mark.parametrize("match", slow_except(["layers"], ["logits", "attention", "layers"]))
def test_a_stopped_run_resumes_exactly(folder: Path, match: str, stopped: int) -> None:
    """Bit for bit, within a phase that matches layers and between that and the next."""
    phases = ({"steps": 5, "match": match}, {"name": "more", "steps": 4, "learning_rate": 1e-3})
    recipe = recovering.raw(
        *phases, checkpoints={"every_steps": 1, "keep_last": 20}, trainable="all"
    )
    given = {"base_model": folder / "damaged", "teacher": folder / "teacher"}
    whole = recovering.train(folder, recipe, name="whole")
    tuning.stop_after(stopped, folder, recipe, name="parts", **given)
    parts = recovering.train(folder, recipe, name="parts")
    tuning.assert_same(parts.saved(), whole.saved())
    assert whole.records("step")[-1]["divergence"] == parts.records("step")[-1]["divergence"]


@pytest.mark.parametrize("match", slow_except(["layers"], ["attention", "layers"]))
def test_layers_learn_from_the_teachers_own_inputs(folder: Path, match: str) -> None:
    """The error falls, as does the divergence of a model that had no gradient from it; steps know
    no loss.
    """
    rate = {"learning_rate": 2e-3, "steps": 25, "match": match}
    evaluation = {"every_steps": 50, "sequences": 4}
    run = recovering.train(folder, recovering.raw(rate, evaluation=evaluation))
    steps, (first, last) = run.records("step"), run.records("evaluation")
    assert all(step["loss"] is None and step["mtp_losses"] == [] for step in steps)
    assert steps[-1]["layer_error"] < 0.5 * steps[0]["layer_error"]
    assert last["divergence"] < 0.5 * first["divergence"]
    assert last["loss"] != first["loss"]


def layer_errors(folder: Path, batch: Batch, match: str) -> tuple[Tensor, dict[str, Tensor]]:
    """The mean error of layers by definition, in fp64, and its gradients."""
    teacher, model = loaded(folder / "teacher"), loaded(folder / "damaged")
    attention = FlashAttention(batch.lengths(1))
    positions = attention.positions()
    x = teacher.embed_tokens(batch.tokens[:, :31].flatten())
    ropes = [each.rotary.of(0, each.rotary(positions)) for each in (teacher, model)]
    weights = batch.loss_mask[:, 1:].sum(1) / batch.loss_mask[:, 1:].sum()
    total = torch.zeros((), dtype=torch.float64)
    for layer, other in zip(model.layers, teacher.layers, strict=True):
        with torch.no_grad():
            after = other(x, ropes[0], attention)
            wanted = other.self_attn(other.input_layernorm(x), ropes[0], attention)  # pyright: ignore
        made = layer.self_attn(layer.input_layernorm(x), ropes[1], attention)  # pyright: ignore
        if match == "layers":
            wanted, made = after - x, layer(x, ropes[1], attention) - x
        error = (made - wanted).square().view(batch.rows, -1).sum(1)
        total = total + (error / wanted.square().view(batch.rows, -1).sum(1) * weights).sum()
        x = after
    total = total / len(model.layers)
    total.backward()
    return total, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("rows", [1, 3, 4])
@pytest.mark.parametrize("match", ["attention", "layers"])
def test_errors_of_layers_by_definition(folder: Path, match: str, rows: int) -> None:
    """Value and gradients, however a batch is cut into micro-batches."""
    from lowlat.train.recipe.schedule import TrainingSchedule
    from lowlat.train.step.passes import PlainPasses

    batch = held_out(folder)
    wanted, gradients = layer_errors(folder, batch, match)
    change = {"match": match, "micro_batch_size": rows, "batch_size": 12}
    plan = TrainingSchedule(parse_recipe(recovering.raw(change), origin="r")).at(0)
    model = loaded(folder / "damaged")
    teacher = Teacher(loaded(folder / "teacher"), torch.float64, cross_entropy=0.0)
    passes = PlainPasses(model, torch.float64, teacher=teacher)
    targets = count_targets(batch, 1)
    sums = passes.backward(batch, plan, targets)
    torch.testing.assert_close(sums[-1] / targets[0], wanted.detach())
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == gradients.keys() and any(".self_attn." in name for name in found)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, gradients[name], rtol=1e-7, atol=1e-12)


def test_cross_entropy_is_added_with_its_weight(folder: Path) -> None:
    """total = KL + weight * nll, of which the gradient is taken."""
    batch = held_out(folder)
    attention = FlashAttention(batch.lengths(1))
    model, taught = loaded(folder / "damaged"), loaded(folder / "teacher")
    targets = count_targets(batch, 1)

    def loss(teacher: Teacher | None) -> Any:
        return batch_loss(
            model,
            batch,
            attention,
            attention.positions(),
            targets=targets,
            mtp_weight=0.0,
            z_weight=0.0,
            dtype=torch.float64,
            teacher=teacher,
        )

    plain = loss(None)
    pure, mixed = (loss(Teacher(taught, torch.float64, cross_entropy=w)) for w in (0.0, 0.7))
    torch.testing.assert_close(mixed.total, pure.total + 0.7 * plain.total)
    torch.testing.assert_close(mixed.heads, plain.heads)
    torch.testing.assert_close(pure.matched, divergence(folder, "damaged", batch) * targets[0])


def test_a_teacher_that_changed_is_refused(folder: Path, teacher_models: Path) -> None:
    recipe = recovering.raw({"steps": 4}, checkpoints={"every_steps": 1})
    given = {"base_model": folder / "damaged", "teacher": folder / "teacher"}
    tuning.stop_after(2, folder, recipe, **given)
    other = load_model(teacher_models / "teacher", dtype="fp32")
    with torch.no_grad():
        next(other.model.parameters())[5, 3] += 0.01
    (folder / "teacher").unlink()
    save_model(other.model, other.config, folder / "teacher", source=teacher_models / "teacher")
    with pytest.raises(
        UserError, match=r"run: was trained with .* distillation\.teacher is another"
    ):
        recovering.train(folder, recipe)
    shutil.rmtree(folder / "teacher")
    (folder / "teacher").symlink_to(teacher_models / "teacher")
    assert recovering.train(folder, recipe).outcome.is_complete


def test_a_teacher_of_another_config_is_another(folder: Path, teacher_models: Path) -> None:
    """The same weights with another base of rotary frequencies compute something else."""
    recipe = recovering.raw({"steps": 4}, checkpoints={"every_steps": 1})
    tuning.stop_after(2, folder, recipe, base_model=folder / "damaged", teacher=folder / "teacher")
    shutil.copytree(teacher_models / "teacher", folder / "copy")
    file = folder / "copy" / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"rope_theta": 101.0}))
    with pytest.raises(UserError, match=r"distillation\.teacher is another model"):
        recovering.train(folder, recipe, teacher=folder / "copy")


def test_a_save_from_before_there_were_teachers_resumes(folder: Path) -> None:
    """A recipe written down without the keys of distillation has their defaults."""
    from lowlat.train.recipe.schedule import TrainingSchedule
    from lowlat.train.run.state import check_resumable

    recipe = parse_recipe(tuning.raw_recipe(base_model="damaged"), origin="r")
    written = recipe.model_dump(mode="json")
    del written["distillation"], written["trainable"], written["phase"][0]["match"]
    saved = {"recipe": written, "data": ["f"], "step": 0, "tokens": 0, "seconds": 0.0}
    schedule, inputs = TrainingSchedule(recipe), tiny.inputs("f")
    assert check_resumable(saved, recipe, inputs, schedule, "runs/x").step == 0


def test_a_teacher_of_another_size_teaches_distributions(folder: Path) -> None:
    (folder / "teacher").unlink()
    recovering.teacher(folder, num_hidden_layers=3, hidden_size=29)
    run = recovering.train(folder, recovering.raw({"steps": 6}))
    divergences = [step["divergence"] for step in run.records("step")]
    assert divergences[-1] < divergences[0]


def test_updates_of_lora_learn_from_a_teacher(folder: Path) -> None:
    recipe = recovering.raw({"steps": 12, "learning_rate": 2e-2}, lora={"rank": 4, "alpha": 8.0})
    run = recovering.train(folder, recipe | {"trainable": "all"})
    first, last = run.records("evaluation")[0], run.records("evaluation")[-1]
    assert last["divergence"] < first["divergence"]


def break_teacher(folder: Path, teacher_models: Path, value: float) -> None:
    broken = load_model(teacher_models / "teacher", dtype="fp32")
    with torch.no_grad():
        broken.model.norm.weight.fill_(value)
    (folder / "teacher").unlink()
    save_model(broken.model, broken.config, folder / "teacher", source=teacher_models / "teacher")


def test_a_divergence_that_is_not_finite_ends_the_run(folder: Path, teacher_models: Path) -> None:
    """Nothing moves, the batch is kept, and the message names the loss. Looked at again, the number
    comes out of the teacher.
    """
    break_teacher(folder, teacher_models, 3e38)
    with pytest.raises(UserError, match="step 1: the loss is not finite; its batch is in"):
        recovering.train(folder, recovering.raw())
    assert (folder / "run" / "failed-step-00000001.safetensors").exists()
    found = diagnose_failed_step(folder / "run")
    assert (found.step, found.activation) == (1, "teacher.norm")
    assert found.matched is not None and not math.isfinite(found.matched)
    assert all(map(math.isfinite, found.losses))
    shutil.rmtree(folder / "teacher")
    with pytest.raises(UserError, match="does not exist; restore the weights"):
        diagnose_failed_step(folder / "run")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_teacher_without_numbers_is_named(
    folder: Path, teacher_models: Path, value: float
) -> None:
    """Regression: a lower rate advised where none would help."""
    break_teacher(folder, teacher_models, value)
    with pytest.raises(UserError, match=r"distillation\.teacher .*'norm\.weight' has values that"):
        recovering.train(folder, recovering.raw())


def test_a_step_that_a_weight_of_the_loss_broke_is_broken_again(folder: Path) -> None:
    raw = recovering.raw()
    raw["distillation"] = raw["distillation"] | {"cross_entropy_weight": 1e38}
    with pytest.raises(UserError, match=r"step \d: the (gradient|loss) is not finite"):
        recovering.train(folder, raw)
    assert not math.isfinite(diagnose_failed_step(folder / "run").grad_norm)
