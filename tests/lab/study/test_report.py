"""Whole studies at a tiny size: report, table, picture and page of each kind."""

import json
from pathlib import Path

import pytest
from lowlat_lab.study import attention, balance, mtp, precision
from lowlat_lab.study.page import generated_text, write_page
from lowlat_lab.study.plan import StudyPlan
from lowlat_lab.study.sizes import StudySize
from lowlat_lab.study.table import show
from rich.console import Console

from lowlat.data.dataset import TokenizedDataset
from lowlat.utils.errors import UserError
from lowlat.utils.progress import SilentProgress

KINDS = {
    "attention": (attention.study, lambda size, data: attention.attention_variants(size, 263)[::4]),
    "balance": (balance.study, lambda size, data: balance.balance_variants(size)[::3]),
    "mtp": (mtp.study, lambda size, data: mtp.mtp_variants(size)),
    "precision": (precision.study, lambda size, data: precision.precision_variants(size)),
}
SAID = {
    "attention": ["| MHA | ", "| MLA | ", "29 tokens"],
    "balance": ["MaxVio", "| nothing | "],
    "mtp": ["draft acceptance", "| with MTP | "],
    "precision": ["| FP8 | ", "precision by variant"],
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_study_becomes_a_page(
    kind: str,
    size: StudySize,
    data: TokenizedDataset,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("matplotlib")
    study, variants = KINDS[kind]
    plan = StudyPlan(
        kind=kind, data=data.path, size=size, steps=3, variants=variants(size, data), seeds=(1, 2)
    )
    report = study(plan, data, tmp_path / "runs", SilentProgress(), "lowlat study ...")
    assert report["failures"] == []
    written = write_page(report, tmp_path / "results" / f"{kind}.md")
    assert [path.suffix for path in written] == [".md", ".svg", ".json"]
    text = written[0].read_text()
    assert all(part in text for part in SAID[kind]), text
    assert str(tmp_path) not in text
    kept = json.loads(written[2].read_text())
    assert (
        kept == json.loads(json.dumps(report))
        and generated_text(kept, f"{kind}.svg", f"{kind}.json") in text
    )
    show(report, Console(width=80))
    printed = capsys.readouterr().out
    assert all(variant["label"] in printed for variant in report["variants"])


@pytest.mark.slow
def test_failed_arms_are_reported(size: StudySize, data: TokenizedDataset, tmp_path: Path) -> None:
    """Regression: a report that breaks, or keeps quiet, where an variant has no run."""
    pytest.importorskip("matplotlib")
    variants = attention.attention_variants(size, data.vocab_size)[:5:4]
    broken = tmp_path / "runs" / "mla" / "seed-1"
    broken.mkdir(parents=True)
    (broken / "other").write_text("no run")
    plan = StudyPlan(
        kind="attention", data=data.path, size=size, steps=2, variants=variants, seeds=(1,)
    )
    report = attention.study(plan, data, tmp_path / "runs", SilentProgress(), "lowlat")
    assert [failure["variant"] for failure in report["failures"]] == ["mla"]
    text = write_page(report, tmp_path / "page.md")[0].read_text()
    assert "- mla, seed 1: failed: " in text and "| MLA | " in text and "failed |" in text


@pytest.mark.parametrize("kind", KINDS)
def test_the_pages_of_the_documentation_are_current(kind: str) -> None:
    """Written again by `lowlat-lab page study`; each difference of losses is in one table only."""
    results = Path(__file__).parents[3] / "docs" / "results"
    report = json.loads((results / f"{kind}.json").read_text(encoding="utf-8"))
    text = generated_text(report, f"{kind}.svg", f"{kind}.json")
    assert text in (results / f"{kind}.md").read_text(encoding="utf-8")
    assert ("| GQA-2 | MQA | " in text) == ("Further differences" in text) == (kind == "attention")
    assert "| MLA | MHA | " not in text


def test_pages_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"page\.md: cannot be written"):
        write_page({"variants": [], "study": "mtp"}, tmp_path / "file" / "page.md")


@pytest.mark.slow
def test_text_around_the_generated_part_stays(
    size: StudySize, data: TokenizedDataset, tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    variants = mtp.mtp_variants(size)
    plan = StudyPlan(kind="mtp", data=data.path, size=size, steps=2, variants=variants, seeds=(1,))
    report = mtp.study(plan, data, tmp_path / "runs", SilentProgress(), "lowlat-lab study ...")
    page = tmp_path / "mtp.md"
    write_page(report, page)
    generated = page.read_text().partition("\n\n")[2]
    page.write_text(f"# Title\n\nBy hand.\n\n{generated}\nLimits.\n")
    write_page(report, page)
    assert page.read_text() == f"# Title\n\nBy hand.\n\n{generated}\nLimits.\n"
