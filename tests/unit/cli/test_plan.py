"""`lowlat plan train`: the published layout as tables and JSON, searches, recipes, bad options."""

import json
import re
from collections import Counter
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from lowlat.cli.info import find
from lowlat.cli.plan import parse_memory, plan
from lowlat.cli.plan_view import amount, duration, show, show_dry_run
from lowlat.plan.estimate import estimate
from lowlat.plan.flops import token_flops
from lowlat.plan.published import DEEPSEEK_V3
from lowlat.plan.search import SearchResult, neighbours
from lowlat.train.cost.dry_run import dry_run
from lowlat.train.inputs.configs import recipe_config
from lowlat.train.recipe.schema import read_recipe
from lowlat.utils.errors import UserError

RECIPE = """
name = "small"
precision = "fp32"
[model]
model_type = "llama"
hidden_size = 64
intermediate_size = 96
num_hidden_layers = 2
num_attention_heads = 4
num_key_value_heads = 2
vocab_size = 263
max_position_embeddings = 128
rms_norm_eps = 1e-6
rope_theta = 100.0
[data]
folder = "tokens"
[[phase]]
name = "only"
steps = 3
sequence_length = 32
batch_size = 8
micro_batch_size = 2
learning_rate = 1e-3
"""


def test_json_of_the_published_layout(capsys: pytest.CaptureFixture[str]):
    plan("deepseek-v3", memory="80GB", as_json=True)
    answer = json.loads(capsys.readouterr().out)
    assert answer["estimate"]["layout"]["pipeline"] == 16
    assert answer["estimate"]["fits"] is True
    assert answer["estimate"]["mfu"] > 0.3
    assert answer["flops_per_token"]["training"] == pytest.approx(260.6e9, rel=0.001)
    assert {change["change"] for change in answer["changes"]} >= {"1f1b", "pipeline 8", "expert 32"}
    assert "search" not in answer


@pytest.mark.parametrize("size", ["3GB", "3.5", "9" * 400])
def test_memory_that_no_device_has(size: str):
    with pytest.raises(UserError, match=r"--memory '\d+"):
        plan("deepseek-v3", memory=size)


@pytest.mark.parametrize(
    ("table", "key"),
    [
        ("[lora]\nrank = 4\nalpha = 8.0\n", "lora"),
        ('[distillation]\nteacher = "x"\n', "distillation"),
    ],
)
def test_trainings_of_part_of_a_model_are_refused(tmp_path: Path, table: str, key: str):
    """Regression: figures of a training of all weights."""
    recipe = RECIPE.replace("[data]", f"{table}[data]")
    if key == "lora":
        recipe = re.sub(r"\[model\].*?(?=\[lora\])", "", recipe, flags=re.DOTALL)
        recipe = recipe.replace('precision = "fp32"', 'precision = "fp32"\nbase_model = "minnow"')
    path = tmp_path / "r.toml"
    path.write_text(recipe)
    with pytest.raises(UserError, match=rf"r\.toml: {key}: .*--dry-run"):
        plan(str(path))


def test_less_memory_is_reported(capsys: pytest.CaptureFixture[str]):
    plan("deepseek-v3", memory="64GB", as_json=True)
    assert json.loads(capsys.readouterr().out)["estimate"]["fits"] is False


def test_a_search_ranks(capsys: pytest.CaptureFixture[str]):
    plan("smollm2-135m", devices=2, top=3, as_json=True)
    answer = json.loads(capsys.readouterr().out)
    best = answer["search"]["best"]
    assert len(best) == 3
    assert answer["estimate"] == best[0]
    assert answer["search"]["tried"] > 3


def test_tables_fit_a_narrow_terminal():
    """A cell that does not fit ends in an ellipsis, and a number cut short is a wrong number."""
    config, job = find("deepseek-v3").config, DEEPSEEK_V3.job
    found = estimate(config, job, DEEPSEEK_V3.machine)
    out = StringIO()
    show(
        "deepseek-v3",
        found,
        token_flops(config, 4096, job.activation_checkpointing),
        neighbours(config, found),
        SearchResult(ranked=[found], tried=1, failed=Counter({"do not fit in memory": 5})),
        top=1,
        published_hours=180e3,
        console=Console(file=out, width=80),
    )
    text = out.getvalue()
    assert "…" not in text
    assert max(len(line) for line in text.splitlines()) <= 80
    for figure in ("260.65 G", "77.2", "14.12", "57.3%", "180,000", "this layout"):
        assert figure in text


def test_a_recipe_is_planned_and_run_dry(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "small.toml"
    path.write_text(RECIPE, encoding="utf-8")
    plan(str(path), changes=["phase.0.batch_size=16"], as_json=True)
    assert json.loads(capsys.readouterr().out)["estimate"]["micro_batches"] == 8
    recipe = read_recipe(path)
    found = dry_run(recipe_config(recipe, path, None), recipe, rate=1e11, memory_bytes=2**33)
    out = StringIO()
    show_dry_run("small", found, Console(file=out, width=80))
    assert "768" in out.getvalue()  # 3 steps of 8 rows of 32 tokens
    assert "…" not in out.getvalue()


CHANGES = {
    "none": "ZeRO-1",
    "no recomputation": "activation checkpointing none",
    "interleaved 1F1B": "interleaved",
    "1F1B": "1f1b",
    "ZB1P": "zb1p",
}
"""Rows of the table in docs/planning.md by another name than `neighbours` gives; others are PP8."""


@pytest.mark.slow
def test_the_documented_changes_are_those_of_today():
    """Every figure of the table of single changes."""
    config = find("deepseek-v3").config
    base = estimate(config, DEEPSEEK_V3.job, DEEPSEEK_V3.machine)
    around = {each.change: each.found for each in neighbours(config, base)}
    text = (Path(__file__).parents[3] / "docs" / "planning.md").read_text(encoding="utf-8")
    table = text[text.index("| change | step, s | GB | |") :].split("\n\n")[0]
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in table.splitlines()[2:]]
    checked = 0
    for name, seconds, memory, _ in rows:
        cells = zip(name.split(", "), seconds.split(", "), memory.split(", "), strict=True)
        for change, time, size in cells:
            found = around[CHANGES.get(change, re.sub(r"^(PP|EP|TP)", _spaced, change))]
            assert found is not None
            assert (f"{found.time.total:.2f}", f"{found.memory.total / 1e9:.1f}") == (time, size)
            checked += 1
    assert checked == 14


def _spaced(match: re.Match[str]) -> str:
    axes = {"PP": "pipeline", "EP": "expert", "TP": "tensor"}
    return f"{axes[match[0]]} "


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("parallel.tensor=3", "parallel.tensor 3 does not divide num_attention_heads 4"),
        ("parallel.expert=2", "parallel.expert 2 does not divide n_routed_experts 0"),
        ("parallel.context=3", "sequence_length 32 is not a multiple of 6, twice parallel.context"),
        ("parallel.pipeline=5", "parallel.pipeline 5: 1f1b makes 5 stages of num_hidden_layers 2"),
    ],
)
def test_faults_of_recipes_name_file_and_key(tmp_path: Path, change: str, message: str):
    """Regression: the planner's own words, which are no keys of recipes."""
    path = tmp_path / "small.toml"
    path.write_text(RECIPE, encoding="utf-8")
    changes = [change, "phase.0.sequence_length=32"]
    with pytest.raises(UserError, match=f"^{re.escape(str(path))}: .*{message}"):
        plan(str(path), changes=changes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "deepseek-v2"}, "'deepseek-v2' has no layout; give --devices"),
        ({"name": "deepseek-v3", "memory": "much"}, "--memory 'much': write a size"),
        ({"name": "deepseek-v3", "machine": "abacus"}, "--machine 'abacus' is unknown"),
        ({"name": "deepseek-v3", "network": 0.0}, "--network 0.0: give gigabytes"),
        ({"name": "deepseek-v3", "top": 3}, "--top needs --devices"),
        ({"name": "deepseek-v3", "changes": ["a=1"]}, "--set changes recipes"),
        ({"name": "deepseek-v3.2"}, r"'deepseek-v3\.2' has sparse attention"),
    ],
)
def test_faults_are_one_line(options: dict[str, object], message: str):
    with pytest.raises(UserError, match=message):
        plan(**options)  # pyright: ignore[reportArgumentType]


def test_sizes_and_times_are_read_and_written():
    assert parse_memory("80GB") == parse_memory("80 GiB") == parse_memory("80") == 80 * 2**30
    assert [amount(value) for value in (12, 250.46e9, 3.7e24)] == ["12 ", "250.46 G", "3700.00 Z"]
    assert [duration(s) for s in (9, 720, 12240, 181440)] == ["9 s", "12 min", "3.4 h", "2.1 days"]
