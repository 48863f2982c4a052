"""Every known mistake, planted in either side, is named, and so is the part it shows in first."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch

from lowlat.compare.diagnosis.gate_reference import routing_weights
from lowlat.compare.diagnosis.mistakes import NAMES
from lowlat.compare.implementations.base import Implementation
from lowlat.compare.implementations.transformers import load_transformers
from lowlat.compare.result_json import as_dict
from lowlat.compare.result_text import diagnosis_lines
from lowlat.compare.run import ComparisonResult, compare
from lowlat.compare.trace import Block

from .models import Planted, own_side, v3_case, window, write
from .plant import Plant
from .plants_attention import ATTENTION
from .plants_gate import GATE, MTP
from .plants_sparse import FACTORS, SPARSE, THEIR_SPARSE
from .plants_theirs import THEIRS

Folders = Callable[[Plant | None], Path]
OWN = [*ATTENTION, *GATE, *MTP]
PLANTS = [*OWN, *THEIRS]
FIRST = list({plant.kind: plant for plant in reversed(OWN)}.values())
"""One of each kind."""
GUILTY = [(plant, "B") for plant in PLANTS] + [(plant, "A") for plant in FIRST]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """The checkpoint a plant needs, written once for all that need the same."""

    @cache
    def folder(changes: str) -> Path:
        return write(v3_case(**json.loads(changes)), tmp_path_factory.mktemp("v3"))

    return lambda plant: folder(json.dumps({} if plant is None else plant.config))


def side(path: Path, implementation: str) -> Implementation:
    own = own_side(path)
    if implementation == "lowlat":
        return own
    return load_transformers(path, own.config, label="theirs", dtype=torch.float32)


def planted_pair(plant: Plant, guilty: str, path: Path) -> ComparisonResult:
    clean = Planted(lambda: own_side(path), None)
    bad = Planted(lambda: side(path, plant.implementation), plant.plant)
    pair = (bad, clean) if guilty == "A" else (clean, bad)
    return compare(*pair, [window()])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("plant", "guilty"), GUILTY, ids=[f"{plant.name} in {side}" for plant, side in GUILTY]
)
def test_planted_mistake_is_named(plant: Plant, guilty: str, folders: Folders) -> None:
    report = planted_pair(plant, guilty, folders(plant))
    assert not report.equal
    assert report.first is not None and report.first.part == plant.first
    found = report.diagnosis.findings
    assert {item.label for item in found} == {guilty} == {item.judged_by for item in found}
    assert {item.kind for item in found} == {plant.kind}
    assert report.first in found[0].places
    assert not report.diagnosis.unexplained
    said = diagnosis_lines(as_dict(report))
    assert plant.says in said[0] and f": {guilty} " in said[0]
    assert not any("no known mistake" in line for line in said)


def test_every_kind_is_planted() -> None:
    """Regression: a detector that no test has seen detect anything."""
    assert set(NAMES) == {plant.kind for plant in (*OWN, *SPARSE)}
    unseen = {"mtp_hidden", *FACTORS}
    assert set(NAMES) - unseen == {plant.kind for plant in (*THEIRS, *THEIR_SPARSE)}


@pytest.mark.parametrize("plant", FIRST[::4], ids=lambda plant: plant.name)
def test_a_mistake_of_both_sides_is_no_difference(plant: Plant, folders: Folders) -> None:
    path = folders(plant)
    pair = [Planted(lambda: own_side(path), plant.plant) for _ in range(2)]
    report = compare(pair[0], pair[1], [window()])
    assert report.equal and report.diagnosis.findings == ()


@pytest.mark.parametrize(
    ("name", "first"),
    [
        ("layers.1.self_attn.o_proj.weight", "layer 1 attention"),
        ("layers.0.self_attn.q_b_proj.weight", "layer 0 q"),
        ("layers.1.mlp.gate.weight", "layer 1 router_scores"),
        ("layers.1.mlp.shared_experts.up_proj.weight", "layer 1 shared"),
        ("layers.1.mlp.experts.{used}.down_proj.weight", "layer 1 routed"),
        ("layers.1.self_attn.kv_b_proj.weight", "layer 1 v"),
        ("mtp.1.eh_proj.weight", "mtp 1 joined"),
        ("lm_head.weight", "output logits"),
    ],
)
def test_a_perturbation_is_located_and_no_known_mistake(
    name: str, first: str, folders: Folders
) -> None:
    a, b = own_side(folders(None)), own_side(folders(None))
    used = int(a.trace(window()).selected_experts()[Block("layer", 1)][0, 0])
    weight = b.model.get_parameter(name.format(used=used))
    weight.add_(0.1 * weight.std() * torch.randn(weight.shape))
    report = compare(a, b, [window()])
    assert str(report.first) == first
    assert report.diagnosis.findings == () and report.diagnosis.unexplained == ()
    assert "no known mistake; checked in A and B" in diagnosis_lines(as_dict(report))[0]


def test_noise_in_a_step_is_no_known_mistake(folders: Folders) -> None:
    """A gate that follows no rule is said to follow none."""
    from lowlat.model import moe
    from lowlat.ops import routing

    def noisy(x, gate, bias, settings):
        return routing.route(x + 0.05 * torch.randn_like(x), gate, bias, settings)

    path = folders(None)
    bad = Planted(lambda: own_side(path), lambda patch: patch.setattr(moe, "route", noisy))
    report = compare(own_side(path), bad, [window()])
    assert report.diagnosis.findings == ()
    assert {side for side, _ in report.diagnosis.unexplained} == {"B"}
    said = diagnosis_lines(as_dict(report))
    assert said[-1].startswith("unexplained: B at layer 1 routing_weights matches neither")


def test_experts_by_no_rule_are_not_explained_by_other_experts(
    folders: Folders,
) -> None:
    """Imposed experts take the place of what is wrong, so that all else being equal proves nothing
    about the gate.
    """
    from lowlat.model import moe
    from lowlat.ops import routing

    torch.manual_seed(0)

    def noisy(x, gate, bias, settings):
        chosen = routing.route(x + 0.3 * torch.randn_like(x), gate, bias, settings).experts
        scores = routing.route(x, gate, bias, settings).scores
        return routing.Routing(chosen, routing_weights(scores.gather(1, chosen), settings), scores)

    path = folders(None)
    bad = Planted(lambda: own_side(path), lambda patch: patch.setattr(moe, "route", noisy))
    report = compare(own_side(path), bad, [window()])
    assert (
        report.with_imposed is not None
        and report.with_imposed.first_beyond(report.tolerance) is None
    )
    said = diagnosis_lines(as_dict(report))
    assert not any(line.startswith("expert selection:") for line in said)
    assert said[-1].startswith("unexplained: B at layer 1 routing_weights matches neither")
