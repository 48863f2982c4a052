"""Sparse attention in config.json: layers with an indexer, layers that share, and refusals."""

import json
from dataclasses import replace
from typing import Any

import pytest

from lowlat.config.hf.reader import config_from_hf
from lowlat.config.hf.writer import config_to_hf
from lowlat.config.model import IndexerConfig, MLAConfig, ModelConfig

from .files import GLM_DSA, V3, V32, refusal, without

PLAIN_GLM = without(GLM_DSA, "indexer_types")


def shared_layers(config: ModelConfig) -> list[int]:
    found = []
    for layer in range(config.num_hidden_layers):
        attention = config.attention_of(layer)
        assert isinstance(attention, MLAConfig) and attention.indexer is not None
        if attention.indexer.is_shared:
            found.append(layer)
    return found


def test_the_indexer_of_v32() -> None:
    attention = config_from_hf(V32).attention
    assert isinstance(attention, MLAConfig)
    assert attention.indexer == IndexerConfig(index_n_heads=5, index_head_dim=10, index_topk=23)
    assert attention.entry_dim == 10 + 13 + 6


def test_the_layout_is_that_of_the_family_unless_given() -> None:
    """Half-split in V3.2, interleaved in GLM; MLA's own is interleaved in both."""
    for raw, usual in ((V32, False), (PLAIN_GLM, True)):
        for given in (None, True, False):
            fields = raw if given is None else raw | {"indexer_rope_interleave": given}
            config = config_from_hf(fields)
            attention = config.attention_of(0)
            assert isinstance(attention, MLAConfig) and attention.indexer is not None
            assert attention.indexer.rope_interleave == (usual if given is None else given)
            assert config.rope_of(0).rope_interleave


@pytest.mark.parametrize(
    ("fields", "shared"),
    [
        ({}, []),
        ({"indexer_types": ["full"] * 5}, []),
        ({"indexer_types": ["full", "shared", "full", "shared", "shared"]}, [1, 3, 4]),
        ({"index_topk_pattern": "FSSFS"}, [1, 2, 4]),
        ({"index_topk_pattern": ["full", "full", "shared", "full", "full"]}, [2]),
        ({"index_topk_freq": 2}, [2, 4]),
        ({"index_topk_freq": 3}, [2, 3]),
        ({"index_topk_freq": 4, "index_skip_topk_offset": 3}, [3, 4]),
        ({"index_topk_freq": 2, "index_skip_topk_offset": 1}, [1, 3]),
        ({"index_topk_freq": 2, "indexer_types": None, "index_topk_pattern": None}, [2, 4]),
    ],
)
def test_layers_that_share(fields: dict[str, Any], shared: list[int]) -> None:
    """As transformers: the list, else the pattern, else max(i - offset + 1, 0) % freq != 0."""
    config = config_from_hf(PLAIN_GLM | fields)
    assert shared_layers(config) == shared
    entries = [config.attention_of(layer).entry_dim for layer in range(5)]
    assert entries == [19 if layer in shared else 29 for layer in range(5)]
    assert shared_layers(config_from_hf(config_to_hf(config))) == shared


@pytest.mark.parametrize(
    ("raw", "fields", "words"),
    [
        (V32, {"index_topk": 0}, "index_topk must be within 1"),
        (V32, {"index_n_heads": None}, "index_n_heads is missing"),
        (V32, {"index_head_dim": 5}, "index_head_dim 5 is less than qk_rope_head_dim 6"),
        (V32, {"q_lora_rank": None}, "q_lora_rank must be a number"),
        (V32, {"indexer_types": ["full"] * 5}, "indexer_types"),
        (V32, {"layer_types": ["full_attention"] * 5}, "layer_types"),
        (
            PLAIN_GLM,
            {"indexer_types": ["shared", *["full"] * 4]},
            "indexer_types lets layer 0 share",
        ),
        (PLAIN_GLM, {"index_topk_pattern": "SFFFF"}, "index_topk_pattern lets layer 0 share"),
        (
            PLAIN_GLM,
            {"index_topk_freq": 2, "index_skip_topk_offset": 0},
            "index_topk_freq lets layer 0 share",
        ),
        (PLAIN_GLM, {"indexer_types": ["full"] * 4}, "indexer_types has 4 entries for 5 layers"),
        (PLAIN_GLM, {"indexer_types": [*["full"] * 4, "none"]}, "supported: full, shared"),
        (PLAIN_GLM, {"index_topk_pattern": "FXSSS"}, "a string of F (full) and S (shared)"),
        (PLAIN_GLM, {"index_topk_freq": 0}, "index_topk_freq must be within 1"),
        (GLM_DSA, {"index_topk_freq": 1}, "index_topk_freq contradicts indexer_types"),
        (GLM_DSA, {"index_topk_pattern": "FFFFF"}, "index_topk_pattern contradicts indexer_types"),
        (GLM_DSA, {"moe_router_dtype": "bfloat16"}, "moe_router_dtype"),
        (V3, {"index_topk": 23}, "index_topk 23 is not supported"),
    ],
)
def test_refusals(raw: dict[str, Any], fields: dict[str, Any], words: str) -> None:
    assert words in refusal(raw | fields)


def test_a_topk_beyond_the_context_is_dense() -> None:
    config = config_from_hf(V32 | {"index_topk": 10**6})
    assert config.is_sparse
    served = config.for_context(config.max_position_embeddings)
    assert not served.is_sparse and served.attention_of(0).entry_dim == 19
    assert config_from_hf(V32).for_context(24) == config_from_hf(V32)


def test_mtp_modules_behind_a_shared_layer() -> None:
    config = config_from_hf(GLM_DSA | {"num_nextn_predict_layers": 1})
    last, mtp = config.attention_of(4), config.attention_of(5)
    assert isinstance(last, MLAConfig) and isinstance(mtp, MLAConfig)
    assert (last.index_key_dim, mtp.index_key_dim) == (0, 10)


def test_a_share_without_a_choice_is_a_bug() -> None:
    config = config_from_hf(GLM_DSA)
    attention = config.attention
    assert isinstance(attention, tuple)
    with pytest.raises(ValueError, match="no layer has chosen"):
        ModelConfig(
            **{
                name: getattr(config, name)
                for name in config.__dataclass_fields__
                if name != "attention"
            },
            attention=attention[1:] + attention[:1],
        )


def test_the_lowlat_model_type_nests_the_indexer() -> None:
    config = replace(config_from_hf(GLM_DSA), model_type="lowlat")
    raw = json.loads(json.dumps(config_to_hf(config)))
    assert config_from_hf(raw) == config
    indexers = raw["attention"]["indexer"]
    assert [indexer["is_shared"] for indexer in indexers] == [False, True, True, False, True]

    def changed(**fields: Any) -> dict[str, Any]:
        return raw | {"attention": raw["attention"] | fields}

    first = changed(indexer=indexers[1:] + indexers[:1])
    assert "attention.indexer is shared in a layer before which" in refusal(first)
    mixed = changed(indexer=[*indexers[:4], indexers[4] | {"index_topk": 9}])
    assert "attention.indexer differs between layers" in refusal(mixed)
    none = changed(indexer=indexers[0] | {"index_topk": 0})
    assert "attention.indexer.index_topk must be within 1" in refusal(none)
    narrow = changed(indexer=indexers[0] | {"index_head_dim": 4})
    assert "indexer.index_head_dim 4 is less than" in refusal(narrow)
    unknown = changed(indexer=indexers[0] | {"index_kpool": 4})
    assert "attention.indexer.index_kpool" in refusal(unknown)
