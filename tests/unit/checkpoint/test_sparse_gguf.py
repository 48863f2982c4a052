"""GGUF files with sparse attention (DSA): keys of the indexers, and models that have no form."""

from dataclasses import replace
from pathlib import Path

import pytest

from lowlat.checkpoint.gguf.metadata_writer import architecture_of, gguf_keys
from lowlat.checkpoint.gguf.split import open_parts
from lowlat.checkpoint.load import load_model
from lowlat.config.model import MLAConfig, ModelConfig
from lowlat.convert.run import convert
from lowlat.utils.errors import UserError
from tests.configs import INTERLEAVED, YARN

from .builders import FAMILIES, write_model

V32, GLM, SHARING = (FAMILIES[n] for n in ("deepseek_v32", "glm_moe_dsa", "glm_moe_dsa-sharing"))
INDEXER = "attention.indexer."


def test_keys_and_names(tmp_path: Path) -> None:
    """Those of llama.cpp; the list of indexers has no MTP module."""
    write_model(tmp_path / "m", SHARING)
    convert(tmp_path / "m", tmp_path / "m.gguf", dtype="bf16")
    file = open_parts(tmp_path / "m.gguf")
    keys = {key.removeprefix("glm-dsa."): value for key, value in file.metadata.items()}
    assert keys["general.architecture"] == "glm-dsa" and keys["nextn_predict_layers"] == 1
    found = {name: keys[INDEXER + name] for name in ("head_count", "key_length", "top_k", "types")}
    assert found == {"head_count": 5, "key_length": 8, "top_k": 7, "types": [1, 0]}
    names = {name for name in file.tensors if ".indexer." in name}
    parts = ("attn_q_b.weight", "attn_k.weight", "k_norm.weight", "k_norm.bias", "proj.weight")
    assert names == {f"blk.{block}.indexer.{part}" for block in (0, 2) for part in parts}


def test_full_indexers_of_v32_need_no_list() -> None:
    assert architecture_of(V32) == "deepseek32"
    keys = gguf_keys(V32, "deepseek32")
    assert keys["deepseek32.attention.indexer.top_k"] == 7
    assert "deepseek32.attention.indexer.types" not in keys


def indexer_of(config: ModelConfig, **changes: object) -> ModelConfig:
    attention = config.attention
    assert isinstance(attention, MLAConfig) and attention.indexer is not None
    return replace(
        config, attention=replace(attention, indexer=replace(attention.indexer, **changes))
    )  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (indexer_of(V32, index_head_dim=9), "index_head_dim 9, no power of two"),
        (replace(GLM, rope=YARN), "rope_type 'yarn' of glm-dsa"),
        (replace(V32, rope=YARN), "YaRN's mscale 0.7 of deepseek32"),
        (replace(V32, moe=None), "sparse attention without experts"),
        (replace(V32, rope=replace(INTERLEAVED, rope_interleave=False)), "rope_interleave false"),
    ],
)
def test_models_without_a_form(config: ModelConfig, words: str) -> None:
    with pytest.raises(UserError, match="cannot express") as caught:
        architecture_of(config)
    assert words in str(caught.value)


def five_layers(context: int) -> ModelConfig:
    """Indexers as in GLM-5.2: in layers 0 to 2, then in every fourth."""
    attention = SHARING.attention
    assert isinstance(attention, tuple)
    layers = (*[attention[0]] * 3, *[attention[1]] * 2)
    return replace(
        SHARING,
        num_hidden_layers=5,
        attention=layers,
        max_position_embeddings=context,
        num_nextn_predict_layers=0,
    )


def test_files_without_a_list_of_indexers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in llama.cpp: of GLM-5.2's context they have its indexers, of a shorter one all."""

    def keys(config: ModelConfig, arch: str) -> dict[str, object]:
        found = gguf_keys(config, arch)
        return {key: value for key, value in found.items() if not key.endswith("indexer.types")}

    monkeypatch.setattr("lowlat.convert.storage.gguf.gguf_keys", keys)
    for name, context in (("long", 2**20), ("short", 2**20 - 1)):
        write_model(tmp_path / name, five_layers(context))
        convert(tmp_path / name, tmp_path / f"{name}.gguf", dtype="bf16")
    assert load_model(tmp_path / "long.gguf").config == five_layers(2**20)
    with pytest.raises(
        UserError, match=r"layers\.3\.self_attn\.indexer\.wq_b\.weight.* is missing"
    ):
        load_model(tmp_path / "short.gguf")
