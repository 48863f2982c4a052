"""Tools of the Responses API: namespaces, custom tools with grammars, web search."""

import json
from typing import Any

import pytest
from starlette.testclient import TestClient

from lowlat.serve.protocol.hints import HEADER

from .conftest import MakeClient
from .fake_engine import NAME, Answer, FakeEngine, tiny
from .templates import tokenizer_of
from .test_responses_route import events_of

PATH = "/v1/responses"
FUNCTION = {"type": "function", "name": "f", "parameters": {"type": "object"}}
NAMESPACE = {"type": "namespace", "name": "agents", "description": "Agents.", "tools": [FUNCTION]}
CUSTOM: dict[str, Any] = {"type": "custom", "name": "patch", "description": "Applies a patch."}
LINE = 'start: "+" /(.*)/ LF\n%import common.LF'
LARK = {"type": "grammar", "syntax": "lark", "definition": LINE}


@pytest.fixture
def client(make_client: MakeClient, engine: FakeEngine) -> TestClient:
    engine.model = tiny(tokenizer_of("hermes"), context=4000)
    return make_client()


def prompt_of(engine: FakeEngine) -> str:
    return engine.model.tokenizer.decode(engine.asked[-1].prompt, skip_special_tokens=False)


def call(name: str, arguments: str) -> Answer:
    text = f'{{"name": "{name}", "arguments": {arguments}}}'
    return Answer(text=f"<tool_call>\n{text}\n</tool_call>")


def post(client: TestClient, **fields: Any) -> Any:
    return client.post(PATH, json={"model": NAME, "input": "Hi", **fields})


def test_a_function_of_a_namespace(client: TestClient, engine: FakeEngine) -> None:
    engine.answer = call("agents__f", '{"x": 1}')
    tools = [FUNCTION, NAMESPACE]
    answer = post(client, tools=tools).json()
    assert '"name": "agents__f"' in prompt_of(engine)
    (item,) = answer["output"]
    assert (item["namespace"], item["name"], item["arguments"]) == ("agents", "f", '{"x": 1}')
    assert answer["tools"][1]["tools"][0]["name"] == "f"
    result = {"type": "function_call_output", "call_id": item["call_id"], "output": "done"}
    assert post(client, tools=tools, input=[item, result]).status_code == 200
    assert prompt_of(engine).count("agents__f") == 2


def test_web_search_is_not_shown_to_the_model(client: TestClient, engine: FakeEngine) -> None:
    search = {"type": "web_search", "external_web_access": False, "user_location": None}
    response = post(client, tools=[search], tool_choice="auto", parallel_tool_calls=True)
    assert response.headers[HEADER] == "tools.web_search"
    assert "search" not in prompt_of(engine)
    response = post(client, tools=[search], tool_choice="required")
    assert (response.status_code, response.json()["error"]["param"]) == (400, "tool_choice")


@pytest.mark.parametrize("format", [None, {"type": "text"}, LARK])
def test_a_custom_tool(client: TestClient, engine: FakeEngine, format: Any) -> None:
    engine.answer = call("patch", r'{"input": "+a \"b\" \ud83d\ude00\n"}')
    custom = {**CUSTOM, "format": format}
    events = events_of(post(client, tools=[custom], stream=True).text)
    (item,) = events[-1]["response"]["output"]
    assert (item["type"], item["name"]) == ("custom_tool_call", "patch")
    assert item["input"] == '+a "b" \U0001f600\n'
    kinds = [event["type"] for event in events]
    assert kinds.index("response.custom_tool_call_input.done") == len(kinds) - 3
    deltas = [e["delta"] for e in events if e["type"] == "response.custom_tool_call_input.delta"]
    assert "".join(deltas) == item["input"] and len(deltas) > 5
    assert (engine.asked[-1].grammar is not None) == (format == LARK)
    result = {"type": "custom_tool_call_output", "call_id": item["call_id"], "output": "ok"}
    assert post(client, tools=[custom], input=[item, result]).status_code == 200
    assert json.dumps({"input": item["input"]}, ensure_ascii=False) in prompt_of(engine)


def test_a_grammar_holds_for_the_input_of_its_tool(client: TestClient, engine: FakeEngine) -> None:
    forced = {
        "tools": [{**CUSTOM, "format": LARK}],
        "tool_choice": {"type": "custom", "name": "patch"},
    }
    assert post(client, **forced).status_code == 200
    grammar = engine.asked[-1].grammar
    assert grammar is not None
    body = r'{"name": "patch", "arguments": {"input": "+a \"b\" \\\n"}}'
    for text, is_good in (
        (body, True),
        (body.replace("+a", "a"), False),
        (body.replace(r"\\\n", r"\\"), False),
        (body.replace(r"\"b", '"b'), False),
    ):
        state = grammar.start()
        fits = True
        for token in engine.model.tokenizer.encode(f"<tool_call>\n{text}\n</tool_call>"):
            if not (fits := bool(state.mask()[token])):
                break
            state.accept(token)
        assert fits == is_good


HARD = {
    "syntax": {"syntax": "lark", "definition": "start: ("},
    "unknown rule": {"syntax": "lark", "definition": "start: other"},
    "no start": {"syntax": "lark", "definition": 'other: "a"'},
    "look-around": {"syntax": "regex", "definition": "a(?=b)"},
    "bad pattern": {"syntax": "regex", "definition": "(a"},
    "long pattern": {"syntax": "regex", "definition": "a" * 5000},
    "deep": {"syntax": "regex", "definition": "(" * 3000 + "a" + ")" * 3000},
    "surrogate": {"syntax": "lark", "definition": 'start: "\\ud800"'},
}


@pytest.mark.parametrize("name", HARD)
def test_hard_grammars_are_refused(client: TestClient, engine: FakeEngine, name: str) -> None:
    """Never a 500, whatever the grammar is."""
    response = post(client, tools=[{**CUSTOM, "format": {"type": "grammar", **HARD[name]}}])
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"].startswith("tools")
    assert engine.asked == []


@pytest.mark.parametrize(
    ("syntax", "definition"),
    [
        ("regex", "((.{0,99}){0,99}){0,99}"),
        ("lark", "start: /(a|b)*a(a|b){2000}/"),
        ("lark", 'start: start "a"'),
        ("lark", 'start: "a" start | start "a" | start start | "a"'),
    ],
)
@pytest.mark.parametrize("choice", ["auto", "required"])
def test_heavy_grammars_never_break_the_server(
    client: TestClient, syntax: str, definition: str, choice: str
) -> None:
    """They compile within the limits or not at all."""
    format = {"type": "grammar", "syntax": syntax, "definition": definition}
    tools = [{**CUSTOM, "format": format}]
    body = {"model": NAME, "input": "Hi", "tools": tools, "tool_choice": choice}
    assert client.post(PATH, json=body).status_code in (200, 400)


@pytest.mark.parametrize(
    ("tools", "param"),
    [
        ([{"type": "namespace", "name": "n", "tools": []}], "tools[0].tools"),
        ([{"type": "namespace", "name": "n", "tools": [NAMESPACE]}], "tools[0].tools[0].type"),
        ([{**NAMESPACE, "name": "n" * 128}], "tools"),
        ([NAMESPACE, NAMESPACE], "tools"),
        ([{**NAMESPACE, "tools": [{**FUNCTION, "name": f"f{n}"} for n in range(100)]}, FUNCTION,
          {**NAMESPACE, "name": "m", "tools": [{**FUNCTION, "name": f"f{n}"} for n in range(28)]}],
         "tools"),
        ([{**CUSTOM, "format": {"type": "grammar", "syntax": "ebnf", "definition": "x"}}],
         "tools[0].format.syntax"),
        ([{"type": "local_shell"}], "tools[0].type"),
    ],
)  # fmt: skip
def test_refusals(client: TestClient, tools: list[Any], param: str) -> None:
    response = post(client, tools=tools)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param), response.text


def test_grammars_that_a_format_cannot_enforce(make_client: MakeClient, engine: FakeEngine) -> None:
    """GLM writes arguments without quotes, so the end of the text could not be told."""
    engine.model = tiny(tokenizer_of("glm"), context=4000)
    client = make_client()
    assert post(client, tools=[CUSTOM]).status_code == 200
    response = post(client, tools=[{**CUSTOM, "format": LARK}])
    assert response.status_code == 400
    assert "cannot be enforced" in response.json()["error"]["message"]


def test_items_that_clients_send_back(client: TestClient, engine: FakeEngine) -> None:
    summary = [{"type": "summary_text", "text": "short"}]
    items = [
        {"type": "message", "role": "user", "content": "Go", "id": "msg_1"},
        {"type": "reasoning", "id": "rs_1", "summary": summary, "content": None,
         "encrypted_content": None},
        {"type": "message", "role": "assistant", "phase": "commentary", "status": "completed",
         "content": [{"type": "output_text", "text": "First", "annotations": [], "logprobs": []}]},
        {"type": "function_call", "id": "fc_1", "call_id": "c1", "name": "f", "arguments": "{}"},
        {"type": "custom_tool_call", "call_id": "c2", "name": "patch", "input": "+x"},
        {"type": "function_call_output", "call_id": "c1",
         "output": [{"type": "input_text", "text": "R1"}, {"type": "input_text", "text": "+"}]},
        {"type": "custom_tool_call_output", "call_id": "c2", "output": "R2"},
    ]  # fmt: skip
    response = post(client, input=items, tools=[FUNCTION, CUSTOM])
    assert response.status_code == 200, response.text
    assert response.headers[HEADER] == "input.phase"
    text = prompt_of(engine)
    for part in ("Go", "First", "R1+", "R2", '{"input": "+x"}'):
        assert part in text
