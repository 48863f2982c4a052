"""`lowlat plan serve`: tables, JSON, measured loads of experts, and errors in one line."""

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from typer.testing import CliRunner

from lowlat.cli.main import app
from lowlat.ops import native
from lowlat.utils.errors import UserError

V3 = ("plan", "serve", "deepseek-v3", "--machine", "4xepyc-9654", "--context", "8192")


def run(*arguments: str) -> str:
    """Standard output of a command. Raises its exception."""
    result = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0
    return result.stdout


def answer(*arguments: str) -> dict[str, Any]:
    return json.loads(run(*arguments, "--json"))


def test_layouts_are_ranked():
    found = answer(*V3, "--users", "16")
    best, *others = found["layouts"]
    assert best["tokens_per_second"] == pytest.approx(16 * best["tokens_per_second_per_user"])
    assert best["tokens_per_second"] >= 0.98 * max(each["tokens_per_second"] for each in others)
    assert best["memory"]["total"] < 768 * 2**30
    assert found["weights"] == {"dtype": "fp8", "bytes": pytest.approx(685e9, rel=0.01)}
    assert found["machine"] == {"name": "epyc-9654", "devices": 8}


def test_machine_and_context_are_required():
    for arguments, option in (
        (("--context", "9"), "--machine"),
        (("--machine", "h100"), "--context"),
    ):
        result = CliRunner().invoke(app, ["plan", "serve", "deepseek-v3", *arguments])
        assert result.exit_code == 2
        assert option in result.output


def test_tables_fit_a_narrow_terminal():
    text = run(*V3, "--users", "16")
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= 80
    for word in ("tensor=2,pipeline=2", "KV cache", "limit: weight bandwidth", "Assumed:"):
        assert word in text


def test_what_does_not_fit_is_named_with_what_is_missing():
    arguments = ("plan", "serve", "deepseek-v3", "--machine", "8xh100", "--context", "1")
    found = answer(*arguments)
    assert found["layouts"] == []
    assert found["too_large"][0]["missing_bytes"] > 1e9
    text = run(*arguments)
    assert "Does not fit" in text and "weights" in text


def test_one_layout():
    (found,) = answer(*V3, "--parallel", "pipeline=2,expert=4")["layouts"]
    assert found["layout"] == {"pipeline": 2, "tensor": 1, "expert": 4, "prefill": 0}
    assert found["replicas"] == 1


def test_dtypes_and_network():
    eight = (*V3, "--parallel", "tensor=8")
    quantized = answer(*eight, "--dtype", "q4_k")
    assert quantized["weights"]["bytes"] == pytest.approx(684.5e9 * 4.5 / 8, rel=0.01)
    fast, slow = (
        answer(*eight, "--network", network, "--latency", latency)["layouts"][0]
        for network, latency in (("100", "1"), ("1", "100"))
    )
    assert fast["tokens_per_second"] > 2 * slow["tokens_per_second"]


def test_measured_loads_and_redundant_experts(tmp_path: Path):
    loads = {"1": [256 - expert for expert in range(256)], "2": [1] * 256}
    file = tmp_path / "loads.json"
    file.write_text(json.dumps({"loads": loads}))
    arguments = (*V3, "--users", "64", "--parallel", "expert=8", "--expert-loads", str(file))
    measured = answer(*arguments)["layouts"][0]
    placed = answer(*arguments, "--redundant-experts", "32")
    placed = placed["layouts"][0]
    assert measured["expert_balance"]["in_order"] > 1.2 > placed["expert_balance"]["placed"]
    assert placed["tokens_per_second"] > measured["tokens_per_second"]
    assert placed["memory"]["total"] > measured["memory"]["total"]
    assert "placed by load (EPLB)" in run(*arguments)


def test_replicas_that_do_not_divide(tmp_path: Path):
    """A layout of one's own is refused with what would divide; of all layouts, those left out are
    counted."""
    file = tmp_path / "loads.json"
    file.write_text(json.dumps({"loads": {"1": [1] * 256}}))
    arguments = (*V3, "--expert-loads", str(file), "--redundant-experts", "3")
    with pytest.raises(UserError) as error:
        run(*arguments, "--parallel", "expert=8")
    assert str(error.value) == (
        "--redundant-experts 3: the 8 ranks of a stage of --parallel expert=8 do not divide 256 "
        "experts and 3 replicas; give 8"
    )
    found = answer(*arguments, "--top", "1000")
    every = answer(*V3, "--top", "1000")
    kept, all_layouts = (len(each["layouts"] + each["too_large"]) for each in (found, every))
    assert found["left_out"] == all_layouts - kept > 0 == every["left_out"]
    text = " ".join(run(*arguments).split())
    number = found["left_out"]
    assert f"Left out: {number} layouts whose ranks do not divide 256 experts and 3" in text


@pytest.mark.parametrize(
    "arguments",
    [
        ("--parallel", "tensor=3"),
        ("--parallel", "tensor=128"),
        ("--network", "0"),
        ("--context", "10000000"),
    ],
)
def test_faults_are_found_before_this_machine_is_measured(
    arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
):
    # without measure_here, which would be imported
    monkeypatch.setitem(sys.modules, "lowlat.bench.here", ModuleType("here"))
    here = ("plan", "serve", "deepseek-v3", "--machine", "here", "--context", "512")
    with pytest.raises(UserError, match=f"^{arguments[0]} "):
        run(*here, *arguments)


def test_a_topology_file_is_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    nodes = tmp_path / "nodes"
    nodes.write_text("0,0,0\n1,1,1\n")
    monkeypatch.setenv("LOWLAT_TOPOLOGY", str(nodes))
    here = ("plan", "serve", "deepseek-v3", "--machine", "here", "--context", "512")
    with pytest.raises(UserError, match="needs 4 devices, but 1 x here has 2"):
        run(*here, "--parallel", "tensor=4")


def test_one_user_is_one():
    text = run(*V3)
    assert "1 user with" in text and "users with" not in text


@pytest.mark.parametrize(
    "dtype",
    [
        "fp32",
        pytest.param("bf16", marks=pytest.mark.skipif(not native.available(), reason="no kernels")),
    ],
)
def test_loads_of_a_real_model(tmp_path: Path, dtype: str):
    """minnow's routing of a text, counted by PyTorch or the kernels: every token of a layer uses
    its experts."""
    text, file = tmp_path / "text.txt", tmp_path / "loads.json"
    text.write_text("The house stood at the end of a long road. There was nobody in the garden.")
    arguments = ("eval", "minnow", "--text", str(text), "--expert-loads", str(file))
    report = answer(*arguments, "--dtype", dtype)
    loads = json.loads(file.read_text())["loads"]
    sums = {sum(counts) for counts in loads.values()}
    assert len(sums) == 1
    assert sums.pop() % (report["tokens"] + 1) == 0
    planned = answer(
        *("plan", "serve", "minnow", "--machine", "epyc-9654", "--context", "512"),
        *("--parallel", "expert=2", "--expert-loads", str(file)),
    )
    assert planned["layouts"][0]["expert_balance"]["in_order"] > 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--machine", "abacus"), "--machine 'abacus' is unknown; choose one of"),
        (("--machine", "0xh100"), "--machine '0xh100': give 1 to 4096"),
        (("--context", "0"), "--context 0: give a number from 1"),
        (("--users", "0"), "--users 0: give a number from 1"),
        (("--prompt", "-1"), "--prompt -1: give a number from 1"),
        (("--context", "10000000"), "--context 10,000,000: the model's max_position_embeddings"),
        (("--parallel", "tensor=3"), "tensor=3: must divide the 128 attention heads"),
        (("--parallel", "tensor=16"), "needs 16 devices, but 4 x epyc-9654 has 8"),
        (("--parallel", "prefill=1"), "the plan is of one group of processes; leave out prefill"),
        (("--dtype", "q9"), "--dtype 'q9' is unknown"),
        (("--cache", "fp4"), "--cache 'fp4' is unknown"),
        (("--network", "0"), "--network 0: give a number above 0, up to 1,000,000"),
        (("--network", "1e9"), "--network 1e+09: give a number above 0, up to 1,000,000"),
        (("--redundant-experts", "4"), "--redundant-experts needs --expert-loads FILE"),
        (("--expert-loads", "nowhere"), "--expert-loads nowhere: cannot be read"),
    ],
)
def test_faults_are_one_line(arguments: tuple[str, ...], message: str):
    with pytest.raises(UserError) as error:
        run(*V3, *arguments)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "must hold a JSON object"),
        ("{}", "has no loads"),
        pytest.param(
            f'{{"loads": {{"3": {[10**400] + [0] * 255}}}}}',
            r"experts, from 0 to 2\^53",
            id="huge count",
        ),
        ('{"loads": {"3": [1, 2]}}', "loads.3: must be a count for each of the model's 256"),
    ],
)
def test_faults_of_loads_name_the_file(tmp_path: Path, text: str, message: str):
    file = tmp_path / "loads.json"
    file.write_text(text)
    with pytest.raises(UserError, match=message):
        run(*V3, "--expert-loads", str(file))
