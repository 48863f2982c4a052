"""The variants: equal parameters, the caches the papers say, and which pairs are compared."""

import pytest
from lowlat_lab.study.attention import attention_variants, matched, pairs_of, usual
from lowlat_lab.study.sizes import SIZES


@pytest.mark.parametrize("name", SIZES)
def test_parameters_are_matched_and_caches_are_the_papers(name: str) -> None:
    size = SIZES[name]
    variants = attention_variants(size, 8192)
    found = {variant.name: matched(variant, variants[0], 8192) for variant in variants}
    assert all(abs(variant.difference) < 0.01 for variant in found.values())
    groups = {variant: sizes.groups_equivalent for variant, sizes in found.items()}
    assert groups["mla"] == groups["gla-2"] == groups["gta-4"] == 2.25
    assert (groups["mha"], groups["gqa-2"], groups["mqa"]) == (8, 2, 1)
    heads, width = size.num_attention_heads, size.head_dim
    assert found["tpa"].cache_elements == 4 * (heads + width)
    assert found["mqa"].intermediate_size > found["mha"].intermediate_size


def test_what_is_compared() -> None:
    names = [variant.name for variant in usual(attention_variants(SIZES["tiny"], 263))]
    assert names == ["mha", "gqa-2", "mqa", "mla", "gla-2", "gta-4", "tpa"]
    pairs = pairs_of(names)
    assert pairs[0] == ("mla", "mha") and ("gqa-2", "mqa") in pairs and ("tpa", "mla") in pairs
    assert len({frozenset(pair) for pair in pairs}) == len(pairs)
    assert pairs_of(["mha", "mqa"]) == [("mqa", "mha")]
