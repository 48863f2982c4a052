"""A training step against transformers: losses, every gradient, and the weights after AdamW.

transformers knows no sequence-wise loss and does not move routing biases: those are compared with
the formulas, in tests/unit/train.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM

from lowlat.checkpoint.load import load_model
from lowlat.data.batch import Batch
from lowlat.data.writer import write_tokenizer
from lowlat.model.transformer import Transformer
from lowlat.train.recipe.schedule import StepPlan, TrainingSchedule
from lowlat.train.recipe.schema import OptimizerConfig, parse_recipe
from lowlat.train.run.build import load_base_model
from lowlat.train.run.export import export
from lowlat.train.step.balance import LoadBalancer
from lowlat.train.step.loss import count_targets
from lowlat.train.step.optim import Optimizer
from lowlat.train.step.passes import PlainPasses
from lowlat.train.step.step import train_step
from tests.fakes import byte_tokenizer
from tests.packed_attention import PackedAttention
from tests.parameters import slow_except
from tests.unit.train import tiny

from .draw import Case, all_cases
from .oracle import KINDS, Oracle, build, save

LENGTH, ROWS = 11, 4
MTP_WEIGHT = 0.3
RATE = 0.01
CASES = [c for c in all_cases() if c.family == "deepseek_v3"]


def plan() -> StepPlan:
    phase = {
        "name": "p",
        "steps": 1,
        "sequence_length": LENGTH,
        "batch_size": ROWS,
        "micro_batch_size": 2,
        "learning_rate": RATE,
        "mtp_weight": MTP_WEIGHT,
    }
    raw = {"name": "t", "model": {}, "data": {"folder": "none"}, "phase": [phase]}
    return TrainingSchedule(parse_recipe(raw, origin="test")).at(0)


def draw_batch(case: Case) -> Batch:
    generator = torch.Generator().manual_seed(case.seed)
    shape = (ROWS, LENGTH + 1 + case.mtp)
    tokens = torch.randint(case.config.vocab_size, shape, generator=generator)
    return Batch(tokens=tokens, loss_mask=torch.ones_like(tokens, dtype=torch.bool))


def trainable(oracle: Oracle, folder: Path, dtype: str = "fp32") -> Transformer:
    """The same model as lowlat trains it."""
    save(oracle, folder)
    config = replace(load_model(folder).config, mtp_copies=False)
    model = load_base_model(folder, config, dtype)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.endswith("e_score_correction_bias"))
    return model


def oracle_losses(oracle: Oracle, batch: Batch) -> list[Tensor]:
    """Mean losses of the main head and of every MTP module."""
    positions = torch.arange(LENGTH)[None]
    sums: list[list[Tensor]] = [[] for _ in range(1 + oracle.case.mtp)]
    for row in batch.tokens:
        labels = row[: LENGTH + 1][None]
        # transformers shifts labels by itself and leaves the last position out
        sums[0].append(oracle.model(labels, labels=labels, use_cache=False).loss)
        if oracle.mtp is None:
            continue
        decoder = oracle.model.get_decoder()
        hidden = decoder(row[None, :LENGTH], use_cache=False).last_hidden_state
        for depth in range(oracle.case.mtp):
            ahead = row[None, depth + 1 : LENGTH + depth + 1]
            hidden = oracle.mtp.forward_layer(depth, hidden, positions, None, input_ids=ahead)
            logits = oracle.mtp._project_to_logits(hidden)[0]
            sums[1 + depth].append(F.cross_entropy(logits, row[depth + 2 : LENGTH + depth + 2]))
    return [torch.stack(own).mean() for own in sums]


def oracle_parameters(oracle: Oracle) -> Iterator[tuple[str, Tensor]]:
    """By lowlat's names."""
    for name, parameter in oracle.model.named_parameters():
        yield name.removeprefix("model."), parameter
    if oracle.mtp is None:
        return
    for depth, layer in enumerate(oracle.mtp.layers):
        for name, parameter in layer.named_parameters():
            name = name.replace("mtp_block.", "block.").replace("post_norm.", "norm.")
            yield f"mtp.{depth}.{name}", parameter


def assert_close(found: Tensor, wanted: Tensor, name: str) -> None:
    scale = wanted.abs().max().clamp(min=1e-2)
    assert (found - wanted).abs().max() <= 2e-4 * scale, name


@pytest.mark.parametrize("case", slow_except(CASES[::2], CASES), ids=lambda case: case.name)
def test_a_step(case: Case, tmp_path: Path) -> None:
    oracle = build(case)
    model = trainable(oracle, tmp_path)
    batch = draw_batch(case)
    losses = oracle_losses(oracle, batch)
    mtp = sum(losses[1:], torch.zeros(())) * (MTP_WEIGHT / max(1, case.mtp))
    (losses[0] + mtp).backward()
    targets = count_targets(batch, 1 + case.mtp)
    sums = PlainPasses(model, torch.float32).backward(batch, plan(), targets)
    expected = [loss.item() for loss in losses]
    assert (sums[:-1] / (ROWS * LENGTH)).tolist() == pytest.approx(expected, rel=2e-5)
    theirs = dict(oracle_parameters(oracle))
    ours = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not case.config.tie_word_embeddings:
        assert "lm_head.weight" in ours
    else:
        theirs.pop("lm_head.weight", None)
    assert ours.keys() == theirs.keys()
    for name, parameter in ours.items():
        assert parameter.grad is not None and theirs[name].grad is not None, name
        assert_close(parameter.grad, theirs[name].grad, name)
    step_both(model, batch, theirs)
    for name, parameter in ours.items():
        assert_close(parameter.detach(), theirs[name].detach(), name)


def test_gradients_of_shared_matrices_in_fp64(tmp_path: Path) -> None:
    """Released checkpoints hold copies of embedding and head; trained as weights of their own they
    left 28 % of the head's gradient out.
    """
    case = next(c for c in CASES if c.mtp_copies and c.mtp == 2)
    oracle = build(case)
    model = trainable(oracle, tmp_path, "fp64")
    oracle.model.double()
    assert oracle.mtp is not None
    oracle.mtp.double()
    batch = draw_batch(case)
    losses = oracle_losses(oracle, batch)
    (losses[0] + sum(losses[1:], torch.zeros(())) * (MTP_WEIGHT / case.mtp)).backward()
    PlainPasses(model, torch.float64).backward(batch, plan(), count_targets(batch, 1 + case.mtp))
    theirs = dict(oracle_parameters(oracle))
    shared = {"embed_tokens.weight", "lm_head.weight"} & theirs.keys()
    assert "embed_tokens.weight" in shared
    for name in shared:
        wanted, found = theirs[name].grad, dict(model.named_parameters())[name].grad
        assert wanted is not None and found is not None
        assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max(), name


def step_both(model: Transformer, batch: Batch, theirs: dict[str, Tensor]) -> None:
    """One step of each; an epsilon so large that rounding of gradients near zero stays small."""
    reference = torch.optim.AdamW(
        [
            {"params": [p for p in theirs.values() if p.ndim > 1], "weight_decay": 0.1},
            {"params": [p for p in theirs.values() if p.ndim == 1], "weight_decay": 0.0},
        ],
        lr=RATE,
        betas=(0.9, 0.95),
        eps=1e-2,
    )
    torch.nn.utils.clip_grad_norm_(theirs.values(), 1.0)
    reference.step()
    optimizer = Optimizer(model, OptimizerConfig(eps=1e-2), tiny.unsharded(model))
    optimizer.zero_grad()
    watch = LoadBalancer(model, sequence_weight=0.0)
    passes = PlainPasses(model, torch.float32)
    result = train_step(passes, optimizer, watch, batch, plan(), num_ahead=1 + len(model.mtp))
    assert result.is_finite


def test_the_cases_cover_what_matters() -> None:
    assert {case.mtp for case in CASES} == {0, 1, 2}
    assert {case.config.tie_word_embeddings for case in CASES} == {True, False}
    kinds = {case.config.rope_parameters["rope_type"] for case in CASES}
    assert kinds == {"default", "yarn"}
    assert any(case.config.n_group > 1 for case in CASES)


def test_an_exported_model_in_transformers(tmp_path: Path, text_folder: Path) -> None:
    """What training leaves loads there, with the same logits."""
    case = CASES[0]
    model = trainable(build(case), tmp_path / "start")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.01 * torch.randn_like(parameter)
    weights = {name: p.detach() for name, p in model.named_parameters()}
    export(model.config, weights, tmp_path / "model", dtype="fp32", text=text_folder)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="float32", **KINDS)
    ids = draw_batch(case).tokens[0, :LENGTH]
    attention = PackedAttention([LENGTH])
    with torch.no_grad():
        found = model.logits(model(ids, attention.positions(), attention))
        wanted = theirs(ids[None], use_cache=False).logits[0]
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.fixture
def text_folder(tmp_path: Path) -> Path:
    """A folder with a tokenizer."""
    folder = tmp_path / "text"
    folder.mkdir()
    write_tokenizer(folder, byte_tokenizer())
    return folder
