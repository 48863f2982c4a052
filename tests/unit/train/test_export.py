"""Models that runs leave: loaded as any other, with the weights that were trained."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from lowlat.checkpoint.load import load_model
from lowlat.model.transformer import Transformer
from lowlat.text.tokenizer import Tokenizer
from lowlat.train.layers.stacked_experts import unstacked
from lowlat.train.run.export import TOKENIZER, export_save, keep_tokenizer
from lowlat.train.run.state import MODEL, part
from lowlat.utils.errors import UserError
from tests.packed_attention import PackedAttention

from . import runs


@torch.no_grad()
def logits(model: Transformer) -> list[Tensor]:
    """Of every head, over two sequences."""
    ids = torch.arange(97, 118) * 7 % 261
    attention = PackedAttention([9, 12])
    hidden = model(ids, attention.positions(), attention)
    out = [model.logits(hidden)]
    for depth in range(len(model.mtp)):
        ahead = ids.roll(-depth - 1)
        hidden = model.mtp_hidden(depth, hidden, ahead, attention.positions(), attention)
        out.append(model.mtp_logits(depth, hidden))
    return out


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
def test_a_finished_model(base: Path, tied: bool) -> None:
    """The very logits of the trained model in fp32, MTP module and routing biases included."""
    model = runs.MODEL | {"tie_word_embeddings": tied, "num_nextn_predict_layers": 2}
    wanted = runs.recipe(model=model)
    with runs.opened(base / "run", wanted) as trainer:
        outcome = trainer.run()
        trained = trainer.model
    assert outcome.model is not None
    loaded = load_model(outcome.model, dtype="fp32")
    assert loaded.config == trainer.config
    for found, expected in zip(logits(loaded.model), logits(trained), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    parameters = dict(unstacked(dict(trained.named_parameters())))
    names = dict(loaded.model.named_parameters())
    assert names.keys() == parameters.keys()
    assert all(torch.equal(names[name], tensor) for name, tensor in parameters.items())
    biases = [t for name, t in names.items() if name.endswith("e_score_correction_bias")]
    assert len(biases) == 3 and all(bias.abs().max() > 0 for bias in biases)
    tokenizer = Tokenizer.from_folder(outcome.model)
    assert tokenizer.encode("abc") == [97, 98, 99]


LAYERS = {
    "model_type": "lowlat",
    "hidden_size": 14,
    "intermediate_size": 19,
    "num_hidden_layers": 3,
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-6,
    "num_nextn_predict_layers": 1,
    "initializer_range": 0.2,
    "attention": {
        "form": "mla",
        "num_attention_heads": 3,
        "kv_lora_rank": [13, 5, 29],
        "qk_nope_head_dim": [5, 0, 11],
        "qk_rope_head_dim": [4, 10, 2],
        "v_head_dim": 7,
        "kv_a_layernorm": [True, False, True],
    },
    "rope": {
        "rope_type": "longrope",
        "rope_theta": [100.0, 30.0, 7.0],
        "short_factor": [[1.0, 3.0], [1.0, 2.0, 5.0, 6.0, 9.0], [4.0]],
        "long_factor": [[1.0, 3.0], [1.0, 2.0, 5.0, 6.0, 9.0], [4.0]],
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_layers_that_differ(base: Path, precision: str) -> None:
    """Trained from a recipe, saved, resumed, exported: the weights bit by bit, the logits, and a
    loss that falls; their rotary settings are no phase's to change.
    """
    wanted = runs.recipe(model=LAYERS, precision=precision)
    runs.train(base / "run", wanted, 4)
    log = runs.Notes()
    with runs.opened(base / "run", wanted, log) as trainer:
        outcome = trainer.run()
        trained = trainer.model
    assert log.begun_at == 4 and log.steps[-1].loss < log.steps[0].loss
    assert outcome.model is not None
    loaded = load_model(outcome.model, dtype="fp32")
    assert loaded.config == trainer.config
    assert [layer.self_attn.dims.kv_lora_rank for layer in loaded.model.layers] == [13, 5, 29]
    stored = torch.float32 if precision == "fp32" else torch.bfloat16
    parameters = dict(trained.named_parameters())
    names = dict(loaded.model.named_parameters())
    assert names.keys() == parameters.keys()
    for name, tensor in parameters.items():
        assert torch.equal(names[name], tensor.to(stored).float())
    if precision == "fp32":
        for found, expected in zip(logits(loaded.model), logits(trained), strict=True):
            # a model that trains has fused kernels, which round elsewhere
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=5e-6)
    phases = runs.phases({}, {"rope_scaling": {"type": "yarn", "factor": 2.0}})
    with (
        pytest.raises(
            UserError, match="phase long: rope_scaling does not support a model with RoPE per layer"
        ),
        runs.opened(base / "other", runs.recipe(model=LAYERS, phase=phases)),
    ):
        pass


def test_bf16_models_keep_routing_biases(base: Path) -> None:
    outcome, _ = runs.train(base / "run", runs.recipe(precision="bf16"))
    assert outcome.model is not None
    loaded = load_model(outcome.model)
    weights = part(runs.tensors(runs.saved(base / "run")), MODEL)
    name = "layers.1.mlp.gate.e_score_correction_bias"
    found = dict(loaded.model.named_parameters())
    assert torch.equal(found[name], weights[name]) and weights[name].dtype == torch.float32
    assert not torch.equal(weights[name].bfloat16().float(), weights[name])
    head = "embed_tokens.weight"
    assert found[head].dtype == torch.bfloat16
    assert torch.equal(found[head], weights[head].bfloat16())


def test_any_save_of_a_run(base: Path) -> None:
    """Of the step asked for, or the newest; while the run may continue."""
    runs.train(base / "run", runs.recipe(), 4)
    for step, expected in ((2, 2), (None, 4)):
        dst = base / f"model-{step}"
        assert export_save(base / "run", dst, step=step, dtype="fp32") == expected
        weights = part(runs.tensors(runs.saved(base / "run", expected)), MODEL)
        found = dict(load_model(dst, dtype="fp32").model.named_parameters())
        for name, tensor in unstacked(weights):
            assert torch.equal(found[name], tensor)
    with pytest.raises(UserError, match=r"has no checkpoint of step 3; --step may be 2, 4"):
        export_save(base / "run", base / "x", step=3, dtype="fp32")
    with pytest.raises(UserError):
        export_save(base / "run", base / "model-2", step=2, dtype="fp32")
    for dtype in ("int8", "auto", "x"):
        with pytest.raises(UserError, match=f"--dtype '{dtype}' is unknown; .* bf16, fp16, fp32, "):
            export_save(base / "run", base / "x", step=2, dtype=dtype)
    with runs.opened(base / "new", runs.recipe()):
        pass
    with pytest.raises(UserError, match="new: has no checkpoint yet"):
        export_save(base / "new", base / "x", step=None, dtype="bf16")


@pytest.mark.slow
def test_going_on_from_a_model(base: Path) -> None:
    """A finished model as base_model: its first loss is the model's, by the data's tokenizer."""
    outcome, log = runs.train(base / "run", runs.recipe())
    assert outcome.model is not None
    wanted = runs.recipe(model=None, base_model="model")
    with runs.opened(base / "more", wanted, base_model=outcome.model) as trainer:
        trained = part(runs.tensors(runs.saved(base / "run")), MODEL)
        for name, parameter in trainer.model.named_parameters():
            assert torch.equal(parameter, trained[name]), name
            assert parameter.requires_grad == (not name.endswith("e_score_correction_bias"))
        assert trainer.run().is_complete
    assert log.steps[-1].loss < log.steps[0].loss


def test_the_tokenizer_of_a_run_is_kept_once(base: Path) -> None:
    keep_tokenizer(base, base / "tokens")
    files = {path.name for path in (base / TOKENIZER).iterdir()}
    assert "tokenizer.json" in files
    keep_tokenizer(base, base / "nowhere")
    assert {path.name for path in (base / TOKENIZER).iterdir()} == files


@pytest.mark.slow
def test_a_start_of_another_tokenizer_is_refused(base: Path) -> None:
    """Regression: a model trained further on ids that mean other tokens to it."""
    outcome, _ = runs.train(base / "run", runs.recipe())
    runs.make_tokens(base / "more", special=("<|more|>",))
    wanted = runs.recipe(model=runs.MODEL | {"vocab_size": 270}, data={"folder": "more"})
    bigger, _ = runs.train(base / "bigger", wanted)
    assert outcome.model is not None and bigger.model is not None
    # Nothing is wrong with a token that one of them does not know.
    with runs.opened(base / "a", runs.recipe(model=None, base_model="x"), base_model=bigger.model):
        pass
    file = bigger.model / "tokenizer.json"
    file.write_text(file.read_text().replace("<|im_start|>", "<|im_begin|>"))
    with (
        pytest.raises(UserError, match="tokens was built with another tokenizer than that of"),
        runs.opened(base / "b", runs.recipe(model=None, base_model="x"), base_model=bigger.model),
    ):
        pass
