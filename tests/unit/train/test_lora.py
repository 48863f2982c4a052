"""LoRA: products and gradients of updates, what is trained and saved, merging, refusals."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from lowlat.api import load
from lowlat.attention.flash import FlashAttention
from lowlat.checkpoint.hf_folder import open_checkpoint
from lowlat.convert.run import convert
from lowlat.model.transformer import Transformer
from lowlat.train.cost.dry_run import require_fit
from lowlat.train.layers.stacked_experts import stack_experts
from lowlat.train.recipe.schema import LoraConfig, parse_recipe
from lowlat.train.run.export import export_adapter, export_save
from lowlat.train.step.lora import add_lora, check_lora, count_updates, is_lora_parameter, merged
from lowlat.train.step.loss import batch_loss
from lowlat.utils.errors import UserError
from tests.configs import GQA
from tests.fakes import gqa_config
from tests.lowlat_configs import random_model

from . import tiny, tuning

EVERY = (
    *("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"),
    *("gate_proj", "up_proj", "down_proj", "eh_proj"),
)
TABLE = LoraConfig(rank=3, alpha=7.0, target_modules=EVERY)


def adapted(table: LoraConfig = TABLE) -> Transformer:
    """A model in fp64 whose updates are not zero."""
    model = tiny.model(tiny.config())
    add_lora(model, table, seed=3)
    model.double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B"):
                parameter.normal_(std=0.1)
    return model


def loss(model: Transformer) -> Tensor:
    batch = tiny.batch(masked=True)
    attention = FlashAttention(batch.lengths(3))
    return batch_loss(
        model,
        batch,
        attention,
        attention.positions(torch.device("cpu")),
        targets=[20, 20, 20],
        mtp_weight=0.3,
        z_weight=0.0,
        dtype=torch.float64,
    ).total


def without_updates(model: Transformer) -> Transformer:
    """The same function with the updates in the weights, which take gradients."""
    plain = tiny.model(model.config)
    plain.load_state_dict(dict(merged(dict(model.named_parameters()), TABLE)))
    return plain


def test_updates_are_what_is_merged() -> None:
    """Loss with updates next to the weights is that with the sum, which differs from that without;
    every update, routed experts' included, takes the gradient the chain rule gives it, and
    nothing else takes one.
    """
    model = adapted()
    plain = without_updates(model)
    ours, wanted = loss(model), loss(plain)
    torch.testing.assert_close(ours, wanted, rtol=1e-12, atol=0)
    assert abs(loss(tiny.model(tiny.config())).item() - ours.item()) > 1e-3
    ours.backward()
    wanted.backward()
    full = {name: p.grad for name, p in plain.named_parameters()}
    parameters = dict(model.named_parameters())
    checked = 0
    for name, parameter in parameters.items():
        assert parameter.requires_grad == is_lora_parameter(name)
        if not is_lora_parameter(name):
            assert parameter.grad is None
        elif name.endswith("lora_A"):
            weight = gradient_of_weight(name, full)
            b = parameters[name.removesuffix("A") + "B"]
            scale = TABLE.alpha / TABLE.rank
            assert parameter.grad is not None and b.grad is not None
            for found, expected in (
                (parameter.grad, scale * b.mT @ weight),
                (b.grad, scale * weight @ parameter.mT),
            ):
                torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-12)
            checked += 1
    # Two layers and two MTP blocks of 5 attention projections and 3 of MLP, shared experts in
    # three of them, eh_proj twice
    assert checked == 4 * (5 + 3) + 3 * 3 + 2


def gradient_of_weight(name: str, full: dict[str, Tensor | None]) -> Tensor:
    owner, part = name.removesuffix(".lora_A").split(".low_rank")
    if not part:
        found = full[f"{owner}.weight"]
    elif part == ".down_proj":
        found = full[f"{owner}.down_proj"]
    else:
        both = full[f"{owner}.gate_up_proj"]
        assert both is not None
        found = both.chunk(2, dim=1)[part == ".up_proj"]
    assert found is not None
    return found


def test_untrained_updates_change_nothing() -> None:
    """B is zero, A is drawn from the seed, and the weights in memory keep their dtype."""
    model, same, other = (tiny.model(tiny.config(), torch.bfloat16) for _ in range(3))
    before = loss(tiny.model(tiny.config(), torch.bfloat16))
    for one, seed in ((model, 3), (same, 3), (other, 4)):
        add_lora(one, TABLE, seed=seed)
    assert loss(model) == before
    drawn, again, differing = (
        {n: p for n, p in m.named_parameters() if n.endswith("lora_A")}
        for m in (model, same, other)
    )
    assert all(torch.equal(drawn[n], again[n]) for n in drawn)
    assert not any(torch.equal(drawn[n], differing[n]) for n in drawn)
    assert {p.dtype for p in drawn.values()} == {torch.float32}
    assert {p.dtype for n, p in model.named_parameters() if not is_lora_parameter(n)} == {
        torch.bfloat16,
        torch.float32,  # routing biases
    }


def lora_recipe(**changes: Any) -> dict[str, Any]:
    table = {"rank": 3, "alpha": 6.0, "target_modules": list(EVERY)}
    return tuning.raw_recipe(base_model="base", lora=table, **changes)


@pytest.mark.slow
def test_run(tmp_path: Path) -> None:
    """A run saves updates alone, a resumed one ends on the same bits, and what it exports is the
    base with the updates merged: trained where there are updates, elsewhere the base's bits.
    """
    base = tuning.checkpoint(tmp_path / "base", tuning.config())
    tuning.chats(tmp_path / "tokens")
    whole = tuning.train(tmp_path, lora_recipe(), base_model=base, name="whole")
    losses = whole.losses()
    assert losses[-1] < losses[0]
    saved = whole.saved()
    assert all(is_lora_parameter(name) for name in saved if name.startswith("model."))
    trained = {name.removeprefix("model.") for name in saved if name.startswith("model.")}
    moments = {n.removeprefix("optimizer.exp_avg.") for n in saved if ".exp_avg." in n}
    assert trained == moments

    tuning.stop_after(3, tmp_path, lora_recipe(), base_model=base, name="stopped")
    resumed = tuning.train(tmp_path, lora_recipe(), base_model=base, name="stopped")
    tuning.assert_same(resumed.saved(), saved)

    model, base_model = tuning.loaded(whole.path / "model"), tuning.loaded(base)
    assert model.keys() == base_model.keys()
    changed = tuning.changed(model, base_model)
    assert changed and all(name.split(".")[-2] in EVERY for name in changed)
    assert len(changed) == sum(name.split(".")[-2] in EVERY for name in model)
    export_save(whole.path, tmp_path / "again", step=None, dtype="fp32")
    tuning.assert_same(tuning.loaded(tmp_path / "again"), model)


def test_adapter(tmp_path: Path) -> None:
    """peft's layout: every file's weight plus alpha / r B A is that of the merged model; an exactly
    converted one, whose files are padded, shows that shapes follow the files.
    """
    gqa = replace(GQA, num_attention_heads=3, num_key_value_heads=1, head_dim=8)
    source = gqa_config(attention=gqa, hidden_size=24, max_position_embeddings=64)
    convert(tuning.checkpoint(tmp_path / "gqa", source), tmp_path / "base", to="mla")
    tuning.chats(tmp_path / "tokens")
    names = ["q_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]
    recipe = tuning.raw_recipe(
        base_model="base", lora={"rank": 3, "alpha": 6.0, "target_modules": names}
    )
    run = tuning.train(tmp_path, recipe, base_model=tmp_path / "base")
    assert export_adapter(run.path, tmp_path / "adapter", step=None) == 6
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert settings["peft_type"] == "LORA" and settings["r"] == 3
    assert settings["lora_alpha"] == 6.0 and settings["base_model_name_or_path"].endswith("base")
    assert len(settings["target_modules"]) == 2 * len(names)
    adapter = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert len(adapter) == 2 * len(settings["target_modules"])
    assert run.outcome.model is not None
    before, after = open_checkpoint(tmp_path / "base"), open_checkpoint(run.outcome.model)
    for module in settings["target_modules"]:
        a, b = (adapter[f"base_model.model.{module}.lora_{part}.weight"] for part in "AB")
        weight = before.read(f"{module}.weight").float() + 6.0 / 3 * b @ a
        torch.testing.assert_close(after.read(f"{module}.weight"), weight, rtol=0, atol=1e-6)
        assert b.any()


def test_adapters_of_every_projection_are_served(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Base model and adapter give the logits of the merged model, experts and shared experts
    included."""
    base = tuning.checkpoint(tmp_path / "base", tuning.config())
    tuning.chats(tmp_path / "tokens")
    run = tuning.train(tmp_path, lora_recipe(), base_model=base, name="adapted")
    export_adapter(run.path, tmp_path / "adapter", step=None)
    assert "peft loads MLP updates as updates of fused experts; load this" in caplog.text
    export_save(run.path, tmp_path / "merged", step=None, dtype="fp32")
    model = load(base, dtype="fp32", lora={"tuned": tmp_path / "adapter"})
    merged = load(tmp_path / "merged", dtype="fp32")
    ids = [(37 * place) % 256 for place in range(41)]
    expected = merged.logits(ids)
    torch.testing.assert_close(model.logits(ids, lora="tuned"), expected, rtol=0, atol=1e-4)
    assert (model.logits(ids) - expected).abs().max() > 1e-3
    paths = {request.lora_name for request in model.adapters.requests.values()}
    assert paths == {"tuned"}


def test_adapter_refusals(tmp_path: Path) -> None:
    base = tuning.checkpoint(tmp_path / "base", tuning.config())
    tuning.chats(tmp_path / "tokens")
    one = tuning.phases({"steps": 1})
    adapted = tuning.train(tmp_path, lora_recipe(phase=one), base_model=base, name="adapted")
    export_adapter(adapted.path, tmp_path / "dst", step=None)
    with pytest.raises(UserError, match="dst: exists already; choose another destination"):
        export_adapter(adapted.path, tmp_path / "dst", step=None)
    plain = tuning.raw_recipe(base_model="base", phase=one)
    run = tuning.train(tmp_path, plain, base_model=base, name="plain")
    with pytest.raises(UserError, match="was trained without lora; leave out --adapter"):
        export_adapter(run.path, tmp_path / "dst", step=None)


@pytest.mark.slow
def test_base_that_is_gone(tmp_path: Path) -> None:
    """Updates are never put on other weights: not by an export, not by a resumed run."""
    base = tuning.checkpoint(tmp_path / "base", tuning.config())
    tuning.chats(tmp_path / "tokens")
    raw = lora_recipe(phase=tuning.phases({"steps": 1}))
    run = tuning.train(tmp_path, raw, base_model=base)
    base.rename(tmp_path / "elsewhere")
    with pytest.raises(
        UserError, match=r"base: does not exist; restore the weights that .* was trained with"
    ):
        export_save(run.path, tmp_path / "dst", step=None, dtype="fp32")
    tuning.checkpoint(base, tuning.config(), seed=8)
    with pytest.raises(UserError, match="base: has other weights now"):
        export_save(run.path, tmp_path / "dst", step=None, dtype="fp32")
    with pytest.raises(
        UserError, match="was trained with another recipe: base_model has other weights"
    ):
        tuning.train(tmp_path, raw, base_model=base)
    shutil.rmtree(base)
    (tmp_path / "elsewhere").rename(base)
    export_save(run.path, tmp_path / "dst", step=None, dtype="fp32")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"precision": "fp8"}, "lora trains in bf16 or fp32; set precision = 'bf16'"),
        ({"parallel": {"tensor": 5}}, "lora supports parallel.data only"),
        (
            {"phase": tuning.phases({"bias_update_speed": 1e-3})},
            "phase p: lora does not update routing biases; set bias_update_speed = 0",
        ),
        (
            {"lora": {"rank": 2, "alpha": 4.0, "target_modules": ["q_b_proj", "qkv"]}},
            "lora.target_modules: the model has no qkv; it has down_proj, eh_proj, gate_proj",
        ),
    ],
)
def test_refusals(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    base = tuning.checkpoint(tmp_path / "base", tuning.config())
    tuning.chats(tmp_path / "tokens")
    with pytest.raises(UserError, match=words):
        tuning.train(tmp_path, lora_recipe() | changes, base_model=base)


def test_frozen_experts_take_no_gradient() -> None:
    """Stacked experts without updates pass the gradient on as those that learn do."""
    table = LoraConfig(rank=2, alpha=4.0, target_modules=("o_proj",))
    model, plain = adapted(table), tiny.model(tiny.config())
    plain.load_state_dict(dict(merged(dict(model.named_parameters()), table)))
    loss(model).backward()
    loss(plain).backward()
    wanted = dict(plain.named_parameters())
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            full = wanted[name.replace("low_rank.lora_B", "weight")].grad
            a = model.get_parameter(name.removesuffix("B") + "A")
            assert full is not None and parameter.grad is not None
            torch.testing.assert_close(parameter.grad, 2 * full @ a.mT, rtol=1e-8, atol=1e-12)
        else:
            assert parameter.grad is None or is_lora_parameter(name)


@pytest.mark.parametrize(("precision", "bytes_each"), [("fp32", 4), ("bf16", 2)])
def test_memory_is_that_of_weights_that_stay(precision: str, bytes_each: int) -> None:
    """A recipe fits where its weights, activations and updates do: no gradients or moments of what
    stays.
    """
    config = tuning.config()
    plain = tuning.raw_recipe(base_model="base", precision=precision)
    full, ours = (
        require_fit(config, parse_recipe(raw, origin="r.toml"), memory_bytes=2**40).parts
        for raw in (plain, plain | {"lora": {"rank": 2, "alpha": 4.0}})
    )
    assert ours["weights"] == full["weights"] / 4 * bytes_each
    assert ours["gradients"] == ours["optimizer"] == 0 < full["optimizer"]
    assert ours["cast weights"] == 0


@pytest.mark.parametrize(("optimizer", "moments"), [("adamw", 8), ("muon", 4)])
def test_memory_of_updates_by_hand(optimizer: str, moments: int) -> None:
    """fp32 weights, gradients and moments of every update, and the copy of them that is saved.

    Regression: a rank that no memory holds, which fits by the estimate.
    """
    config = tuning.config()
    modules = ["o_proj", "q_a_proj", "up_proj"]
    raw = tuning.raw_recipe(base_model="base", optimizer={"name": optimizer})
    recipe = parse_recipe(
        raw | {"lora": {"rank": 3, "alpha": 4.0, "target_modules": modules}}, origin="r"
    )
    assert recipe.lora is not None
    model = random_model(config, torch.float32)
    stack_experts(model)
    add_lora(model, recipe.lora, seed=0)
    count = sum(p.numel() for name, p in model.named_parameters() if is_lora_parameter(name))
    assert count_updates(config, recipe.lora) == count > 0
    parts = require_fit(config, recipe, memory_bytes=2**40).parts
    assert parts["updates"] == (8 + moments) * count
    assert parts["checkpoint copy"] == (4 + moments) * count


def test_a_rank_that_cannot_fit_is_reported() -> None:
    raw = tuning.raw_recipe(base_model="base", lora={"rank": 100_000_000, "alpha": 4.0})
    recipe = parse_recipe(raw, origin="r.toml")
    said = r"^r.toml: phase 'p' needs about .* of updates: lower lora.rank \(100000000\) or name"
    with pytest.raises(UserError, match=said):
        require_fit(tuning.config(), recipe, memory_bytes=2**30, origin="r.toml")


def test_modules_that_are_not_there_are_refused_with_the_file() -> None:
    """By the config alone: before data is verified or weights are read."""
    lora = {"rank": 2, "alpha": 4.0, "target_modules": ["o_proj", "w_proj"]}
    recipe = parse_recipe(tuning.raw_recipe(base_model="base", lora=lora), origin="r.toml")
    with pytest.raises(
        UserError, match=r"^r.toml: lora.target_modules: the model has no w_proj; it has"
    ):
        check_lora(tuning.config(), recipe, "r.toml")


def test_default_modules_are_those_the_model_has() -> None:
    """The default names projections of MLA and of GQA, of which a model has its own."""
    model = tiny.model(replace(tiny.config(), num_nextn_predict_layers=0))
    add_lora(model, LoraConfig(rank=2, alpha=4.0), seed=0)
    names = {name.split(".")[-3] for name, _ in model.named_parameters() if is_lora_parameter(name)}
    assert names == {"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"}
