"""Pairs that compute the same are equal, in every implementation, form and layout; data types
differ by their rounding, and by other experts where it decides.
"""

from pathlib import Path

import pytest
import torch

from lowlat.compare.differences import TOLERANCE
from lowlat.compare.implementations.lowlat_native import LowlatNative
from lowlat.compare.implementations.lowlat_pytorch import LowlatPyTorch
from lowlat.compare.implementations.open import open_implementation
from lowlat.compare.implementations.spec import parse
from lowlat.compare.implementations.transformers import load_transformers
from lowlat.compare.result_json import as_dict
from lowlat.compare.result_text import diagnosis_lines, notes, routing_lines
from lowlat.compare.run import ComparisonResult, compare
from lowlat.compare.trace import LAYER_PARTS, ImposedChoices, Window
from lowlat.convert.run import convert
from lowlat.ops import native
from lowlat.utils.errors import UserError
from lowlat.utils.progress import SilentProgress
from tests.lowlat_configs import EVERY, random_model
from tests.parity.draw import Case, draw_case

from .models import START, VOCAB, llama_case, own_side, sparse_case, v3_case, window, write

FAMILIES = ["deepseek_v2-1", "deepseek_v3-0", "glm4_moe_lite-0", "mistral-0", "qwen2-1", "qwen3-0"]


@pytest.fixture(scope="module")
def v3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(v3_case(), tmp_path_factory.mktemp("v3"))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(llama_case(), tmp_path_factory.mktemp("llama"))


def drawn(name: str) -> Case:
    family, _, index = name.rpartition("-")
    return draw_case(family, int(index))


def layer_parts(report: ComparisonResult) -> set[str]:
    return {place.part for place in report.comparison.places() if place.block.stage == "layer"}


@pytest.mark.parametrize("family", ["deepseek_v32", "glm_moe_dsa"])
def test_sparse_attention_of_transformers_is_the_same(family: str, tmp_path: Path) -> None:
    """Regression: with attention that is watched, transformers computed all tokens."""
    path = write(sparse_case(family), tmp_path)
    own = own_side(path)
    theirs = load_transformers(path, own.config, label="theirs", dtype=torch.float32)
    report = compare(own, theirs, [window()])
    assert report.equal and report.diagnosis.findings == ()
    assert report.diagnosis.unexplained == () and "choice of tokens" in report.diagnosis.audited
    assert set(report.comparison.left_out) == {"index_scores"}
    (choice,) = {
        int(own.trace(window()).parts[place].sum(dim=1).max())
        for place in report.comparison.places()
        if place.part == "index_choice"
    }
    assert choice == 7


@pytest.mark.parametrize("name", FAMILIES)
def test_transformers_computes_the_same(name: str, tmp_path: Path) -> None:
    path = write(drawn(name), tmp_path)
    own = own_side(path)
    theirs = load_transformers(path, own.config, label="theirs", dtype=torch.float32)
    ids = torch.randint(own.config.vocab_size, (17,))
    report = compare(own, theirs, [Window(ids, 5)])
    assert report.equal and report.diagnosis.findings == () and report.with_imposed is None
    assert report.comparison.left_out == {}
    seen = set(LAYER_PARTS) - {"index_scores", "index_choice"}
    if own.config.moe is None:
        seen -= {"router_scores", "routing_weights", "routed", "shared"}
    if "kv_lora_rank" not in own.config.attention_of(0).__slots__:
        seen -= {"latent"}
    assert layer_parts(report) == seen
    assert as_dict(report)["config_differences"] == []


def test_theirs_in_bf16_rounds_and_makes_no_mistake(v3: Path) -> None:
    own = own_side(v3, "bf16")
    theirs = load_transformers(v3, own.config, label="theirs", dtype=torch.bfloat16)
    report = compare(own, theirs, [window()])
    assert report.tolerance == TOLERANCE["bf16"]
    assert report.diagnosis.findings == () and report.diagnosis.unexplained == ()


@pytest.mark.parametrize("name", EVERY)
def test_forms_of_attention_are_equal(name: str) -> None:
    """Every attention lowlat has, decoding form against prefill form."""
    model = random_model(EVERY[name], torch.float32)
    sides = [
        LowlatPyTorch(model, label=form, precision="fp32", form=form)
        for form in ("decode", "expanded")
    ]
    ids = torch.randint(model.config.vocab_size, (11,))
    report = compare(sides[0], sides[1], [Window(ids, 3)])
    assert report.equal and report.diagnosis.findings == ()
    assert {"q_rotated", "scores", "heads", "residual"} <= layer_parts(report)


def test_other_experts_by_rounding_are_distinguished(v3: Path) -> None:
    """int4 chooses other experts; with those of fp32 imposed it is closer, and no mistake."""
    report = compare(own_side(v3), own_side(v3, "int4"), [window()])
    assert report.with_imposed is not None and report.diagnosis.findings == ()
    free, with_imposed = (c.places()[-1] for c in (report.comparison, report.with_imposed))
    assert free == with_imposed
    assert (
        report.with_imposed.difference(with_imposed).relative
        < 0.9 * report.comparison.difference(free).relative
    )
    changed = {block: found.changed for block, found in report.with_imposed.routing.items()}
    assert set(changed.values()) == {0}
    said = routing_lines(as_dict(report))
    assert "other experts: first at" in said[0] and "with A's experts imposed on B" in said[1]


def test_experts_imposed_from_the_start(v3: Path) -> None:
    report = compare(own_side(v3), own_side(v3, "int4"), [window()], impose_experts=True)
    assert report.imposed and report.with_imposed is None
    assert all(found.changed == 0 for found in report.comparison.routing.values())


@pytest.mark.parametrize("implementation", ["lowlat", "transformers"])
def test_imposing_the_own_choice_changes_nothing(v3: Path, implementation: str) -> None:
    """Regression: factors of imposed experts computed by another rule than the gate's."""
    own = own_side(v3)
    side = own
    if implementation == "transformers":
        side = load_transformers(v3, own.config, label="theirs", dtype=torch.float32)
    free = side.trace(window())
    imposed = side.trace(window(), ImposedChoices(experts=free.selected_experts()))
    for place, value in free.parts.items():
        torch.testing.assert_close(imposed.parts[place], value, rtol=1e-5, atol=1e-6)


def test_exact_conversion_is_equal_where_there_are_counterparts(
    llama: Path, tmp_path: Path
) -> None:
    """GQA next to MLA: scores, heads and residuals agree; keys and latents have no counterpart."""
    convert(llama, tmp_path / "mla", to="mla")
    report = compare(own_side(llama), own_side(tmp_path / "mla"), [window()])
    assert report.equal
    assert {"scores", "heads", "attention", "residual", "mlp"} <= layer_parts(report)
    assert {"q", "k", "latent"} <= set(report.comparison.left_out)
    assert report.diagnosis.findings == ()
    said = notes(as_dict(report))
    assert any(line.startswith("not compared: latent (not seen in A)") for line in said)


@pytest.mark.skipif(not native.available(), reason="the native kernels are not built")
@pytest.mark.parametrize("dtype", ["bf16", "int8"])
def test_native_kernels_show_rows_and_logits(v3: Path, llama: Path, dtype: str) -> None:
    for path, rows in ((v3, {"latent", "k_rotated"}), (llama, {"k_rotated", "v"})):
        plain = own_side(path, dtype)
        kernels = LowlatNative(plain.model, label="native", precision=dtype)
        report = compare(plain, kernels, [window()])
        assert layer_parts(report) == rows
        first = [p for p in report.comparison.places() if p.block.number == 0]
        assert all(report.comparison.difference(place).relative < 0.01 for place in first[:2])
        logits = report.comparison.places()[-1]
        assert logits.part == "logits" and report.comparison.difference(logits).cosine > 0.9
        assert "a native step is one call" in notes(as_dict(report))[0]


def test_native_is_refused_where_it_does_not_run(v3: Path) -> None:
    with pytest.raises(UserError, match="native kernels are not built here or do not run"):
        open_implementation(parse(f"{v3}@native,auto"), SilentProgress())


def test_int8_cache_shows_in_the_rows_alone_at_first(v3: Path) -> None:
    report = compare(own_side(v3), own_side(v3, cache=torch.int8), [window()], tolerance=1e-4)
    assert str(report.first) == "layer 0 latent"
    clean = [p for p in report.comparison.places() if p.part in ("q", "k", "q_rotated")][:3]
    assert all(report.comparison.difference(place).relative < 1e-6 for place in clean)


def test_windows_add_up(v3: Path) -> None:
    """Two windows are measured as one: sums of squares, the larger maximum, all tokens."""
    a, b = own_side(v3), own_side(v3)
    b.model.get_parameter("layers.0.mlp.down_proj.weight").mul_(1.01)
    cuts = [window(), Window(torch.randint(VOCAB, (13,)), START)]
    both = compare(a, b, cuts)
    alone = [compare(a, b, [cut]) for cut in cuts]
    place = both.first
    assert place is not None and str(place) == "layer 0 mlp"
    parts = [report.comparison.sums[place] for report in alone]
    total = both.comparison.sums[place]
    assert total.error == pytest.approx(sum(part.error for part in parts))
    assert total.max_abs == max(part.max_abs for part in parts)
    assert both.comparison.predictions[max(both.comparison.predictions)].tokens > 30


def test_configs_that_disagree_are_named(v3: Path, tmp_path: Path) -> None:
    """Both sides do what their config says: each is judged by the other's."""
    import json
    import shutil

    shutil.copytree(v3, tmp_path / "edited")
    file = tmp_path / "edited" / "config.json"
    raw = json.loads(file.read_text())
    key = "rope_parameters" if "rope_parameters" in raw else "rope_scaling"
    raw[key]["mscale_all_dim"] = 0.0
    file.write_text(json.dumps(raw))
    report = compare(own_side(v3), own_side(tmp_path / "edited"), [window()])
    found = {(item.label, item.kind, item.judged_by) for item in report.diagnosis.findings}
    assert ("B", "yarn_softmax_scale", "A") in found
    said = diagnosis_lines(as_dict(report))
    assert len(said) == 1
    assert said[0].startswith("configs differ: rope.mscale_all_dim")
    assert "each follows its own: " in said[0] and "YaRN scale of the sof" in said[0]
    by_layout = json.loads(file.read_text()) | {"rope_interleave": False}
    file.write_text(json.dumps(by_layout))
    report = compare(own_side(v3), own_side(tmp_path / "edited"), [window()])
    assert "rope_layout" in {item.kind for item in report.diagnosis.findings}
