"""Known mistakes of sparse attention (DSA), planted in either side, are named."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lowlat.checkpoint.load import load_model
from lowlat.checkpoint.save import save_model
from lowlat.compare.implementations.base import Implementation
from lowlat.compare.implementations.transformers import load_transformers
from lowlat.compare.result_json import as_dict
from lowlat.compare.result_text import choice_lines, diagnosis_lines
from lowlat.compare.run import compare
from lowlat.config.attention import distinct
from lowlat.config.model import MLAConfig
from lowlat.ops import sparse_attention
from lowlat.ops.sparse_attention import IndexQueries
from tests.lowlat_configs import random_model

from .models import Planted, own_side, sparse_case, window, write
from .plant import Plant, replace_function
from .plants_sparse import SPARSE, THEIR_SPARSE

LONG = 150
"""Tokens among which there are near ties."""
GUILTY = [(plant, "B") for plant in (*SPARSE, *THEIR_SPARSE)] + [(plant, "A") for plant in SPARSE]


@pytest.fixture(scope="module")
def glm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Interleaved rotation of the indexer; the last layer shares a choice."""
    return write(sparse_case("glm_moe_dsa"), tmp_path_factory.mktemp("glm"))


def side(path: Path, implementation: str) -> Implementation:
    own = own_side(path)
    if implementation == "lowlat":
        return own
    return load_transformers(path, own.config, label="theirs", dtype=torch.float32)


@pytest.mark.parametrize(
    ("plant", "guilty"), GUILTY, ids=[f"{plant.name} in {side}" for plant, side in GUILTY]
)
def test_planted_mistake_is_named(plant: Plant, guilty: str, glm: Path) -> None:
    clean = Planted(lambda: own_side(glm), None)
    bad = Planted(lambda: side(glm, plant.implementation), plant.plant)
    report = compare(*((bad, clean) if guilty == "A" else (clean, bad)), [window()])
    assert not report.equal
    assert report.first is not None and report.first.part == plant.first
    found = report.diagnosis.findings
    assert {item.label for item in found} == {guilty} == {item.judged_by for item in found}
    assert {item.kind for item in found} == {plant.kind}
    assert report.first in found[0].places
    assert not report.diagnosis.unexplained
    said = diagnosis_lines(as_dict(report))
    assert plant.says in said[0] and f": {guilty} " in said[0]


@pytest.mark.parametrize("theirs", ["lowlat", "transformers"])
def test_near_ties_are_equal(theirs: str, tmp_path: Path) -> None:
    """In bf16 and fp32 rounding decides between near scores; neither choice is wrong."""
    path = write(sparse_case("glm_moe_dsa", first_k_dense_replace=3), tmp_path)  # no experts
    narrow = own_side(path, "bf16")
    report = compare(side(path, theirs), narrow, [window(LONG), window(LONG, 0)])
    assert report.equal, report.first
    changed = [found for found in report.comparison.choices.values() if found.changed]
    assert changed and all(found.near_ties for found in changed)
    assert not report.diagnosis.findings and not report.diagnosis.unexplained
    assert "all at near ties" in choice_lines(as_dict(report))[0]


@pytest.mark.parametrize("plant", SPARSE, ids=[plant.name for plant in SPARSE])
def test_mistakes_are_no_near_ties(plant: Plant, glm: Path) -> None:
    """They are named in bf16, too."""
    bad = Planted(lambda: own_side(glm, "bf16"), plant.plant)
    report = compare(own_side(glm), bad, [window(LONG)])
    assert not report.equal
    assert {item.kind for item in report.diagnosis.findings} == {plant.kind}
    assert not any(found.near_ties for found in report.comparison.choices.values() if found.changed)


def test_a_perturbed_indexer_is_no_near_tie(glm: Path) -> None:
    """Its choice follows its own scores, which are others."""
    bad = own_side(glm, "bf16")
    bad.model.get_parameter("layers.1.self_attn.indexer.wk.weight").mul_(
        torch.rand(15, 1, generator=torch.Generator().manual_seed(1))
    )
    for a in (own_side(glm), side(glm, "transformers")):
        report = compare(a, bad, [window(LONG)])
        assert not report.equal
        choices = report.comparison.choices.values()
        assert not any(found.near_ties for found in choices if found.changed)


def test_layout_of_v32_is_half_split(tmp_path: Path) -> None:
    """The reverse of glm_moe_dsa: interleaved where halves are right."""
    path = write(sparse_case(), tmp_path)
    bad = Planted(lambda: own_side(path), SPARSE[0].plant)
    report = compare(own_side(path), bad, [window()])
    said = diagnosis_lines(as_dict(report))
    assert "rotates pairs (2i, 2i+1) of the indexer, not (i, i + d/2)" in said[0]


def test_unknown_scores_are_unexplained(glm: Path) -> None:
    """Scores by no known rule; the choice follows them."""

    def squared(index: IndexQueries, keys: torch.Tensor) -> torch.Tensor:
        products = torch.einsum("qhd,kd->qhk", index.q, keys) * keys.shape[1] ** -0.5
        return torch.einsum("qh,qhk->qk", index.weights, products.square())

    bad = Planted(
        lambda: own_side(glm), replace_function(sparse_attention, "index_scores", squared)
    )
    report = compare(own_side(glm), bad, [window()])
    assert str(report.first) == "layer 0 index_scores"
    assert report.diagnosis.findings == ()
    assert {label for label, _ in report.diagnosis.unexplained} == {"B"}
    places = {str(place) for _, place in report.diagnosis.unexplained}
    assert places == {"layer 0 index_scores", "layer 1 index_scores"}


def test_a_perturbed_weight_is_no_mistake(glm: Path) -> None:
    """The code computes what follows from it."""
    bad = own_side(glm)
    bad.model.get_parameter("layers.1.self_attn.indexer.wk.weight").mul_(
        torch.rand(15, 1, generator=torch.Generator().manual_seed(1))
    )
    report = compare(own_side(glm), bad, [window()])
    assert str(report.first) == "layer 1 index_scores"
    assert report.diagnosis.findings == () and report.diagnosis.unexplained == ()


def test_an_explicit_rotary_width_that_is_the_models(glm: Path, tmp_path: Path) -> None:
    """index_rope_head_dim as qk_rope_head_dim, in model_type lowlat."""
    loaded = load_model(glm)
    attention = distinct(loaded.config.attention)[0]
    assert isinstance(attention, MLAConfig) and attention.indexer is not None
    indexer = replace(attention.indexer, index_rope_head_dim=attention.qk_rope_head_dim)
    layers = tuple(replace(attention, indexer=indexer) for _ in range(3))
    config = replace(loaded.config, model_type="lowlat", attention=layers)
    save_model(random_model(config, torch.float32), config, tmp_path / "m", source=None)
    bad = Planted(lambda: own_side(tmp_path / "m"), SPARSE[0].plant)
    said = diagnosis_lines(as_dict(compare(own_side(tmp_path / "m"), bad, [window()])))
    assert SPARSE[0].says in said[0]
