"""Filling a model: data types, what is missing or left over, finite values, memory."""

import json
import logging
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lowlat.checkpoint.load import load_model
from lowlat.ops.fp8 import dequantize_blocks
from lowlat.utils.errors import UserError
from lowlat.utils.memory import RESERVE
from tests import forked
from tests.packed_attention import PackedAttention

from .builders import FAMILIES, FP8, assert_same_bits, edit_config, rewrite, write_model

Tensors = dict[str, torch.Tensor]
GATE_BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"


@pytest.mark.parametrize("dtype", ["fp64", "fp32", "bf16", "fp16"])
def test_cast(tmp_path: Path, dtype: str) -> None:
    """Everything is cast but the router bias, which stays fp32 with every bit."""
    model = write_model(tmp_path / "m", FAMILIES["deepseek_v3-mtp"])
    loaded = load_model(tmp_path / "m", dtype=dtype).model.state_dict()
    kind = {"fp64": torch.float64, "fp32": torch.float32, "fp16": torch.float16}
    for name, value in model.state_dict().items():
        router = name.endswith("e_score_correction_bias")
        expected = torch.float32 if router else kind.get(dtype, torch.bfloat16)
        assert loaded[name].dtype == expected, name
        assert torch.equal(loaded[name], value.to(expected)), name


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_fp8_is_dequantized(tmp_path: Path, dtype: str) -> None:
    """Any dtype but auto turns fp8 blocks into plain weights, and the config has no
    quantization."""
    model = write_model(tmp_path / "m", FAMILIES["deepseek_v3-fp8"])
    loaded = load_model(tmp_path / "m", dtype=dtype)
    assert loaded.config.quantization is None
    ours, theirs = model.state_dict(), loaded.model.state_dict()
    wanted = torch.float32 if dtype == "fp32" else torch.bfloat16
    seen = 0
    for name, value in theirs.items():
        scale = ours.get(f"{name}_scale_inv")
        if scale is not None:
            seen += 1
            block = FP8.weight_block_size
            exact = dequantize_blocks(ours[name], scale, block, wanted)
            assert torch.equal(value, exact), name
    assert seen > 10 and not any(name.endswith("_scale_inv") for name in theirs)


@pytest.mark.parametrize(
    ("family", "dtype", "fits"),
    [
        ("deepseek_v3-fp8", "auto", True),
        ("deepseek_v3-fp8", "bf16", False),
        ("deepseek_v3-fp8", "int4", False),
        ("qwen2-converted", "auto", True),
        ("qwen2-converted", "fp64", False),
        ("qwen2-converted", "int8", False),
    ],
)
def test_created_weights_beyond_memory_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, dtype: str, fits: bool
) -> None:
    """Mapped weights may exceed the memory; weights that a cast creates may not."""
    write_model(tmp_path / "m", FAMILIES[family])
    monkeypatch.setattr("lowlat.utils.memory.memory_limit", lambda: RESERVE + 1000)
    with nullcontext() if fits else pytest.raises(UserError, match=rf"--dtype {dtype} makes.*auto"):
        load_model(tmp_path / "m", dtype=dtype)


def test_loaded_model_computes_the_same(tmp_path: Path) -> None:
    model = write_model(tmp_path / "m", FAMILIES["qwen2-converted"])
    loaded = load_model(tmp_path / "m").model
    ids, backend = torch.arange(11), PackedAttention([11])
    with torch.no_grad():
        expected = model.logits(model(ids, backend.positions(), backend))
        found = loaded.logits(loaded(ids, backend.positions(), backend))
    assert torch.equal(found, expected)


def test_missing_mtp_tensors(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Programs without MTP drop its tensors but not its config: loaded without, with one
    warning."""
    write_model(tmp_path / "m", FAMILIES["deepseek_v3-mtp"])
    rewrite(tmp_path / "m", lambda tensors: drop(tensors, "model.layers.2.", "model.layers.3."))
    with caplog.at_level(logging.WARNING):
        loaded = load_model(tmp_path / "m")
    assert loaded.config.num_nextn_predict_layers == 0 and len(loaded.model.mtp) == 0
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path / 'm'}: no tensors of the 2 MTP modules; loaded without"
    ]


def test_old_rotary_buffers_are_ignored(tmp_path: Path) -> None:
    """Old llama files store the frequencies, which config determines."""
    model = write_model(tmp_path / "m", FAMILIES["llama"])
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    rewrite(tmp_path / "m", lambda tensors: tensors.update({name: torch.ones(5)}))
    assert_same_bits(load_model(tmp_path / "m").model, model)


def test_tied_head_in_the_file(tmp_path: Path) -> None:
    """A tied model may store its head if it is the embedding, NaNs included."""
    model = write_model(tmp_path / "m", FAMILIES["llama-tied"])

    def add(tensors: Tensors) -> None:
        tensors["model.embed_tokens.weight"][3, 5] = torch.nan
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    rewrite(tmp_path / "m", add)
    assert load_model(tmp_path / "m").model.lm_head is None
    assert model.lm_head is None
    rewrite(tmp_path / "m", lambda tensors: tensors["lm_head.weight"][0].add_(1))
    with pytest.raises(UserError, match=r"'lm_head\.weight' differs from the embedding"):
        load_model(tmp_path / "m")


def drop(tensors: Tensors, *prefixes: str) -> None:
    for name in [name for name in tensors if name.startswith(prefixes)]:
        del tensors[name]


def put(name: str, value: Any) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({name: value})


def at(name: str, index: Any, value: float) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[name][index] = value

    return change


def cast(name: str, dtype: torch.dtype) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({name: tensors[name].to(dtype)})


NORM = "model.norm.weight"
UP = "model.layers.1.self_attn.q_a_proj.weight"
LATENT = "model.layers.1.self_attn.kv_a_proj_with_mqa"

BROKEN: dict[str, tuple[str, Callable[[Tensors], object], str]] = {
    "tensor missing": ("llama", lambda t: drop(t, NORM), f"'{NORM}' is missing"),
    "expert missing": (
        "deepseek_v3",
        lambda t: drop(t, "model.layers.1.mlp.experts.7.up_proj"),
        "'model.layers.1.mlp.experts.7.up_proj.weight' is missing",
    ),
    "layer missing": ("llama", lambda t: drop(t, "model.layers.1."), "(and 8 more) is missing"),
    "head missing": ("llama", lambda t: drop(t, "lm_head"), "'lm_head.weight' is missing"),
    "MTP half there": (
        "deepseek_v3-mtp",
        lambda t: drop(t, "model.layers.3."),
        "'model.layers.3.enorm.weight' (and",
    ),
    "MTP head without embedding": (
        "deepseek_v3-mtp-copies",
        lambda t: drop(t, "model.layers.2.embed_tokens"),
        "'model.layers.2.embed_tokens.weight' is missing; MTP modules must have both",
    ),
    "tensor left over": ("llama", put("model.extra", torch.ones(3)), "'model.extra' has no place"),
    "bias left over": (
        "llama",
        put("model.layers.0.self_attn.q_proj.bias", torch.ones(60)),
        "q_proj.bias' has no place",
    ),
    "layer left over": (
        "llama",
        put("model.layers.2.input_layernorm.weight", torch.ones(23)),
        "the config has num_hidden_layers 2",
    ),
    "scale left over": (
        "llama",
        put("model.layers.0.mlp.up_proj.weight_scale_inv", torch.ones(1, 1)),
        "has no quantization_config that puts fp8 blocks there; take config.json and weights from",
    ),
    "head left over": ("llama-tied", put("lm_head.weight", torch.ones(41, 23)), "differs from"),
    "wrong shape": (
        "llama",
        put(NORM, torch.ones(24)),
        f"'{NORM}' has shape [24], but the config asks for [23]",
    ),
    "transposed": (
        "llama",
        put("model.layers.0.mlp.up_proj.weight", torch.ones(23, 19)),
        "has shape [23, 19], but the config asks for [19, 23]",
    ),
    "expert of wrong shape": (
        "deepseek_v3",
        put("model.layers.1.mlp.experts.4.down_proj.weight", torch.ones(23, 6)),
        "experts.4.down_proj.weight' has shape [23, 6], but the config asks for [23, 5]",
    ),
    "integers": ("llama", cast(NORM, torch.int32), f"'{NORM}' is int32, which no weight can be"),
    "booleans": ("llama", cast(NORM, torch.bool), "is bool, which no weight can be"),
    "fp8 of the other kind": ("llama", cast(NORM, torch.float8_e5m2), "is float8_e5m2, which"),
    "fp8 without scales": (
        "llama",
        cast("model.layers.0.mlp.up_proj.weight", torch.float8_e4m3fn),
        "up_proj.weight' is fp8 (F8_E4M3), but config.json has no quantization_config",
    ),
    "bf16 where the config says fp8": (
        "deepseek_v3-fp8",
        cast(UP, torch.bfloat16),
        f"'{UP}' is bfloat16, not fp8 (F8_E4M3), as quantization_config requires",
    ),
    "fp8 scale missing": (
        "deepseek_v3-fp8",
        lambda t: drop(t, UP + "_scale_inv"),
        f"'{UP}_scale_inv' is missing",
    ),
    "fp8 scale of wrong grid": (
        "deepseek_v3-fp8",
        put(UP + "_scale_inv", torch.ones(1, 4)),
        f"'{UP}_scale_inv' has shape [1, 4], but",
    ),
    "fp8 scale NaN": (
        "deepseek_v3-fp8",
        at(UP + "_scale_inv", (0, 1), torch.nan),
        f"'{UP}_scale_inv' holds values that are not finite",
    ),
    "router bias NaN": ("deepseek_v3", at(GATE_BIAS, 3, torch.nan), f"'{GATE_BIAS}' holds values"),
    "router bias infinite": ("deepseek_v3", at(GATE_BIAS, 0, -torch.inf), "are not finite"),
    "router bias of integers": ("deepseek_v3", cast(GATE_BIAS, torch.int64), "no weight can be"),
    "padding not zero": (
        "llama-converted",
        at(LATENT + ".weight", (25, 0), 1.0),
        f"'{LATENT}.weight': its padding must be zero in an exactly converted model",
    ),
    "constant changed": (
        "llama-converted",
        at(LATENT + ".bias", 63, 32000.0),
        f"'{LATENT}.bias': its padding must be",
    ),
    "bias where the model has none": ("llama-converted", at(LATENT + ".bias", 2, 1.0), "zero"),
    "output bias where the model has none": (
        "llama-converted",
        at("model.layers.0.self_attn.o_proj.bias", 2, 1.0),
        "'model.layers.0.self_attn.o_proj.bias': its padding must be zero",
    ),
    "norm changed": (
        "llama-converted",
        at("model.layers.0.self_attn.kv_a_layernorm.weight", 2, 1.0),
        "'model.layers.0.self_attn.kv_a_layernorm.weight': it must be 4096 everywhere",
    ),
    "query identity changed": (
        "qwen2-converted",
        at("model.layers.0.self_attn.q_a_proj.weight", (2, 3), 1.0),
        "'model.layers.0.self_attn.q_a_proj.weight': it must pass the hidden state on",
    ),
    "query padding changed": (
        "qwen2-converted",
        at("model.layers.0.self_attn.q_b_proj.weight", (2, 40), 1.0),
        "'model.layers.0.self_attn.q_b_proj.weight': its padding must be zero",
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken(tmp_path: Path, kind: str) -> None:
    """One line that names file and tensor, both shapes where it is the shape."""
    family, change, message = BROKEN[kind]
    write_model(tmp_path / "m", FAMILIES[family])
    rewrite(tmp_path / "m", change)
    with pytest.raises(UserError) as caught:
        load_model(tmp_path / "m")
    text = str(caught.value)
    assert text.startswith(str(tmp_path / "m")) and message in text, text
    assert "\n" not in text


def test_beyond_fp16(tmp_path: Path) -> None:
    """70000 is a bf16 number that fp16 turns into infinity."""
    write_model(tmp_path / "m", FAMILIES["llama"])
    rewrite(tmp_path / "m", at(NORM, 2, 70000.0))
    with pytest.raises(UserError, match="beyond the range of fp16"):
        load_model(tmp_path / "m", dtype="fp16")
    load_model(tmp_path / "m", dtype="fp32")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_hidden_layers", 90_000),
        ("n_routed_experts", 2**30),
        ("num_nextn_predict_layers", 90_000),
        ("intermediate_size", 2**31 - 1),
        ("moe_intermediate_size", 2**31 - 1),
        ("vocab_size", 2**31 - 1),
        ("hidden_size", 2**31 - 1),
        ("v_head_dim", 2**31 - 1),
        ("num_attention_heads", 2**31 - 1),
    ],
)
def test_config_of_absurd_size(tmp_path: Path, field: str, value: int) -> None:
    """Refused before anything is built or allocated."""
    write_model(tmp_path / "m", FAMILIES["deepseek_v3-mtp"])
    extra = {"num_key_value_heads": value} if field == "num_attention_heads" else {}
    edit_config(tmp_path / "m", **{field: value}, **extra)
    with pytest.raises(UserError, match=r"/m[:/]"):
        load_model(tmp_path / "m")


@pytest.mark.parametrize(("option", "value"), [("dtype", "fp12"), ("device", "tpu")])
def test_unknown_option(tmp_path: Path, option: str, value: Any) -> None:
    with pytest.raises(UserError, match=f"{option} '{value}' is unknown"):
        load_model(tmp_path, **{option: value})


PEAK = """
import json, sys, threading
from pathlib import Path
from lowlat.checkpoint.load import load_model

def resident():
    for line in open("/proc/self/status"):
        if line.startswith("VmRSS"):
            return int(line.split()[1]) / 1024

def added(dtype):
    stop, peak, before = threading.Event(), [0.0], resident()
    def watch():
        while not stop.wait(0.001):
            peak[0] = max(peak[0], resident())
    watcher = threading.Thread(target=watch)
    watcher.start()
    model = load_model(Path(sys.argv[1]), dtype=dtype)
    stop.set()
    watcher.join()
    return max(peak[0], resident()) - before

print(json.dumps([added("auto"), added("fp32")]))
"""


def child(source: str, *arguments: str) -> str:
    done = forked.run(
        [sys.executable, "-c", source, *arguments], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_peak_memory(tmp_path: Path) -> None:
    """The model + its largest tensor + 300 MB, although the mapped file counts as memory too.

    Without release the pages of the file would double it; the constant is far below 300 here.
    """
    config = FAMILIES["deepseek_v3"]
    assert config.moe is not None
    moe = replace(config.moe, n_routed_experts=64, moe_intermediate_size=256)
    config = replace(config, hidden_size=768, num_hidden_layers=2, vocab_size=16_000, moe=moe)
    model = write_model(tmp_path / "m", config)
    size = sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20
    assert size > 110
    del model
    stored, cast = json.loads(child(PEAK, str(tmp_path / "m")))
    # as stored everything stays in the file
    assert stored < 40
    largest = 16_000 * 768 * 2 / 2**20
    assert cast < 2 * size + largest + 40
