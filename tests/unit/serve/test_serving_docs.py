"""docs/http-api.md and deploy/grafana match the code: fields, limits, metrics."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from lowlat.engine import params
from lowlat.engine.scheduler import MAX_SEQUENCES
from lowlat.generate import grammar_worker, structured
from lowlat.generate.params import MAX_STOP_LENGTH, MAX_STOPS
from lowlat.serve.config import ServeConfig
from lowlat.serve.http import incoming
from lowlat.serve.protocol import limits
from lowlat.serve.protocol.base import StrictModel
from lowlat.serve.protocol.chat import ChatRequest
from lowlat.serve.protocol.completions import CompletionRequest
from lowlat.serve.protocol.hints import Ignored
from lowlat.serve.routes.operations import GETS, POSTS
from lowlat.serve.routes.responses_request import ResponsesRequest

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs/http-api.md").read_text()
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "seed", "n", "stop", "logit_bias")
SAMPLING += ("presence_penalty", "frequency_penalty", "repetition_penalty", "ignore_eos")
SAMPLING += ("min_tokens", "stop_token_ids", "allowed_token_ids", "bad_words")


def section(title: str) -> str:
    return PAGE.split(f"\n## {title}\n")[1].split("\n## ")[0]


def rows(text: str) -> list[list[str]]:
    """Cells of all tables in `text`, heads and rules left out."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    rules = {place for place, row in enumerate(cells) if set(row[0]) <= {"-"} and row[0]}
    return [row for place, row in enumerate(cells) if not {place, place + 1} & rules]


def words(cell: str) -> set[str]:
    return set(re.findall(r"`([^`]+)`", cell))


@pytest.mark.parametrize(
    ("column", "kind"), [(1, ChatRequest), (2, CompletionRequest), (3, ResponsesRequest)]
)
def test_every_field_is_described_and_refused_ones_are_none(
    column: int, kind: type[StrictModel]
) -> None:
    table = [row for row in rows(section("Fields")) if len(row) == 4]
    taken, refused = set[str](), set[str]()
    for row in table:
        cell = row[column]
        if cell == "the same" or cell.startswith("the same;"):
            cell = f"{row[1]} {cell}"
        found = {word.split(".")[0] for word in words(cell)}
        (refused if row[0].startswith("rejected") else taken).update(found)
    fields = set(kind.model_fields) - {"model"}
    assert fields <= taken, fields - taken
    assert taken <= fields, taken - fields
    assert not refused & set(kind.model_fields)
    assert refused <= kind.UNSUPPORTED


@pytest.mark.parametrize(
    ("column", "kind"), [(1, ChatRequest), (2, CompletionRequest), (3, ResponsesRequest)]
)
def test_every_hint_is_in_the_row_of_hints(column: int, kind: type[StrictModel]) -> None:
    (row,) = [row for row in rows(section("Fields")) if row[0] == "ignored hints"]
    always = {
        name
        for name, field in kind.model_fields.items()
        for mark in field.metadata
        if isinstance(mark, Ignored) and mark.when is None
    }
    assert words(row[1 if row[column] == "the same" else column]) == always


def all_kinds(kind: type[StrictModel]) -> Iterator[type[StrictModel]]:
    for each in kind.__subclasses__():
        if each.__module__.startswith("lowlat."):
            yield each
        yield from all_kinds(each)


SECTIONS = {
    "anthropic_request": "Anthropic's Messages API",
    "ollama_request": "Ollama's API",
    "embeddings": "Embeddings",
}
"""Section that describes the objects of a module; of others it is Fields or Responses API."""


def test_hints_of_all_objects_are_described() -> None:
    hints = {
        (SECTIONS.get(kind.__module__.rpartition(".")[2], "Fields"), mark.label or name)
        for kind in all_kinds(StrictModel)
        for name, field in kind.model_fields.items()
        if name in kind.__annotations__
        for mark in field.metadata
        if isinstance(mark, Ignored)
    }
    assert len(hints) > 50 and {title for title, _ in hints} == {*SECTIONS.values(), "Fields"}
    texts = {title: section(title) for title in SECTIONS.values()}
    texts["Fields"] = section("Fields") + section("Responses API")
    missing = [hint for hint in hints if not re.search(rf"[`.]{hint[1]}`", texts[hint[0]])]
    assert not missing


def test_the_sampling_row_names_all_options() -> None:
    (row,) = [row for row in rows(section("Fields")) if row[0] == "sampling"]
    assert words(row[1]) == set(SAMPLING)


def test_every_path_is_described() -> None:
    described = section("Operations").replace("POST ", "").replace("GET ", "")
    for operation in (*POSTS, *GETS):
        assert f"`{operation.path}`" in described


def test_limits_are_those_of_the_code() -> None:
    table = {row[0]: row[1] for row in rows(section("Limits"))}
    config = ServeConfig()
    kib = 2**10
    expected = {
        "body; line and headers": f"{config.max_body_bytes // 2**20} MiB; "
        f"{limits.MAX_HEADER_BYTES // kib} KiB",
        "open connections; idle ones make way": (
            f"{config.max_connections:,}, or less by the limit on open files"
        ),
        f"bodies that take over {incoming.GRACE_SECONDS:g} s: in total; "
        "per API key and per address": (
            f"{config.max_slow_bodies}; {config.max_slow_bodies // 4}. Above, the slowest get 408"
        ),
        "JSON values per body, keys included, token ids excluded": f"{limits.MAX_JSON_VALUES:,}",
        "keys per JSON object": f"{limits.MAX_JSON_KEYS:,}",
        "time for headers; for the body": f"{config.header_seconds:g} s; {config.body_seconds:g} s",
        "JSON nesting, also in arguments of past calls": f"{limits.MAX_JSON_DEPTH}",
        "open requests, streams included": f"{config.max_requests:,}",
        "requests waiting for their first step": "`--max-queue`",
        "completions in a batch": f"{MAX_SEQUENCES}",
        "messages; parts per message": f"{limits.MAX_MESSAGES:,}; {limits.MAX_CONTENT_PARTS}",
        "texts of an embeddings request": f"{limits.MAX_EMBEDDING_INPUTS:,}",
        "prompts times `n`; `n`": f"{limits.MAX_PROMPTS}; {params.MAX_N}",
        "completions per request x (`top_logprobs` + 1)": f"{limits.MAX_LOGPROBS}",
        "prompt tokens x (`logprobs` + 1)": f"{limits.MAX_PROMPT_LOGPROBS:,}",
        "`stop`": f"{MAX_STOPS} texts of {MAX_STOP_LENGTH} characters",
        "`logit_bias`": f"{params.MAX_LOGIT_BIAS:,} tokens",
        "tools; their descriptions": f"{limits.MAX_TOOLS}; {limits.MAX_DESCRIPTION:,} characters",
        "schema; pattern; grammar": f"{structured.MAX_SCHEMA_BYTES // kib} KiB; "
        f"{structured.MAX_PATTERN_BYTES // kib} KiB; {structured.MAX_GRAMMAR_BYTES // kib} KiB",
        "choices": f"{structured.MAX_CHOICES:,} of {structured.MAX_CHOICE_BYTES // kib} KiB, "
        f"{structured.MAX_CHOICES_BYTES // kib} KiB together",
        "grammar compilation": f"{grammar_worker.CPU_SECONDS} s and "
        f"{grammar_worker.MEMORY_BYTES // 2**20} MiB, in a separate process",
        "grammars of active requests; per API key": (
            f"{config.max_grammar_bytes // 2**20:,} MiB; half of that"
        ),
        "stored responses": f"{config.max_response_bytes // 2**20} MiB",
        "`priority`": f"-{limits.MAX_PRIORITY} to {limits.MAX_PRIORITY}",
        "`deadline_seconds`": f"{limits.MAX_DEADLINE_SECONDS / 3600:g} hours",
        "client that does not read its response": f"{config.send_seconds:g} s",
    }
    assert table == expected


@pytest.fixture
def exposed(client: TestClient) -> dict[str, str]:
    """Type by name of every metric the server shows, counters with their _total."""
    text = client.get("/metrics").text
    kinds = dict(re.findall(r"^# TYPE lowlat:(\w+) (\w+)$", text, re.MULTILINE))
    return {name: kind for name, kind in kinds.items() if not name.endswith("_created")}


def test_every_metric_is_described(exposed: dict[str, str]) -> None:
    described = {
        name: row[1] for row in rows(section("Metrics")) for name in words(row[0]) if len(row) == 3
    }
    assert described == exposed


def test_the_dashboard_asks_for_metrics_that_exist(exposed: dict[str, str]) -> None:
    board = json.loads((ROOT / "deploy/grafana/lowlat.json").read_text())
    text = " ".join(t["expr"] for panel in board["panels"] for t in panel["targets"])
    asked = set(re.findall(r"lowlat:(\w+)", text))
    for name in asked:
        base = name.removesuffix("_bucket")
        assert base in exposed, name
        assert name.endswith("_bucket") == (exposed[base] == "histogram"), name
        assert name.endswith("_total") == (exposed[base] == "counter"), name
    assert len(asked) >= 12
