"""Whole studies at a tiny size: report, table, picture and page of each kind."""

import json
from pathlib import Path

import pytest
from lowlat_lab.study import attention, balance, mtp, precision
from lowlat_lab.study.page import page_text, write_page
from lowlat_lab.study.plan import Plan
from lowlat_lab.study.sizes import Size
from lowlat_lab.study.table import show
from rich.console import Console

from lowlat.data.dataset import TokenizedDataset
from lowlat.utils.errors import UserError
from lowlat.utils.progress import SilentProgress

KINDS = {
    "attention": (attention.study, lambda size, data: attention.attention_arms(size, 263)[::4]),
    "balance": (balance.study, lambda size, data: balance.balance_arms(size)[::3]),
    "mtp": (mtp.study, lambda size, data: mtp.mtp_arms(size)),
    "precision": (precision.study, lambda size, data: precision.precision_arms(size)),
}
SAID = {
    "attention": ["## Is anything better than MLA?", "- MLA >= MHA: **", "| MHA | ", "29 tokens"],
    "balance": ["MaxVio", "*nothing* and *bias*"],
    "mtp": ["the module's draft is the token", "| with MTP | "],
    "precision": ["0.25 % of bf16's training loss", "| FP8 | ", "products as the arm says"],
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_study_becomes_a_page(
    kind: str,
    size: Size,
    data: TokenizedDataset,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("matplotlib")
    study, arms = KINDS[kind]
    plan = Plan(kind=kind, data=data.path, size=size, steps=3, arms=arms(size, data), seeds=(1, 2))
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
        and page_text(kept, f"{kind}.svg", f"{kind}.json") == text
    )
    show(report, Console(width=80))
    printed = capsys.readouterr().out
    assert all(arm["label"] in printed for arm in report["arms"])


def test_failed_arms_are_told(size: Size, data: TokenizedDataset, tmp_path: Path) -> None:
    """Holds shut: a report that breaks, or keeps quiet, where an arm has no run."""
    pytest.importorskip("matplotlib")
    arms = attention.attention_arms(size, data.vocab_size)[:5:4]
    broken = tmp_path / "runs" / "mla" / "seed-1"
    broken.mkdir(parents=True)
    (broken / "other").write_text("no run")
    plan = Plan(kind="attention", data=data.path, size=size, steps=2, arms=arms, seeds=(1,))
    report = attention.study(plan, data, tmp_path / "runs", SilentProgress(), "lowlat")
    assert [failure["arm"] for failure in report["failures"]] == ["mla"]
    text = write_page(report, tmp_path / "page.md")[0].read_text()
    assert "- mla, seed 1: failed: " in text and "| MLA | " in text and "failed |" in text


def test_pages_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"page\.md: cannot be written"):
        write_page({"arms": [], "study": "mtp"}, tmp_path / "file" / "page.md")
