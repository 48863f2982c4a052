"""A whole run on a small random checkpoint: lowlat's real worker next to fake peers."""

import math
import sys
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest

from lowlat.bench import agreement, run
from lowlat.bench.agreement import (
    OWN_TOKENS,
    Agreement,
    relative_error,
    require_near,
    top_difference,
)
from lowlat.bench.benchmark_plan import make_plan
from lowlat.bench.session import MODULES
from lowlat.convert.run import convert
from lowlat.utils.errors import UserError
from lowlat.utils.progress import SilentProgress

from .benchmarks import random_checkpoint
from .test_measure import Scripted


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    random_checkpoint().write("tiny", folder, seed=0)
    return folder


@pytest.fixture
def fakes_only(fake_path: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every peer is the fake program; the machine is measured by a fake too."""
    monkeypatch.setitem(MODULES, "transformers", "fake_worker")
    monkeypatch.setitem(MODULES, "calibration", "fake_calibration")


def test_lowlat_alone_from_plan_to_report(fakes_only: None, checkpoint: Path) -> None:
    plan = make_plan(prefill="20", decode="9,600", dtype="bf16", threads=1, rounds=2)
    report = run.bench(str(checkpoint), plan, SilentProgress())
    assert [(r["kind"], r["tokens"], len(r["samples"])) for r in report["rows"]] == [
        ("prefill", 20, 2),
        ("decode", 9, 2),
        ("decode", 600, 2),
    ]
    assert all(0 < row["share_of_roofline"] < 1 for row in report["rows"])
    assert report["model"]["cache_bytes_per_token"] == 3 * (64 + 32) * 2
    assert 0 < report["programs"]["lowlat"]["error_against_fp32"] < 0.1
    assert len(report["start_to_first_token"]["lowlat"]["samples"]) == 2


@pytest.mark.slow
def test_fp8_blocks_are_made_of_a_plain_checkpoint_once(
    fakes_only: None, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOWLAT_CACHE", str(tmp_path))
    plan = make_plan(prefill="", decode="9", dtype="fp8", threads=1, rounds=1)
    report = run.bench(str(checkpoint), plan, SilentProgress())
    bf16_error = 0.03
    assert bf16_error < report["programs"]["lowlat"]["error_against_fp32"] < 0.4
    (made,) = tmp_path.glob("converted/bench-tiny-*/fp8/model.safetensors")
    before = made.stat().st_mtime_ns
    run.bench(str(made.parent), plan, SilentProgress())
    run.bench(str(checkpoint), plan, SilentProgress())
    assert [made.stat().st_mtime_ns] == [
        path.stat().st_mtime_ns for path in tmp_path.rglob("model.safetensors")
    ]
    assert made.stat().st_mtime_ns == before


@pytest.mark.parametrize(("error", "is_near"), [(0.19, True), (0.21, False), (math.nan, False)])
def test_what_is_timed_must_be_near(error: float, is_near: bool) -> None:
    with nullcontext() if is_near else pytest.raises(UserError, match="in bf16 differ from fp32"):
        require_near(error, "bf16", "bf16")


@pytest.mark.parametrize(
    ("dtype", "cache", "error", "told"),
    [
        ("fp32", "fp32", 2e-4, r"2\.0e-04 of their size, more than 0\.0001; .* --cache auto"),
        ("fp32", "int8", 0.5, r"5\.0e-01 of their size, more than 0\.4; .* --cache auto"),
        ("bf16", "int8", 0.5, r"cache in int8 differ .* LOWLAT_ISA=none"),
    ],
)
def test_what_is_timed_is_as_near_as_its_cache_leaves_it(
    dtype: str, cache: str, error: float, told: str
) -> None:
    """Regression: an int8 cache held to what fp32 rounds."""
    with pytest.raises(UserError, match=told):
        require_near(error, dtype, cache)
    require_near(error * 0.4, dtype, cache)


def test_programs_that_disagree_are_not_timed(fakes_only: None, checkpoint: Path) -> None:
    plan = make_plan(prefill="20", decode="", peers=f"transformers={sys.executable}", threads=1)
    with pytest.raises(UserError, match="transformers and lowlat disagree in fp32"):
        run.bench(str(checkpoint), plan, SilentProgress())


def test_packed_weights_are_not_called_bf16(checkpoint: Path, tmp_path: Path) -> None:
    """Regression: a report and a roofline of bf16 weights where int4 ones were timed."""
    convert(checkpoint, tmp_path / "int4", dtype="int4")
    for dtype in ("bf16", "int8", "fp8"):
        plan = make_plan(prefill="", decode="9", dtype=dtype, threads=1)
        with pytest.raises(UserError, match=rf"--dtype {dtype}: the weights are int4 and stay so"):
            run.bench(str(tmp_path / "int4"), plan, SilentProgress())


def test_gguf_blocks_are_timed_as_stored(
    fakes_only: None, checkpoint: Path, tmp_path: Path
) -> None:
    file = tmp_path / "tiny.gguf"
    convert(checkpoint, file, dtype="int4")
    plan = make_plan(prefill="", decode="9", threads=1, rounds=1)
    report = run.bench(str(file), plan, SilentProgress())
    assert report["plan"]["dtype"] == "stored"
    assert 0 < report["programs"]["lowlat"]["error_against_fp32"] < 0.1
    for dtype in ("bf16", "int8"):
        with pytest.raises(UserError, match=f"--dtype {dtype}: the weights are quantized"):
            run.bench(str(file), make_plan(decode="9", dtype=dtype, threads=1), SilentProgress())


def test_a_link_to_a_gguf_file_is_followed(
    fakes_only: None, checkpoint: Path, tmp_path: Path
) -> None:
    """Regression: hub files are links to names without a suffix, which were opened instead."""
    blob, link = tmp_path / "blobs" / "0a1b", tmp_path / "tiny.gguf"
    blob.parent.mkdir()
    convert(checkpoint, tmp_path / "made.gguf", dtype="int4")
    (tmp_path / "made.gguf").rename(blob)
    link.symlink_to(blob)
    plan = make_plan(prefill="", decode="9", threads=1, rounds=1)
    assert run.bench(str(link), plan, SilentProgress())["rows"][0]["samples"]


def test_peers_that_cannot_load_the_file_are_not_measured(
    fakes_only: None, checkpoint: Path, tmp_path: Path
) -> None:
    file = tmp_path / "tiny.gguf"
    convert(checkpoint, file, dtype="int4")
    plan = make_plan(prefill="", decode="9", peers=f"transformers={sys.executable}", threads=1)
    with pytest.raises(UserError, match=r"loads folders, not \.gguf files.*leave it out"):
        run.bench(str(file), plan, SilentProgress())


def test_contexts_beyond_the_model_are_refused_at_once(checkpoint: Path) -> None:
    plan = make_plan(prefill="", decode="16385", threads=1)
    with pytest.raises(UserError, match=r"16,385 tokens exceed .* of 16,384"):
        run.bench(str(checkpoint), plan, SilentProgress())


def test_relative_error_is_of_root_mean_squares() -> None:
    expected = np.array([[3.0, 4.0]], np.float32)
    assert relative_error(expected * 1.1, expected) == pytest.approx(0.1, rel=1e-5)


def test_longer_prompts_are_checked_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Regression: kernels that only prompts of some length use, never compared."""
    logits = np.ones((OWN_TOKENS[-1], 4), np.float32)
    agreed = Agreement(ids=list(range(OWN_TOKENS[-1])), reference=logits, differences={})
    worker = Scripted("lowlat", [], [])
    for wrong in OWN_TOKENS[1:]:
        monkeypatch.setattr(
            agreement,
            "logits_of",
            lambda _, ids, wrong=wrong: logits[: len(ids)] * (1.5 if len(ids) == wrong else 1),
        )
        assert agreed.error(worker) == 0
        assert agreed.error(worker, OWN_TOKENS) == pytest.approx(0.5)


@pytest.mark.parametrize(("shift", "agrees"), [(0.05, True), (0.2, False)])
def test_top_log_probabilities_are_compared_in_nats(
    monkeypatch: pytest.MonkeyPatch, shift: float, agrees: bool
) -> None:
    logits = np.log(np.array([[0.5, 0.5], [0.9, 0.1]], np.float32))
    agreed = Agreement(ids=[0, 1], reference=logits, differences={})
    worker = Scripted("vllm", [], [])
    answer = {"logprobs": {"0": float(np.log(0.9)) - shift}}
    monkeypatch.setattr(worker, "ask", lambda op, **_: answer)
    if agrees:
        assert top_difference(worker, agreed) == pytest.approx(shift, abs=1e-6)
    else:
        with pytest.raises(UserError, match="vllm and lowlat disagree"):
            top_difference(worker, agreed)
