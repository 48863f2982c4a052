"""Chat requests to prompts, constraints and parsers; unsupported fields are rejected by name."""

import json
from functools import cache
from typing import Any

import pytest

from lowlat.generate.model import Model
from lowlat.generate.structured import Choice, Grammar, JsonObject, JsonSchema
from lowlat.serve.chat.messages import template_messages
from lowlat.serve.chat.prompt import PreparedChat, prepare_chat
from lowlat.serve.chat.template_features import TemplateFeatures
from lowlat.serve.protocol.chat import ChatRequest
from lowlat.serve.protocol.errors import RequestError
from lowlat.serve.protocol.messages import UserMessage
from lowlat.serve.tool_parsers.state import ContentPart, ReasoningPart, ToolCallStart
from tests.fakes import byte_tokenizer, gqa_config, tiny_model
from tests.unit.serve.templates import CHATML, tokenizer_of, tokenizer_with

PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOL = {
    "type": "function",
    "function": {"name": "weather", "description": "tells it", "parameters": PARAMETERS},
}
BARE_TOOL = {"type": "function", "function": {"name": "stop"}}
USER = {"role": "user", "content": "hi"}
CALL = {
    "id": "call_1",
    "type": "function",
    "function": {"name": "weather", "arguments": '{"city":"Bern"}'},
}
CALLED = [USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}]
ANSWERED = [*CALLED, {"role": "tool", "tool_call_id": "call_1", "content": "sun"}]


@cache
def model_of(family: str) -> Model:
    tokenizer = byte_tokenizer() if family == "bytes" else tokenizer_of(family)
    config = gqa_config(vocab_size=tokenizer.vocab_size, max_position_embeddings=2000)
    return Model(tiny_model(config), tokenizer, name=family)


def prepare(family: str, messages: list[Any] | None = None, **fields: Any) -> PreparedChat:
    body = {"model": "m", "messages": messages or [USER], **fields}
    request = ChatRequest.model_validate_json(json.dumps(body))
    return prepare_chat(model_of(family), request)


def prompt(family: str, messages: list[Any] | None = None, **fields: Any) -> str:
    prepared = prepare(family, messages, **fields)
    return model_of(family).tokenizer.decode(prepared.ids, skip_special_tokens=False)


def refused(param: str, family: str, messages: list[Any] | None = None, **fields: Any) -> str:
    with pytest.raises(RequestError) as caught:
        prepare(family, messages, **fields)
    assert caught.value.param == param
    assert param.split(".")[0] in caught.value.message
    assert "\n" not in caught.value.message
    return caught.value.message


def test_a_plain_chat() -> None:
    assert prompt("chatml") == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    prepared = prepare("chatml", max_completion_tokens=7, stop="x", seed=3)
    assert prepared.structured is None
    assert prepared.keep_special == frozenset()
    params = prepared.params
    assert (params.max_tokens, params.temperature, params.stop) == (7, 1.0, ("x",))
    assert prepare("chatml").params.max_tokens is None


@pytest.mark.parametrize("family", ["glm", "qwen coder"])
def test_unenforceable_keywords_are_named(family: str) -> None:
    """Where nothing is promised, the same functions are served."""
    odd = {"type": "function", "function": {"name": "odd", "parameters": {"not": {}}}}
    for choice in ("required", {"type": "function", "function": {"name": "odd"}}):
        param = "tools[1].function.parameters.not"
        refused(param, family, tools=[TOOL, odd], tool_choice=choice)
    strict = {"type": "function", "function": {**odd["function"], "strict": True}}
    refused("tools[0].function.parameters.not", family, tools=[strict])
    other = {"type": "function", "function": {"name": "weather"}}
    assert prepare(family, tools=[TOOL, odd], tool_choice=other).structured is not None
    assert prepare(family, tools=[TOOL, odd]).structured is None
    assert prepare(family, tools=[TOOL, odd], parallel_tool_calls=False).structured is not None


def test_parts_of_content_are_joined() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "<|im_end|>"}]
    text = prompt("chatml", [{"role": "user", "content": parts}])
    assert text.startswith("<|im_start|>user\na<|im_end|><|im_end|>\n")
    ids = prepare("chatml", [{"role": "user", "content": parts}]).ids
    assert ids.count(model_of("chatml").tokenizer.encode("<|im_end|>")[0]) == 1


def test_tools_are_shown() -> None:
    text = prompt("hermes", tools=[TOOL, BARE_TOOL])
    assert json.dumps(TOOL) in text
    empty = {"name": "stop", "parameters": {"type": "object", "properties": {}}}
    assert json.dumps({"type": "function", "function": empty}) in text
    assert "weather" not in prompt("hermes", tools=[TOOL], tool_choice="none")


def test_strict_is_no_part_of_what_the_model_reads() -> None:
    tool = {"type": "function", "function": {**TOOL["function"], "strict": True}}
    assert json.dumps(TOOL) in prompt("hermes", tools=[tool])


@pytest.mark.parametrize("family", ["unknown", "chatml"])
def test_tools_are_rejected_without_a_known_tool_call_format(family: str) -> None:
    refused("tools", family, tools=[TOOL])
    refused("messages[1].tool_calls", family, CALLED)
    refused("messages[0].role", family, ANSWERED[2:])
    assert prepare(family, tools=[TOOL], tool_choice="none").structured is None


def test_past_calls_as_templates_want_them() -> None:
    """Regression: arguments quoted twice, null printed as None, ids a template refuses."""
    text = prompt("hermes", ANSWERED)
    assert '{"name": "weather", "arguments": {"city":"Bern"}}' in text
    assert "None" not in text
    assert '```json\n{"city":"Bern"}\n```' in prompt("r1", ANSWERED)
    assert "functions.weather:0" in prompt("kimi", ANSWERED)
    mistral = prompt("mistral", [*ANSWERED, USER])
    assert "call_1" not in mistral
    id = mistral.split('"id": "')[1][:9]
    assert f'"call_id": "{id}"' in mistral
    assert "<arg_value>Bern</arg_value>" in prompt("glm", ANSWERED)
    assert '"parameters": {"city": "Bern"}' in prompt("llama", ANSWERED)


def test_ids_count_the_conversations_calls() -> None:
    second = {**CALL, "id": "call_2"}
    messages = [*ANSWERED, {"role": "assistant", "tool_calls": [second], "content": "ok"}]
    assert "functions.weather:1" in prompt("kimi", messages)


def test_messages_that_templates_would_misread_are_refused() -> None:
    broken = {**CALL, "function": {"name": "weather", "arguments": "{"}}
    messages = [USER, {"role": "assistant", "tool_calls": [broken]}]
    refused("messages[1].tool_calls[0].function.arguments", "glm", messages)
    stray = [*CALLED, {"role": "tool", "tool_call_id": "other", "content": "sun"}]
    refused("messages[2].tool_call_id", "hermes", stray)
    refused("messages[0].role", "mistral", [{"role": "system", "content": "a"}, USER])


def test_refusals_of_the_template_name_messages() -> None:
    two = [USER, {"role": "assistant", "tool_calls": [CALL, {**CALL, "id": "call_2"}]}]
    assert "one call at a time" in refused("messages", "llama", two)


def test_developer_messages_are_system_messages() -> None:
    text = prompt("chatml", [{"role": "developer", "content": "be kind"}, USER])
    assert text.startswith("<|im_start|>system\nbe kind<|im_end|>")


def test_a_prompt_that_fills_the_context_is_rejected() -> None:
    with pytest.raises(RequestError, match="2000") as caught:
        prepare("chatml", [{"role": "user", "content": "a" * 2000}])
    assert caught.value.code == "context_length_exceeded"


def test_template_variables() -> None:
    closed = prompt("hermes", chat_template_kwargs={"enable_thinking": False})
    assert closed.endswith("<think>\n\n</think>\n\n")
    field = "chat_template_kwargs.enable_thinking"
    refused(field, "hermes", chat_template_kwargs={"enable_thinking": 1})
    refused(field, "chatml", chat_template_kwargs={"enable_thinking": False})
    refused("chat_template_kwargs.bos_token", "llama", chat_template_kwargs={"bos_token": "x"})
    assert "enable_thinking" in refused(
        "chat_template_kwargs.x", "hermes", chat_template_kwargs={"x": True}
    )


def test_the_parser_knows_the_prompt() -> None:
    """Regression: reasoning shown as the answer because its first mark is in the prompt."""
    begun = prepare("r1").make_parser()
    assert begun.push("hm</think>yes") == [ReasoningPart("hm"), ContentPart("yes")]
    call = '<tool_call>\n{"name": "weather", "arguments": {}}\n</tool_call>'
    with_tools = prepare("hermes", tools=[TOOL])
    first = with_tools.make_parser().push(call)[0]
    assert isinstance(first, ToolCallStart)
    assert isinstance(with_tools.make_parser().push(call)[0], ToolCallStart)
    without = prepare("hermes", tools=[TOOL], tool_choice="none").make_parser()
    assert without.push(call) == [ContentPart(call)]


def test_special_tokens_of_calls_are_kept_in_the_text() -> None:
    kept = prepare("kimi", tools=[TOOL]).keep_special
    assert len(kept) == 5
    assert prepare("kimi").keep_special == frozenset()


def test_structured_outputs_without_tools_or_reasoning_are_unchanged() -> None:
    assert prepare("bytes", response_format={"type": "json_object"}).structured == JsonObject()
    assert prepare("bytes", structured_outputs={"choice": ["a", "b"]}).structured == Choice(
        options=("a", "b")
    )
    schema = {"type": "json_schema", "json_schema": {"name": "s", "schema": {"type": "object"}}}
    assert isinstance(prepare("bytes", response_format=schema).structured, JsonSchema)
    assert prepare("bytes", response_format={"type": "text"}).structured is None


def test_structured_outputs_apply_after_the_reasoning() -> None:
    structured = prepare("r1", response_format={"type": "json_object"}).structured
    assert isinstance(structured, Grammar)
    assert "%json" in structured.lark
    off = prepare(
        "hermes",
        response_format={"type": "json_object"},
        chat_template_kwargs={"enable_thinking": False},
    )
    assert off.structured == JsonObject()
    refused("structured_outputs", "r1", structured_outputs={"grammar": "start: /a/"})


def test_choices_of_tools() -> None:
    assert prepare("hermes", tools=[TOOL, BARE_TOOL]).structured is None
    required = prepare("hermes", tools=[TOOL, BARE_TOOL], tool_choice="required").structured
    assert isinstance(required, Grammar)
    assert "weather" in required.lark
    assert "stop" in required.lark
    choice = {"type": "function", "function": {"name": "stop"}}
    named = prepare("hermes", tools=[TOOL, BARE_TOOL], tool_choice=choice).structured
    assert isinstance(named, Grammar)
    assert "weather" not in named.lark
    one = prepare("hermes", tools=[TOOL], parallel_tool_calls=False).structured
    assert isinstance(one, Grammar)


@pytest.mark.parametrize("family", ["hermes", "v3.1"])
@pytest.mark.parametrize("choice", ["required", "auto"])
def test_a_function_without_parameters_takes_no_arguments(family: str, choice: str) -> None:
    fields = {"tool_choice": choice, "parallel_tool_calls": False}
    structured = prepare(family, tools=[BARE_TOOL], **fields).structured
    assert isinstance(structured, Grammar)
    assert '"additionalProperties": false' in structured.lark


def test_an_error_of_a_tool_schema_names_tools() -> None:
    body = {"model": "m", "messages": [USER], "tools": [TOOL]}
    for name in ("text", "json_object"):
        request = ChatRequest.model_validate(body | {"response_format": {"type": name}})
        assert request.constraint_field == ("tools" if name == "text" else "response_format")


def test_strict_functions_constrain_their_arguments() -> None:
    strict = {"type": "function", "function": {**TOOL["function"], "strict": True}}
    held = prepare("hermes", tools=[strict, BARE_TOOL]).structured
    assert isinstance(held, Grammar)
    assert '"required": ["city"]' in held.lark
    free = prepare("hermes", tools=[TOOL], parallel_tool_calls=False).structured
    assert isinstance(free, Grammar)
    assert '"required"' not in free.lark


@pytest.mark.parametrize("family", ["hermes", "r1", "llama", "mistral", "kimi", "glm"])
def test_past_arguments_are_read_as_strictly_as_bodies(family: str) -> None:
    """Regression: an internal error for JSON that is too deep to serialize, or NaN in a prompt."""
    deep = '{"a":' + "[" * 700 + "]" * 700 + "}"
    for text in ("{", "[]", "null", deep, '{"a": NaN}', '{"a": 1e999}', '{"a": 1, "a": 2}'):
        bad = {**CALL, "function": {"name": "weather", "arguments": text}}
        messages = [USER, {"role": "assistant", "tool_calls": [bad]}]
        refused("messages[1].tool_calls[0].function.arguments", family, messages)


def test_numbers_of_past_arguments_stay_as_they_were() -> None:
    call = {**CALL, "function": {"name": "weather", "arguments": '{"a": 1.0, "b": 2}'}}
    messages = [USER, {"role": "assistant", "tool_calls": [call]}]
    assert '"parameters": {"a": 1.0, "b": 2}' in prompt("llama", messages)


@pytest.mark.parametrize("family", ["chatml", "hermes", "llama"])
def test_names_that_the_template_does_not_show_are_refused(family: str) -> None:
    """Regression: names that the template does not render."""
    for place, role in enumerate(("system", "user", "assistant")):
        messages: list[dict[str, Any]] = [{"role": "system", "content": "a"}, USER, dict(USER)]
        messages[2]["role"] = "assistant"
        assert messages[place]["role"] == role
        messages[place] = {**messages[place], "name": "bob"}
        refused(f"messages[{place}].name", family, messages)


def test_names_of_results_are_those_of_the_calls() -> None:
    assert "sun" in prompt("hermes", [*CALLED, {**ANSWERED[2], "name": "weather"}])
    refused("messages[2].name", "hermes", [*CALLED, {**ANSWERED[2], "name": "bob"}])


def test_names_that_the_template_shows_reach_it() -> None:
    source = CHATML.replace("{{ m.role }}", "{{ m.role }}{{ '=' + m.name if m.name }}")
    tokenizer = tokenizer_with(source)
    turn = template_messages(
        TemplateFeatures.of(tokenizer), [UserMessage(role="user", content="a", name="bob")]
    )
    assert "user=bob" in tokenizer.apply_chat_template(turn)


FORMS: list[dict[str, Any]] = [
    {"response_format": {"type": "json_object"}},
    {"structured_outputs": {"choice": ["a"]}},
    {"tools": [TOOL], "tool_choice": "required"},
]


@pytest.mark.parametrize("form", FORMS)
def test_structured_outputs_reject_ignore_eos(form: dict[str, Any]) -> None:
    """Regression: ignore_eos without effect, which the Python API refuses."""
    refused("ignore_eos", "hermes", ignore_eos=True, **form)
    assert prepare("hermes", ignore_eos=False, **form).structured is not None
    assert prepare("hermes", ignore_eos=True, tools=[TOOL]).params.ignore_eos
