"""GGUF files as checkpoints: the same config and weights as the Hugging Face form of the model."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType as Kind

from lowlat.checkpoint.gguf.metadata_keys import NEUTRAL
from lowlat.checkpoint.hf_folder import open_checkpoint
from lowlat.checkpoint.load import load_model, read_config
from lowlat.checkpoint.save import save_model
from lowlat.config.model import GQAConfig, ModelConfig, RopeConfig
from lowlat.ops.rope import inverse_frequencies
from lowlat.utils.errors import UserError
from tests.configs import YARN

from .builders import FAMILIES, assert_same_bits, bits, gqa, mla, random_model
from .gguf_files import dequantised, file_tensors, write_gguf

GROUPED = replace(FAMILIES["deepseek_v3"].moe, n_group=4, topk_group=2)  # pyright: ignore
V2_GROUPED = replace(
    FAMILIES["deepseek_v2"].moe,  # pyright: ignore
    topk_method="group_limited_greedy",
    n_group=3,
    topk_group=2,
)

MODELS: dict[str, ModelConfig] = {
    "llama": gqa("llama"),
    "llama-tied": gqa("llama", tie_word_embeddings=True),
    "qwen2": gqa("qwen2"),
    "qwen2-tied": gqa("qwen2", tie_word_embeddings=True),
    "deepseek_v2": mla("deepseek_v2"),
    "deepseek_v2-grouped": mla("deepseek_v2", moe=V2_GROUPED),
    "deepseek_v3": mla("deepseek_v3", moe=GROUPED),
    "deepseek_v3-mtp": mla("deepseek_v3", num_nextn_predict_layers=1),
    "deepseek_v3-mtp-copies": mla("deepseek_v3", num_nextn_predict_layers=1, mtp_copies=True),
}


def pair(
    tmp_path: Path, config: ModelConfig, **options: Any
) -> tuple[dict[str, torch.Tensor], Path]:
    model = random_model(config, dtype=torch.float32)
    return model.state_dict(), write_gguf(
        tmp_path / "m.gguf", config, model.state_dict(), **options
    )


@pytest.mark.parametrize("family", MODELS)
def test_config_and_weights(tmp_path: Path, family: str) -> None:
    """Config, names, layout and every bit, through the loader; q and k rows of llama are only
    permuted."""
    parameters, path = pair(tmp_path, MODELS[family])
    loaded = load_model(path)
    assert loaded.config == MODELS[family]
    found = loaded.model.state_dict()
    assert list(found) == list(parameters)
    for name, value in parameters.items():
        assert torch.equal(bits(found[name]), bits(value)), name


@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3-mtp"])
def test_absorbed_layout(tmp_path: Path, family: str) -> None:
    """kv_b_proj comes back from attn_k_b (transposed) and attn_v_b, head by head."""
    parameters, path = pair(tmp_path, MODELS[family], split_kv_b=True)
    loaded = load_model(path)
    assert loaded.config == MODELS[family]
    for name, value in loaded.model.state_dict().items():
        assert torch.equal(value, parameters[name]), name


def test_source_names_are_hugging_face(tmp_path: Path) -> None:
    """What convert reads: names, shapes and dtypes agree with what is read."""
    config = MODELS["deepseek_v3-mtp-copies"]
    parameters, path = pair(tmp_path, config)
    source = open_checkpoint(path)
    expected = file_tensors(config, parameters)
    assert set(source.names()) == set(expected)
    for name, value in expected.items():
        assert source.shape(name) == tuple(value.shape)
        assert source.read(name).dtype == source.dtype(name) == torch.float32
        assert torch.equal(source.read(name), value), name
        source.release(name)


@pytest.mark.parametrize("kind", [Kind.F16, Kind.BF16, Kind.F32])
def test_plain_kinds_keep_their_dtype(tmp_path: Path, kind: Kind) -> None:
    """Half-width matrices stay as stored; norms, which the format keeps in fp32, stay fp32."""
    parameters, path = pair(tmp_path, MODELS["llama"], kind=kind)
    loaded = load_model(path).model.state_dict()
    dtype = {Kind.F16: torch.float16, Kind.BF16: torch.bfloat16}.get(kind, torch.float32)
    for name, value in parameters.items():
        expected = value if value.dim() == 1 else value.to(dtype)
        assert torch.equal(bits(loaded[name]), bits(expected)), name


@pytest.mark.parametrize("kind", [Kind.Q8_0, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1])
def test_block_kinds(tmp_path: Path, kind: Kind) -> None:
    """Blocks of 32 come out as the gguf package multiplies them out, experts sliced first."""
    attention = replace(FAMILIES["deepseek_v3"].attention, q_lora_rank=32, kv_lora_rank=32)
    attention = replace(attention, num_attention_heads=8, v_head_dim=4)
    moe = replace(GROUPED, moe_intermediate_size=32)
    config = mla("deepseek_v3", attention=attention, moe=moe)
    config = replace(config, hidden_size=64, intermediate_size=32)
    parameters, path = pair(tmp_path, config, kind=kind)
    loaded = load_model(path).model.state_dict()
    for name, value in parameters.items():
        expected = value if value.dim() == 1 else dequantised(value, kind)
        assert torch.equal(loaded[name], expected), name


def test_llama_with_biases(tmp_path: Path) -> None:
    """Biases of q and k are permuted like their rows."""
    attention = replace(MODELS["llama"].attention, qkv_bias=True, o_bias=True)
    assert isinstance(attention, GQAConfig)
    parameters, path = pair(tmp_path, replace(MODELS["llama"], attention=attention))
    loaded = load_model(path)
    assert loaded.config.attention == attention
    for name, value in parameters.items():
        assert torch.equal(loaded.model.state_dict()[name], value), name


def test_yarn(tmp_path: Path) -> None:
    """The log multiplier, fp32 in the file, is a tenth of mscale_all_dim: 0.0707 means 0.707."""
    keys = {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": 40.0,
        "rope.scaling.original_context_length": 128,
        "rope.scaling.yarn_log_multiplier": 0.0707,
    }
    keys = {f"deepseek2.{key}": value for key, value in keys.items()}
    _, path = pair(tmp_path, MODELS["deepseek_v2"], keys=keys)
    expected = replace(YARN, factor=40.0, mscale=0.707, mscale_all_dim=0.707)
    assert load_model(path).config.rope == expected


def test_yarn_ramp_of_kimi(tmp_path: Path) -> None:
    keys = {
        "deepseek2.rope.scaling.type": "yarn",
        "deepseek2.rope.scaling.factor": 32.0,
        "deepseek2.rope.scaling.original_context_length": 4096,
        "deepseek2.rope.scaling.yarn_beta_fast": 1.0,
        "deepseek2.rope.scaling.yarn_beta_slow": 1.0,
    }
    _, path = pair(tmp_path, MODELS["deepseek_v3"], keys=keys)
    rope = load_model(path).config.rope
    assert (rope.beta_fast, rope.beta_slow) == (1.0, 1.0)


def test_linear_scaling(tmp_path: Path) -> None:
    keys = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    _, path = pair(tmp_path, MODELS["llama"], keys=keys)
    rope = load_model(path).config.rope
    assert (rope.rope_type, rope.factor) == ("linear", 4.0)


def test_llama3_divisors(tmp_path: Path) -> None:
    """Llama 3.1's scaling is a tensor in the file: one divisor per frequency."""
    divisors = torch.tensor([1.0, 1.0, 1.75, 8.0, 8.0])
    _, path = pair(tmp_path, MODELS["llama"], extra={"rope_freqs.weight": divisors})
    rope = load_model(path).config.rope
    plain = inverse_frequencies(RopeConfig(rope_theta=10000.0), 10)
    torch.testing.assert_close(inverse_frequencies(rope, 10), plain / divisors)


def test_sliding_window_means_mistral(tmp_path: Path) -> None:
    _, path = pair(tmp_path, MODELS["llama"], keys={"llama.attention.sliding_window": 7})
    config = load_model(path).config
    assert (config.model_type, config.sliding_window) == ("mistral", 7)


def test_end_of_turn_ends_too(tmp_path: Path) -> None:
    _, path = pair(tmp_path, MODELS["llama"], keys={"tokenizer.ggml.eot_token_id": 5})
    assert load_model(path).config.eos_token_ids == (2, 5)


def test_ungrouped_files_of_old_converters(tmp_path: Path) -> None:
    """Without group keys nothing is grouped; without a gate key the gate is softmax (V2)."""
    missing = ("expert_group_count", "expert_group_used_count", "expert_gating_func")
    keys = {f"deepseek2.{key}": None for key in missing}
    _, path = pair(tmp_path, MODELS["deepseek_v2"], keys=keys)
    assert load_model(path).config == MODELS["deepseek_v2"]


@pytest.mark.parametrize("split_kv_b", [False, True])
def test_mtp_declared_but_left_out(tmp_path: Path, split_kv_b: bool) -> None:
    """Quantizers strip the last blocks and leave block_count and nextn_predict_layers."""
    config = MODELS["deepseek_v3"]
    layers = config.num_hidden_layers
    keys = {"deepseek2.block_count": layers + 1, "deepseek2.nextn_predict_layers": 1}
    parameters, path = pair(tmp_path, config, keys=keys, split_kv_b=split_kv_b)
    loaded = load_model(path)
    assert loaded.config == config
    for name, value in loaded.model.state_dict().items():
        assert torch.equal(value, parameters[name]), name


@pytest.mark.parametrize("family", ["llama", "qwen2", "deepseek_v3"])
def test_keys_without_effect(tmp_path: Path, family: str) -> None:
    """Converters write them for every architecture: ignored keys, and neutral values of others."""
    arch = "deepseek2" if family == "deepseek_v3" else family
    keys: dict[str, Any] = {f"{arch}.{key}": float(values[0]) for key, values in NEUTRAL.items()}
    keys |= {f"{arch}.pooling_type": 3, f"{arch}.swiglu_clamp_exp": [0.0, 0.0]}
    _, path = pair(tmp_path, MODELS[family], keys=keys)
    assert load_model(path).config == MODELS[family]


@pytest.mark.parametrize("key", NEUTRAL)
def test_keys_with_effect(tmp_path: Path, key: str) -> None:
    _, path = pair(tmp_path, MODELS["llama"], keys={f"llama.{key}": 0.75})
    with pytest.raises(UserError, match=f"'llama.{key}' is unknown and may change"):
        load_model(path)


def test_save_as_a_folder(tmp_path: Path) -> None:
    """GGUF -> Hugging Face folder -> the same model."""
    _, path = pair(tmp_path, MODELS["qwen2-tied"])
    loaded = load_model(path)
    save_model(loaded.model, loaded.config, tmp_path / "folder", source=None)
    again = load_model(tmp_path / "folder")
    assert again.config == loaded.config
    assert_same_bits(again.model, loaded.model)


WRONG: dict[str, tuple[str, dict[str, Any], str]] = {
    "missing key": ("llama", {"llama.block_count": None}, "'llama.block_count' is missing"),
    "missing eps": ("qwen2", {"qwen2.attention.layer_norm_rms_epsilon": None}, "is missing"),
    "missing rank": ("deepseek_v2", {"deepseek2.attention.kv_lora_rank": None}, "kv_lora_rank"),
    "missing experts": (
        "deepseek_v2",
        {"deepseek2.expert_count": None},
        "'deepseek2.expert_count'",
    ),
    "unknown architecture": ("llama", {"general.architecture": "gpt2"}, "'gpt2' is not supported"),
    "unknown key": ("llama", {"llama.attn_logit_softcapping": 30.0}, "is unknown and may change"),
    "text for a number": ("llama", {"llama.block_count": "two"}, "not one whole number"),
    "fraction for a number": ("llama", {"llama.block_count": 2.5}, "not one whole number"),
    "truth for a number": ("llama", {"llama.block_count": True}, "not one whole number"),
    "list for a number": ("llama", {"llama.attention.head_count": [6, 6]}, "not one whole number"),
    "list of texts for a number": ("llama", {"llama.block_count": ["a"]}, "not one whole number"),
    "number beyond bounds": ("llama", {"llama.block_count": 2**32 - 1}, "not one whole number"),
    "text for eps": ("llama", {"llama.attention.layer_norm_rms_epsilon": "1e-5"}, "not a number"),
    "number for truth": ("deepseek_v3", {"deepseek2.expert_weights_norm": 1}, "not true or false"),
    "number for a text": ("llama", {"llama.rope.scaling.type": 3}, "not a text"),
    "no heads": ("llama", {"llama.attention.head_count": 0}, "m.gguf"),
    "heads that do not fit": ("llama", {"llama.attention.head_count": 7}, "attn_q.weight'"),
    "partial rotation": ("llama", {"llama.rope.dimension_count": 4}, "rope.dimension_count"),
    "values of another width": ("llama", {"llama.attention.value_length": 4}, "value_length"),
    "mixtral": ("llama", {"llama.expert_count": 8}, "experts of architecture llama"),
    "window in qwen2": ("qwen2", {"qwen2.attention.sliding_window": 9}, "sliding_window"),
    "gate of another kind": ("deepseek_v3", {"deepseek2.expert_gating_func": 3}, "3 is not"),
    "gate that contradicts": ("deepseek_v3", {"deepseek2.expert_gating_func": 1}, "m.gguf"),
    "rope type unknown": (
        "llama",
        {"llama.rope.scaling.type": "su", "llama.rope.scaling.factor": 2.0},
        "'su' is not supported",
    ),
    "rope factor missing": ("llama", {"llama.rope.scaling.type": "linear"}, "scaling.factor"),
    "more layers than there are": ("llama", {"llama.block_count": 3}, "'model.layers.2."),
    "fewer layers than there are": ("llama", {"llama.block_count": 1}, "'blk.1."),
    "absurd layers": ("llama", {"llama.block_count": 90_000}, "num_hidden_layers 90000"),
    "head width below rope": ("deepseek_v3", {"deepseek2.attention.key_length": 5}, "rope width"),
    "latent lengths that do not fit": (
        "deepseek_v3",
        {"deepseek2.attention.key_length_mla": 11, "deepseek2.attention.value_length_mla": 7},
        "kv_lora_rank + rope width",
    ),
    "token id that is a text": ("llama", {"tokenizer.ggml.eos_token_id": "</s>"}, "eos_token_id"),
    "context of zero": ("llama", {"llama.context_length": 0}, "max_position_embeddings"),
    "width that does not fit": ("llama", {"llama.embedding_length": 24}, "has shape"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_metadata(tmp_path: Path, kind: str) -> None:
    family, keys, message = WRONG[kind]
    if "general.architecture" in keys:
        _, path = pair(tmp_path, MODELS[family])
        path.write_bytes(path.read_bytes().replace(b"llama", b"gpt2\0", 1))
        path.write_bytes(
            path.read_bytes().replace(
                (5).to_bytes(8, "little") + b"gpt2\0", b"\4" + bytes(7) + b"gpt2"
            )
        )
    else:
        _, path = pair(tmp_path, MODELS[family], keys=keys)
    with pytest.raises(UserError) as caught:
        load_model(path)
    text = str(caught.value)
    assert text.startswith(str(path)) and message in text, text
    assert "\n" not in text


LEFT: dict[str, tuple[str, dict[str, tuple[int, ...]], str]] = {
    "unknown tensor": ("llama", {"blk.0.attn_sinks.weight": (3,)}, "'blk.0.attn_sinks.weight'"),
    "unknown global": ("llama", {"cls.weight": (3, 5)}, "'cls.weight' has no place"),
    "layer beyond": ("llama", {"blk.7.attn_norm.weight": (23,)}, "'blk.7.attn_norm.weight'"),
    "half of kv_b": ("deepseek_v3", {"blk.0.attn_k_b.weight": (3, 13, 5)}, "its other half only"),
    "experts in llama": ("llama", {"blk.0.ffn_up_exps.weight": (2, 5, 23)}, "has no place"),
    "bias of a norm": ("llama", {"output_norm.bias": (23,)}, "'output_norm.bias' has no place"),
}


@pytest.mark.parametrize("kind", LEFT)
def test_left_over(tmp_path: Path, kind: str) -> None:
    """Errors speak of the names in the file."""
    family, shapes, message = LEFT[kind]
    extra = {name: torch.ones(shape) for name, shape in shapes.items()}
    _, path = pair(tmp_path, MODELS[family], extra=extra)
    with pytest.raises(UserError) as caught:
        load_model(path)
    assert str(caught.value).startswith(str(path)) and message in str(caught.value)


@pytest.mark.slow
def test_smollm_equals_transformers(smollm_gguf: Path) -> None:
    """The default model: 135M weights, bit for bit what transformers reads from the same file."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    source = open_checkpoint(smollm_gguf)
    with torch.device("meta"):
        empty = LlamaForCausalLM(LlamaConfig(**source.hf_config))
    theirs = load_gguf_checkpoint(str(smollm_gguf), return_tensors=True, model_to_load=empty)
    for field in ("num_hidden_layers", "num_key_value_heads", "rms_norm_eps", "rope_theta"):
        assert source.hf_config[field] == pytest.approx(theirs["config"][field], rel=1e-6)
    assert set(theirs["tensors"]) == set(source.names())
    for name, value in theirs["tensors"].items():
        assert torch.equal(source.read(name), value), name
    ours = read_config(source)
    assert (ours.bos_token_id, ours.eos_token_ids) == (1, (2,))
    assert ours.tie_word_embeddings and ours.num_hidden_layers == 30
