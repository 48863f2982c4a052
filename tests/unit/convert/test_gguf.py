"""GGUF files of every family: what goes in comes back, what the format cannot say is refused."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFReader
from gguf.quants import dequantize

from lowlat.checkpoint.gguf.file import GGUFFile
from lowlat.checkpoint.load import load_model
from lowlat.config.hf.families import ARCHITECTURES
from lowlat.config.model import GQAConfig, ModelConfig, RopeConfig
from lowlat.convert.run import convert
from lowlat.model.linear import Linear
from lowlat.ops.quantized import dequantize_int4, dequantize_int8, quantize_int4, quantize_int8
from lowlat.text.tokenizer import Tokenizer
from lowlat.utils.errors import UserError
from tests.configs import GQA, INTERLEAVED, LLAMA3, MLA, MOE, YARN
from tests.parameters import slow_except
from tests.unit.checkpoint.builders import FAMILIES, assert_same_bits, gqa, mla, write_model

from .texts import TEMPLATE, write_tokenizer

TWO_SETS = replace(
    INTERLEAVED,
    rope_type="longrope",
    factor=512 / 5,
    original_max_position_embeddings=5,
    attention_factor=1.25,
    pair_factors=(1.0, 2.0, 3.0),
    long_pair_factors=(2.0, 3.0, 4.0),
)
ANY_ORDER = replace(MOE, first_k_dense_replace=0, mlp_layer_types=("sparse", "dense"))
MODELS = {name: config for name, config in FAMILIES.items() if "fp8" not in name} | {
    "yarn": mla("deepseek_v3", rope=YARN, num_nextn_predict_layers=1),
    "groups": mla("deepseek_v3", moe=replace(mla("deepseek_v3").moe, n_group=3, topk_group=2)),
    "dense": mla("deepseek_v3", moe=None),
    "no query latent": mla(
        "deepseek_v3", attention=replace(mla("deepseek_v3").attention, q_lora_rank=None)
    ),
    "biases": replace(gqa("llama"), attention=replace(GQA, qkv_bias=True, o_bias=True)),
    "linear": gqa("llama", rope=RopeConfig(rope_theta=1e4, rope_type="linear", factor=2.0)),
}
MINICPM3 = replace(FAMILIES["minicpm3"], dim_model_base=256)
MODELS |= {
    "minicpm3": MINICPM3,
    "minicpm3-longrope": replace(MINICPM3, rope=replace(TWO_SETS, rope_interleave=False)),
    "mistral4-yarn": replace(FAMILIES["mistral4"], rope=replace(YARN, llama_4_scaling_beta=0.1)),
}
ALIEN = "axk1"
"""The family whose computation no key of the format describes."""
EXPRESSIBLE = [
    name for name in MODELS if "converted" not in name and MODELS[name].model_type != ALIEN
]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["auto", "fp32", "bf16"])
@pytest.mark.parametrize("name", EXPRESSIBLE)
def test_there_and_back_to_the_bit(tmp_path: Path, name: str, dtype: str) -> None:
    """MTP modules, routing biases and their config included; bf16 numbers fit every float type."""
    before = write_model(tmp_path / "m", MODELS[name])
    convert(tmp_path / "m", tmp_path / "m.gguf", dtype=dtype)
    convert(tmp_path / "m.gguf", tmp_path / "back", dtype="bf16")
    after = load_model(tmp_path / "back")
    assert_same_bits(after.model, before)
    # the format knows no kin of V3, and no mistral without a window
    family = dict.fromkeys(("kimi_k2", "glm4_moe_lite", "youtu"), "deepseek_v3")
    config = MODELS[name]
    assert after.config == replace(
        config, model_type=family.get(config.model_type, config.model_type)
    )


@pytest.mark.parametrize("name", ["minicpm3-longrope", "mistral4-yarn"])
def test_families_with_graphs_of_their_own(tmp_path: Path, name: str) -> None:
    before = write_model(tmp_path / "m", MODELS[name])
    convert(tmp_path / "m", tmp_path / "m.gguf")
    after = load_model(tmp_path / "m.gguf", dtype="bf16")
    assert after.config == MODELS[name]
    assert_same_bits(after.model, before)


def test_llama3_frequencies_become_divisors(tmp_path: Path) -> None:
    before = write_model(tmp_path / "m", gqa("llama", rope=LLAMA3))
    convert(tmp_path / "m", tmp_path / "m.gguf")
    after = load_model(tmp_path / "m.gguf")
    frequencies = (model.rotary.inverse for model in (before, after.model))
    assert torch.allclose(*frequencies, rtol=1e-6, atol=0)
    convert(tmp_path / "m.gguf", tmp_path / "again.gguf", dtype="bf16")
    again = load_model(tmp_path / "again.gguf").model
    assert torch.equal(again.rotary.inverse, after.model.rotary.inverse)


def wide(family: str) -> ModelConfig:
    """Sizes of which every matrix has whole blocks."""
    config = MODELS[family]
    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 320}
    if isinstance(config.attention, GQAConfig):
        attention: Any = replace(GQA, num_attention_heads=4, head_dim=16)
        return replace(config, attention=attention, **sizes)
    attention = replace(
        MLA,
        num_attention_heads=4,
        kv_lora_rank=32,
        q_lora_rank=32,
        qk_nope_head_dim=32,
        qk_rope_head_dim=16,
        v_head_dim=8,
    )
    assert config.moe is not None
    moe = replace(config.moe, moe_intermediate_size=32)
    return replace(config, attention=attention, moe=moe, **sizes)


@pytest.mark.parametrize(("dtype", "kind"), [("int8", Kind.Q8_0), ("int4", Kind.Q4_1)])
@pytest.mark.parametrize("family", ["llama", "deepseek_v3-mtp-copies"])
def test_blocks_hold_the_packed_numbers(
    tmp_path: Path, family: str, dtype: str, kind: Kind
) -> None:
    """As the gguf package decodes them; loaded in the same type, no projection loses anything."""
    write_model(tmp_path / "m", wide(family))
    convert(tmp_path / "m", tmp_path / "m.gguf", dtype=dtype)
    kinds = {t.name: t.tensor_type for t in GGUFReader(tmp_path / "m.gguf").tensors}
    eight = ("token_embd.", "attn_k_b.", "attn_v_b.", "nextn.eh_proj.")
    for name, own in kinds.items():
        if "norm" in name or "bias" in name or "gate_inp" in name:
            assert own == Kind.F32, name
        elif "nextn.embed" in name or "shared_head_head" in name:
            assert own in (kind, Kind.Q8_0), name
        else:
            is_eight = name == "output.weight" or any(part in name for part in eight)
            assert own == (Kind.Q8_0 if is_eight else kind), name
    from_gguf = load_model(tmp_path / "m.gguf", dtype=dtype).model
    convert(tmp_path / "m", tmp_path / "packed", dtype=dtype)
    from_folder = load_model(tmp_path / "packed").model
    compared = 0
    for name, module in from_folder.named_modules():
        if isinstance(module, Linear) and module.storage == dtype and name != "mtp.0.head":
            own = from_gguf.get_submodule(name)
            assert isinstance(own, Linear)
            found, expected = (linear.dense_weight(torch.float32) for linear in (own, module))
            assert torch.equal(found, expected), name
            compared += 1
    assert compared > 10


def test_blocks_by_hand() -> None:
    """Bytes of one row of each kind, against the gguf package."""
    from lowlat.checkpoint.gguf.blocks import encode

    rows = torch.randn(37, 96)
    eight = dequantize(encode(rows, Kind.Q8_0).flatten(1).numpy(), Kind.Q8_0)
    assert np.array_equal(eight, dequantize_int8(quantize_int8(rows), 37, 96).numpy())
    four = dequantize(encode(rows, Kind.Q4_1).flatten(1).numpy(), Kind.Q4_1)
    assert np.array_equal(four, dequantize_int4(quantize_int4(rows), 37, 96).numpy())


def test_packed_folders_keep_their_type(tmp_path: Path) -> None:
    """int4 folder -> Q4_1 -> int4 folder, without loss of any int4 projection."""
    write_model(tmp_path / "m", wide("llama"))
    convert(tmp_path / "m", tmp_path / "int4", dtype="int4")
    convert(tmp_path / "int4", tmp_path / "m.gguf")
    convert(tmp_path / "m.gguf", tmp_path / "again", dtype="int4")
    first, second = (load_model(tmp_path / name).model for name in ("int4", "again"))
    names = [n for n, m in first.named_modules() if isinstance(m, Linear) and m.storage == "int4"]
    assert len(names) == 14
    for name in names:
        for part, value in first.get_submodule(name).state_dict().items():
            assert torch.equal(value, second.get_submodule(name).state_dict()[part]), name


@pytest.mark.parametrize(
    ("config", "what"),
    [
        (MODELS["llama-converted"], "a latent without norm"),
        (FAMILIES["minicpm3"], "minicpm3 with other factors than scale_emb 12"),
        (
            replace(MINICPM3, attention=replace(MINICPM3.attention, q_lora_rank=None)),
            "minicpm3 without q_lora_rank",
        ),
        (
            replace(MINICPM3, rope=replace(YARN, rope_interleave=False)),
            "rope_type 'yarn' of minicpm3",
        ),
        (MODELS["axk1"], "a norm on the output of experts"),
        (mla("deepseek_v3", rope=TWO_SETS), "longrope with short and long factors"),
        (mla("deepseek_v3", moe=ANY_ORDER), "dense layers after sparse ones"),
        (mla("deepseek_v3", rope=replace(YARN, mscale=1.0)), "YaRN's mscale 1.0 with"),
        (mla("deepseek_v3", rope=replace(YARN, rope_interleave=False)), "rope_interleave false"),
        (
            mla("deepseek_v3", moe=replace(mla("deepseek_v3").moe, moe_layer_freq=2)),
            "moe_layer_freq 2",
        ),
        (
            mla("deepseek_v3", moe=replace(mla("deepseek_v3").moe, n_shared_experts=0)),
            "experts without shared ones",
        ),
        (gqa("qwen3", sliding_window=7), "sliding_window 7"),
        (
            replace(
                gqa("qwen3"),
                attention=replace(gqa("qwen3").attention, qkv_bias=True, o_bias=True),
            ),
            "attention_bias true of model_type 'qwen3'",
        ),
        (replace(mla("deepseek_v3"), model_type="lowlat", rope=LLAMA3), "rope_interleave false"),
        (
            mla("deepseek_v3", rope=replace(YARN, rope_type="linear", mscale_all_dim=None)),
            "rope_type 'linear' of MLA",
        ),
    ],
)
def test_what_the_format_cannot_say(tmp_path: Path, config: ModelConfig, what: str) -> None:
    write_model(tmp_path / "m", config)
    with pytest.raises(UserError, match=f"files cannot express {what}.*--format hf"):
        convert(tmp_path / "m", tmp_path / "m.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "fp8"}, "--dtype fp8 does not exist in GGUF files; choose fp32, bf16"),
        ({"file_format": "hf"}, "m.gguf: --format hf needs a folder that does not end in .gguf"),
        ({"to": "mla"}, "files cannot express a latent without norm"),
    ],
)
def test_combinations_that_do_not_exist(
    tmp_path: Path, options: dict[str, str], message: str
) -> None:
    write_model(tmp_path / "m", FAMILIES["llama"])
    with pytest.raises(UserError, match=message):
        convert(tmp_path / "m", tmp_path / "m.gguf", **options)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_vocabulary_and_template_are_copied(tmp_path: Path) -> None:
    """Folder -> GGUF -> folder: the same ids, the same special tokens, the same template."""
    config = replace(gqa("llama"), vocab_size=307)
    write_model(tmp_path / "m", config)
    backend = write_tokenizer(tmp_path / "m")
    convert(tmp_path / "m", tmp_path / "m.gguf")
    convert(tmp_path / "m.gguf", tmp_path / "back", dtype="bf16")
    before = Tokenizer.from_folder(tmp_path / "m")
    for after in (
        Tokenizer.from_gguf(tmp_path / "m.gguf"),
        Tokenizer.from_folder(tmp_path / "back"),
    ):
        for text in ("<s>the cat, it's 2024</s>", "<think>日本語\n\n größe", "<|user|>hi  there"):
            assert after.encode(text) == before.encode(text) == backend.encode(text).ids
        assert after.chat_template == before.chat_template == TEMPLATE
        assert after.eos_ids >= {1}
        assert (after.bos_id, after.special_ids) == (0, {0, 1, 2})
    file = GGUFFile(tmp_path / "m.gguf")
    # rows beyond the vocabulary are tokens without use
    assert file.metadata["tokenizer.ggml.tokens"].length == 307


def test_no_vocabulary_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_model(tmp_path / "m", FAMILIES["llama"])
    convert(tmp_path / "m", tmp_path / "m.gguf")
    assert "has no tokenizer, so the GGUF file has no vocabulary" in caplog.text
    convert(tmp_path / "m.gguf", tmp_path / "back", dtype="fp32")
    assert not (tmp_path / "back" / "tokenizer.json").exists()


def test_groups_of_which_none_is_left_out_are_one(tmp_path: Path) -> None:
    """llama.cpp takes a file as damaged that uses as many groups as it has."""
    moe = replace(mla("deepseek_v3").moe, n_group=3, topk_group=3)
    before = write_model(tmp_path / "m", mla("deepseek_v3", moe=moe))
    convert(tmp_path / "m", tmp_path / "m.gguf")
    convert(tmp_path / "m.gguf", tmp_path / "back", dtype="bf16")
    after = load_model(tmp_path / "back")
    assert after.config.moe == replace(moe, n_group=1, topk_group=1)
    assert_same_bits(after.model, before)


@pytest.mark.parametrize(("beta_fast", "is_said"), [(32.0, False), (1.0, True)])
def test_what_llama_cpp_computes_otherwise_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, beta_fast: float, is_said: bool
) -> None:
    write_model(tmp_path / "m", mla("deepseek_v3", rope=replace(YARN, beta_fast=beta_fast)))
    convert(tmp_path / "m", tmp_path / "m.gguf")
    assert ("llama.cpp takes YaRN's beta_fast as 32 in MLA, not 1" in caplog.text) == is_said
    assert load_model(tmp_path / "m.gguf").config.rope.beta_fast == beta_fast


@pytest.mark.parametrize(("window", "is_said"), [(None, False), (512, False), (7, True)])
def test_windows_that_llama_cpp_does_not_read_are_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, window: int | None, is_said: bool
) -> None:
    """Where texts can be longer than the window at all."""
    write_model(tmp_path / "m", gqa("mistral", sliding_window=window))
    convert(tmp_path / "m", tmp_path / "m.gguf")
    assert ("llama.cpp reads no sliding_window of mistral" in caplog.text) == is_said


@pytest.mark.parametrize("family", slow_except(ARCHITECTURES, EXPRESSIBLE))
def test_folders_made_of_files_name_their_class(tmp_path: Path, family: str) -> None:
    """`architectures`, which programs choose the model's code by."""
    write_model(tmp_path / "m", MODELS[family])
    convert(tmp_path / "m", tmp_path / "m.gguf")
    convert(tmp_path / "m.gguf", tmp_path / "back", dtype="fp16")
    before, after = (
        json.loads((tmp_path / name / "config.json").read_text()) for name in ("m", "back")
    )
    if before["model_type"] == after["model_type"]:
        assert after["architectures"] == before["architectures"]
    assert after["architectures"] == [ARCHITECTURES[after["model_type"]]]


@pytest.mark.parametrize("ends", [(2,), (2, 5), (2, 5, 6), (2, 5, 6, 7)])
@pytest.mark.parametrize("has_text", [True, False])
def test_every_end_comes_back(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, ends: tuple[int, ...], has_text: bool
) -> None:
    """Regression: a model that runs past the third of its ends, or ends at a token of another
    model's for its name.
    """
    config = replace(gqa("llama"), vocab_size=307, eos_token_ids=ends)
    write_model(tmp_path / "m", config)
    if has_text:
        backend = write_tokenizer(tmp_path / "m")
        spec = backend.to_str().replace('"<s>"', '"<|endoftext|>"')
        (tmp_path / "m" / "tokenizer.json").write_text(spec)
        config_file = tmp_path / "m" / "tokenizer_config.json"
        config_file.write_text(json.dumps({"eos_token": backend.id_to_token(ends[-1])}))
    convert(tmp_path / "m", tmp_path / "m.gguf")
    convert(tmp_path / "m.gguf", tmp_path / "back", dtype="fp32")
    assert ("llama.cpp has keys for 3 end tokens" in caplog.text) == (len(ends) > 3)
    if has_text:
        expected = Tokenizer.from_folder(tmp_path / "m").eos_ids
        assert expected >= set(ends)
        for after in (
            Tokenizer.from_gguf(tmp_path / "m.gguf"),
            Tokenizer.from_folder(tmp_path / "back"),
        ):
            assert after.eos_ids == expected
        assert set(load_model(tmp_path / "back").config.eos_token_ids) == expected
    else:
        assert load_model(tmp_path / "back").config.eos_token_ids == ends


def test_too_small_an_embedding_is_refused(tmp_path: Path) -> None:
    write_model(tmp_path / "m", replace(gqa("llama"), vocab_size=250))
    write_tokenizer(tmp_path / "m")
    with pytest.raises(UserError, match=r"has ids up to \d+, the embedding 250 rows"):
        convert(tmp_path / "m", tmp_path / "m.gguf")


def test_an_unknown_way_of_cutting_is_refused(tmp_path: Path) -> None:
    """Regression: a file whose name for the cutting makes other tokens of the same text."""
    write_model(tmp_path / "m", replace(gqa("llama"), vocab_size=307))
    write_tokenizer(tmp_path / "m")
    path = tmp_path / "m" / "tokenizer.json"
    spec = json.loads(path.read_text())
    spec["pre_tokenizer"]["add_prefix_space"] = True
    path.write_text(json.dumps(spec))
    with pytest.raises(UserError, match="has a pre-tokenizer without a name in GGUF files"):
        convert(tmp_path / "m", tmp_path / "m.gguf")


@pytest.mark.slow
def test_the_real_file_is_made_again_byte_for_byte(smollm_gguf: Path, tmp_path: Path) -> None:
    """Q4_1 -> int4 folder -> Q4_1: every tensor of the published file."""
    convert(smollm_gguf, tmp_path / "int4", dtype="int4")
    convert(tmp_path / "int4", tmp_path / "again.gguf")
    files = [GGUFReader(path) for path in (smollm_gguf, tmp_path / "again.gguf")]
    first, second = ({t.name: t for t in file.tensors} for file in files)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.tensor_type == second[name].tensor_type, name
        assert np.array_equal(tensor.data, second[name].data), name
    before, after = (Tokenizer.from_gguf(file) for file in files)
    text = "Hello <|im_start|>world 123\n\n naïve 日本"
    assert after.encode(text) == before.encode(text)
    assert after.chat_template == before.chat_template
    assert files[1].fields["tokenizer.ggml.pre"].contents() == "smollm"
