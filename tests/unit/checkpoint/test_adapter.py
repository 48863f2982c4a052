"""LoRA adapters in PEFT's layout: names, scalings, padding; a line refuses every bad file."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lowlat.checkpoint.adapter import Adapter, read_adapter
from lowlat.config.model import ModelConfig
from lowlat.model.transformer import Transformer
from lowlat.utils.errors import UserError
from tests import configs
from tests.fakes import gqa_config, mla_config
from tests.lora import drawn_updates, save_adapter

MOE = mla_config(moe=configs.PLAIN_MOE, num_nextn_predict_layers=1)
Q = "base_model.model.model.layers.1.self_attn.q_proj.lora_"
Tensors = dict[str, torch.Tensor]


def written(folder: Path, config: ModelConfig, **settings: Any) -> Path:
    updates = drawn_updates(Transformer(config), rank=3, seed=1)
    return save_adapter(folder, config, updates, **settings)


def edit(folder: Path, change: Callable[[Tensors], object]) -> None:
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def settings_of(folder: Path, **changes: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def assert_equal(found: Adapter, expected: Adapter) -> None:
    assert found.updates.keys() == expected.updates.keys()
    for path, update in expected.updates.items():
        assert torch.equal(found.updates[path].a, update.a)
        assert torch.equal(found.updates[path].b, update.b)
    assert found.digest == expected.digest


@pytest.mark.parametrize("config", [gqa_config(), MOE], ids=["gqa", "mla-moe"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_updates_of_every_projection(
    tmp_path: Path, config: ModelConfig, dtype: torch.dtype
) -> None:
    """Routed experts too, by the names they have in checkpoints; not MTP modules."""
    updates = drawn_updates(Transformer(config), rank=3, seed=1)
    found = read_adapter(save_adapter(tmp_path / "a", config, updates, dtype=dtype), config)
    assert found.updates.keys() == updates.keys()
    for path, update in updates.items():
        assert torch.equal(found.updates[path].a, update.a)
        assert torch.equal(found.updates[path].b, update.b)


def test_the_digest_identifies_what_an_adapter_computes(tmp_path: Path) -> None:
    config = gqa_config()
    digests = [read_adapter(written(tmp_path / "a", config), config).digest]
    digests.append(read_adapter(written(tmp_path / "b", config, lora_alpha=5), config).digest)
    edit(tmp_path / "a", lambda tensors: tensors[f"{Q}A.weight"].mul_(1.5))
    digests.append(read_adapter(tmp_path / "a", config).digest)
    edit(tmp_path / "a", lambda tensors: tensors[f"{Q}A.weight"].div_(1.5))
    assert len(set(digests)) == 3
    # What does not change the computation does not count.
    settings_of(tmp_path / "a", base_model_name_or_path="x", lora_dropout=0.1, peft_version="9")
    assert read_adapter(tmp_path / "a", config).digest == digests[0]


@pytest.mark.parametrize(
    ("settings", "module", "scaling"),
    [
        ({}, "q_proj", 5 / 3),
        ({"use_rslora": True}, "q_proj", 5 / math.sqrt(3)),
        ({"alpha_pattern": {"q_proj": 7}}, "q_proj", 7 / 3),
        ({"alpha_pattern": {"q_proj": 7}}, "k_proj", 5 / 3),
        ({"alpha_pattern": {"layers.0.self_attn.q_proj": 7}}, "q_proj", 5 / 3),
        ({"alpha_pattern": {"1.self_attn.q_proj": 7}}, "q_proj", 7 / 3),
        ({"alpha_pattern": {"^model.layers.1.self_attn.q_proj": 7}}, "q_proj", 7 / 3),
        ({"alpha_pattern": {"^layers.1.self_attn.q_proj": 7}}, "q_proj", 5 / 3),
    ],
)
def test_scaling(tmp_path: Path, settings: dict[str, Any], module: str, scaling: float) -> None:
    config = gqa_config()
    folder = written(tmp_path / "a", config, lora_alpha=5, **settings)
    stored = load_file(folder / "adapter_model.safetensors")
    path = f"layers.1.self_attn.{module}"
    update = read_adapter(folder, config).updates[path]
    expected = scaling * stored[f"base_model.model.model.{path}.lora_B.weight"]
    torch.testing.assert_close(update.b, expected, rtol=1e-6, atol=0)


def test_ranks_by_module(tmp_path: Path) -> None:
    config = gqa_config()
    folder = written(tmp_path / "a", config, rank_pattern={"layers.1.self_attn.q_proj": 2})
    with pytest.raises(UserError, match=r"q_proj.lora_A.weight' has shape \[3, 23\], but .* \[2,"):
        read_adapter(folder, config)

    def narrow(tensors: Tensors) -> None:
        tensors[f"{Q}A.weight"] = tensors[f"{Q}A.weight"][:2].contiguous()
        tensors[f"{Q}B.weight"] = tensors[f"{Q}B.weight"][:, :2].contiguous()

    edit(folder, narrow)
    assert read_adapter(folder, config).updates["layers.1.self_attn.q_proj"].a.shape == (2, 23)


def set_value(value: float) -> Callable[[Tensors], object]:
    return lambda tensors: tensors[f"{Q}B.weight"].__setitem__((0, 0), value)


def renamed(old: str, new: str) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.__setitem__(new, tensors.pop(old))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_value(math.nan), r"q_proj.lora_B.weight' holds values that are not finite; train"),
        (set_value(math.inf), r"q_proj.lora_B.weight' holds values that are not finite; train"),
        (set_value(3e38), r"q_proj.lora_B.weight' exceeds the range of bf16 with its scaling"),
        (
            lambda tensors: tensors.pop(f"{Q}A.weight"),
            r"q_proj.lora_A.weight' is missing; the adapter is incomplete",
        ),
        (
            lambda tensors: tensors.update({f"{Q}A.weight": torch.zeros(3, 22)}),
            r"q_proj.lora_A.weight' has shape \[3, 22\], but the model and r need \[3, 23\]",
        ),
        (
            lambda tensors: tensors.update({f"{Q}A.weight": torch.zeros(3)}),
            r"q_proj.lora_A.weight' has shape \[3\], which is no matrix",
        ),
        (
            lambda tensors: tensors.update({f"{Q}A.weight": torch.zeros(3, 23, dtype=torch.int8)}),
            r"q_proj.lora_A.weight' is int8; save the adapter in float32",
        ),
        (
            renamed(f"{Q}A.weight", "base_model.model.model.layers.1.self_attn.w.lora_A.weight"),
            r"self_attn.w.lora_A.weight' has no projection in a model of type llama",
        ),
        (
            renamed(f"{Q}A.weight", "base_model.model.lm_head.lora_A.weight"),
            r"lm_head.lora_A.weight' has no projection in a model of type llama",
        ),
        (
            renamed(f"{Q}A.weight", f"{Q}magnitude_vector"),
            r"lora_magnitude_vector' is no lora_A or lora_B of a module under base_model.model.",
        ),
        (renamed(f"{Q}A.weight", "x.lora_A.weight"), r"'x.lora_A.weight' is no lora_A or"),
        (lambda tensors: tensors.clear(), "holds no tensors; save the adapter again"),
    ],
)
def test_bad_tensors(tmp_path: Path, change: Callable[[Tensors], object], message: str) -> None:
    config = gqa_config()
    folder = written(tmp_path / "a", config)
    edit(folder, change)
    with pytest.raises(UserError, match=rf"^{folder}/adapter_model.safetensors: .*{message}") as e:
        read_adapter(folder, config)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, 'peft_type "IA3" is not supported; supported: LORA'),
        ({"use_dora": True}, r"use_dora \(true\) is not supported; lowlat computes W"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save \(.*\) is not supported"),
        ({"trainable_token_indices": [1]}, r"trainable_token_indices \(.*\) is not supported"),
        ({"target_parameters": ["x"]}, r"target_parameters \(.*\) is not supported"),
        ({"layer_replication": [[0, 1]]}, r"layer_replication \(.*\) is not supported"),
        ({"fan_in_fan_out": True}, r"fan_in_fan_out \(true\) is not supported"),
        ({"lora_bias": True}, r"lora_bias \(true\) is not supported"),
        ({"alora_invocation_tokens": [1]}, r"alora_invocation_tokens \(.*\) is not supported"),
        ({"some_new_option": 3}, r"some_new_option \(3\) is not supported"),
        ({"bias": "all"}, 'bias "all" is not supported; train the adapter with bias none'),
        ({"init_lora_weights": "pissa"}, 'init_lora_weights "pissa" is not supported; it changes'),
        ({"r": 0}, "r must be within 1"),
        ({"r": "8"}, "r must be an integer"),
        ({"lora_alpha": None}, "lora_alpha is missing"),
        ({"alpha_pattern": {".*q_proj": 3}}, r"alpha_pattern has the pattern '\.\*q_proj'; list"),
        ({"alpha_pattern": {"q_proj": "x"}}, "alpha_pattern.q_proj must be a finite number"),
        ({"rank_pattern": {"q_proj": 1.5}}, "rank_pattern.q_proj must be a positive integer"),
        ({"rank_pattern": [3]}, "rank_pattern must be an object of numbers by module"),
    ],
)
def test_bad_settings(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    config = gqa_config()
    folder = written(tmp_path / "a", config)
    settings_of(folder, **changes)
    with pytest.raises(UserError, match=rf"^{folder}/adapter_config.json: {message}") as error:
        read_adapter(folder, config)
    assert "\n" not in str(error.value)


def test_files_that_are_not_there(tmp_path: Path) -> None:
    config = gqa_config()
    with pytest.raises(UserError, match=r"nowhere/adapter_config.json: "):
        read_adapter(tmp_path / "nowhere", config)
    folder = written(tmp_path / "a", config)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(UserError, match=r"adapter_model.bin: only safetensors files"):
        read_adapter(folder, config)
    (folder / "adapter_model.bin").unlink()
    with pytest.raises(UserError, match=r"adapter_model.safetensors"):
        read_adapter(folder, config)
    (folder / "adapter_model.safetensors").write_bytes(b"x" * 20)
    with pytest.raises(UserError, match=r"adapter_model.safetensors: "):
        read_adapter(folder, config)
    (folder / "adapter_config.json").write_text("[]")
    with pytest.raises(UserError, match=r"adapter_config.json"):
        read_adapter(folder, config)


def test_padding_of_exactly_converted_models(tmp_path: Path) -> None:
    """Files have wider latents: an update of their padding would change what lowlat computes."""
    attention = replace(configs.MLA, q_lora_rank=None, kv_a_layernorm=False, attention_bias=False)
    config = gqa_config(model_type="deepseek_v3", attention=attention)
    path, rank = "layers.0.self_attn.", attention.kv_lora_rank
    updates = drawn_updates(
        Transformer(config), rank=3, seed=1, names=("kv_a_proj_with_mqa", "kv_b_proj")
    )
    folder = save_adapter(tmp_path / "a", config, updates)
    joint = f"base_model.model.model.{path}kv_a_proj_with_mqa.lora_B.weight"
    up = f"base_model.model.model.{path}kv_b_proj.lora_A.weight"

    def pad(tensors: Tensors) -> None:
        for name in list(tensors):
            own = tensors[name]
            if name.endswith("kv_a_proj_with_mqa.lora_B.weight"):
                zeros = own.new_zeros(64 - rank, 3)
                tensors[name] = torch.cat([own[:rank], zeros, own[rank:]])
            if name.endswith("kv_b_proj.lora_A.weight"):
                tensors[name] = torch.cat([own, own.new_zeros(3, 64 - rank)], dim=1)

    edit(folder, pad)
    found = read_adapter(folder, config)
    for module, update in updates.items():
        assert torch.equal(found.updates[module].a, update.a)
        assert torch.equal(found.updates[module].b, update.b)
    for name, place in ((joint, (rank, 0)), (up, (0, rank))):
        edit(folder, lambda tensors: tensors[name].__setitem__(place, 1.0))  # noqa: B023
        with pytest.raises(UserError, match="updates padding of an exactly converted model's lat"):
            read_adapter(folder, config)
        edit(folder, lambda tensors: tensors[name].__setitem__(place, 0.0))  # noqa: B023
