"""The variants: equal parameters, the caches the papers say, and which pairs are compared."""

import pytest
from lowlat_lab.study.attention import attention_variants, matched, pairs_of, usual
from lowlat_lab.study.plan import config_of
from lowlat_lab.study.sizes import SIZES, StudySize

from lowlat.config.attention import sparse_topk


@pytest.mark.parametrize("name", SIZES)
def test_parameters_are_matched_and_caches_are_the_papers(name: str) -> None:
    size = SIZES[name]
    variants = attention_variants(size, 8192)
    found = {variant.name: matched(variant, variants[0], 8192) for variant in variants}
    assert all(abs(variant.difference) < 0.01 for variant in found.values())
    groups = {variant: sizes.groups_equivalent for variant, sizes in found.items()}
    assert groups["mla"] == groups["gla-2"] == groups["gta-4"] == 2.25
    assert groups["mlra-4"] == groups["mla-gated"] == 2.25
    assert groups["dsa"] == 2.75 and groups["mla-nope"] == 2.125
    assert (groups["mha"], groups["gqa-2"], groups["mqa"]) == (8, 2, 1)
    heads, width = size.num_attention_heads, size.head_dim
    assert found["tpa"].cache_elements == 4 * (heads + width)
    assert found["mqa"].intermediate_size > found["mha"].intermediate_size


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_dsa_is_sparse_and_rope_alternates(size: StudySize) -> None:
    variants = {each.name: each.model for each in attention_variants(size, 8192)}
    dsa, nope = (config_of(variants[name], 8192) for name in ("dsa", "mla-nope"))
    topk = sparse_topk(dsa.attention)
    assert topk is not None and 0 < topk <= size.sequence_length / 4
    layers = [nope.attention_of(layer) for layer in range(nope.num_hidden_layers)]
    assert [layer.rope_dim > 0 for layer in layers[:4]] == [True, False, True, False][: len(layers)]
    assert len({layer.qk_head_dim for layer in layers}) == 1


def test_what_is_compared() -> None:
    every = [variant.name for variant in attention_variants(SIZES["tiny"], 263)]
    names = [variant.name for variant in usual(attention_variants(SIZES["tiny"], 263))]
    assert names == ["mha", "gqa-2", "mla", "mlra-4", "mla-gated", "dsa", "mla-nope"]
    assert {(name, "mla") for name in names[3:]} <= {*pairs_of(names)}
    pairs = pairs_of(every)
    assert pairs[0] == ("mla", "mha") and ("gqa-2", "mqa") in pairs and ("tpa", "mla") in pairs
    assert len({frozenset(pair) for pair in pairs}) == len(pairs)
    assert pairs_of(["mha", "mqa"]) == [("mqa", "mha")]
