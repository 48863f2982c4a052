"""A run of several phases: YaRN for longer contexts, other data, what the exported config says."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from lowlat.attention.flash import FlashAttention
from lowlat.checkpoint.load import load_model
from lowlat.model.transformer import Transformer
from lowlat.train.inputs.configs import base_config, phase_configs
from lowlat.train.recipe.schema import Recipe, parse_recipe
from lowlat.utils.errors import UserError

from . import runs, tuning

MODEL = runs.MODEL | {
    "hidden_size": 24,
    "intermediate_size": 40,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 6,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "moe_intermediate_size": 16,
    "n_group": 1,
    "num_nextn_predict_layers": 0,
    "tie_word_embeddings": False,
}
YARN = {"type": "yarn", "factor": 2.0, "beta_fast": 32.0, "beta_slow": 1.0}
YARN |= {"mscale": 1.0, "mscale_all_dim": 1.0}
SHORT = {"name": "short", "steps": 2}
LONG = {
    "name": "long",
    "steps": 2,
    "sequence_length": 64,
    "batch_size": 2,
    "rope_scaling": YARN,
    "max_position_embeddings": 64,
}


def recipe(*phases: dict[str, Any], **changes: Any) -> dict[str, Any]:
    fields = {"model": MODEL, "phase": tuning.phases(*phases)}
    return tuning.raw_recipe(**(fields | changes))


def parsed(*phases: dict[str, Any]) -> Recipe:
    return parse_recipe(recipe(*phases), origin="r.toml")


def hidden(model: Transformer, tokens: torch.Tensor) -> torch.Tensor:
    attention = FlashAttention([len(tokens)])
    positions = attention.positions(torch.device("cpu"))
    return model.logits(model(tokens, positions, attention))


def test_extension_is_exported(tmp_path: Path) -> None:
    """The config of the result says YaRN, the longer context and the one before; the model of
    transformers that reads it computes what was trained, beyond the old context too.
    """
    tuning.chats(tmp_path / "tokens")
    run = tuning.train(tmp_path, recipe(SHORT, LONG))
    folder = run.outcome.model
    assert folder is not None
    raw = json.loads((folder / "config.json").read_text())
    assert raw["max_position_embeddings"] == 64
    scaling = raw["rope_scaling"]
    assert scaling["type"] == scaling["rope_type"] == "yarn"
    assert scaling["factor"] == 2.0 and scaling["original_max_position_embeddings"] == 32
    tokens = torch.randint(256, (61,))
    with torch.no_grad():
        ours = hidden(load_model(folder, dtype="fp32").model, tokens)
        trained = hidden(run.trainer.model, tokens)
        reference = AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager")
        theirs = reference.eval()(tokens[None]).logits[0]
    torch.testing.assert_close(ours, trained, rtol=0, atol=1e-5)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert [record["phase"] for record in run.records("step")] == ["short"] * 2 + ["long"] * 2
    lengths = [record["batch_tokens"] for record in run.records("step")]
    assert lengths == [4 * 31] * 2 + [2 * 64] * 2


def test_softmax_scale_changes_with_the_phase(tmp_path: Path) -> None:
    """(0.1 ln 2 + 1)^2 over 1 / sqrt(d), in every layer and MTP module, from the phase on that says
    so, and after a resume within it.
    """
    tuning.chats(tmp_path / "tokens")
    model = MODEL | {"num_nextn_predict_layers": 1}
    raw = recipe(SHORT, LONG, model=model, checkpoints={"every_steps": 1})
    tuning.stop_after(2, tmp_path, raw, name="run")
    before = load_model(exported(tmp_path, 2), dtype="fp32").model
    tuning.stop_after(3, tmp_path, raw, name="run")
    resumed = tuning.train(tmp_path, raw).trainer.model
    plain = 1 / math.sqrt(8 + 6)
    for model_of_phase, factor in ((before, 1.0), (resumed, (0.1 * math.log(2) + 1) ** 2)):
        blocks = [*model_of_phase.layers, *(module.block for module in model_of_phase.mtp)]
        scales = [block.self_attn.scale for block in blocks]
        assert scales == pytest.approx([plain * factor] * 3, rel=1e-12)


def exported(folder: Path, step: int) -> Path:
    from lowlat.train.run.export import export_save

    export_save(folder / "run", folder / f"at-{step}", step=step, dtype="fp32")
    return folder / f"at-{step}"


def test_what_a_phase_changes_stays() -> None:
    """4K to 32K to 128K, as DeepSeek-V3 was extended: the context before extension is the first
    one in both, and a phase that says nothing keeps what is there.
    """
    steps = [
        {"name": "a"},
        {"name": "b", "rope_scaling": YARN | {"factor": 4.0}, "max_position_embeddings": 128},
        {"name": "c", "rope_scaling": YARN | {"factor": 8.0}, "max_position_embeddings": 256},
        {"name": "d"},
    ]
    wanted = parsed(*steps)
    configs = phase_configs(base_config(wanted, None, 260, "r.toml"), wanted, "r.toml")
    assert [config.max_position_embeddings for config in configs] == [32, 128, 256, 256]
    assert [config.rope.factor for config in configs] == [1.0, 4.0, 8.0, 8.0]
    originals = [config.rope.original_max_position_embeddings for config in configs]
    assert originals == [None, 32, 32, 32]
    assert all(config.rope.rope_interleave for config in configs)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"sequence_length": 65}, "phase long: sequence_length 65 exceeds max_position"),
        (
            {"rope_scaling": {"type": "yarm"}},
            "phase long: rope_scaling.*yarm.*supported: default, linear",
        ),
        ({"rope_scaling": {"type": "yarn", "facter": 2.0}}, "phase long: rope_scaling.*facter"),
        (
            {"rope_scaling": {"type": "yarn", "factor": "2"}},
            "phase long: rope_scaling.*factor.*number",
        ),
    ],
)
def test_refusals(change: dict[str, Any], words: str) -> None:
    wanted = parsed(SHORT, LONG | change)
    config = base_config(wanted, None, 260, "r.toml")
    with pytest.raises(UserError, match=words) as caught:
        phase_configs(config, wanted, "r.toml")
    assert "\n" not in str(caught.value)
