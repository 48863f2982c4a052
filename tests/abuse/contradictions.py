"""Bad requests: contradictory or unsupported fields, and tricks."""

from collections.abc import Iterator
from typing import Any

from .cases import (
    BODIES,
    CHAT,
    COMPLETIONS,
    RESPONSES,
    TOKENIZE,
    Case,
    bad_field,
    bad_value,
    tool,
    user,
)


def contradictions() -> Iterator[Case]:
    """Fields that are right one by one."""
    usage = {"stream_options": {"include_usage": True}}
    stopped = {**usage, "stream": False}
    two = {"tools": [tool("f"), tool("f")]}
    named = {"type": "function", "function": {"name": "g"}}
    field = "structured_outputs"
    json_form = {"response_format": {"type": "json_object"}}
    tools = {"tools": [tool("f")]}
    result = {"role": "tool", "tool_call_id": "c", "content": "x"}
    output = {"type": "function_call_output", "call_id": "c", "output": "x"}
    flat = {"type": "function", "name": "f"}
    endless = {"ignore_eos": True, **json_form}
    unending = {"ignore_eos": True, field: {"choice": ["a"]}}
    named_user = {"role": "user", "content": "x", "name": "bob"}
    special = {"prompt": None, **user("x"), "add_special_tokens": True}
    unlogged = {"top_logprobs": 0, "logprobs": False}
    rows: list[tuple[str, str, dict[str, Any], str]] = [
        ("stream options without a stream", CHAT, usage, "stream_options"),
        ("stream options, stream false", COMPLETIONS, stopped, "stream_options"),
        ("two limits", CHAT, {"max_completion_tokens": 3}, "max_tokens"),
        ("top_logprobs without logprobs", CHAT, {"top_logprobs": 1}, "top_logprobs"),
        ("top_logprobs, logprobs false", CHAT, unlogged, "top_logprobs"),
        (
            "streamed echo with logprobs",
            COMPLETIONS,
            {"echo": True, "logprobs": 1, "stream": True},
            "echo",
        ),
        (
            "streamed prompt_logprobs",
            CHAT,
            {"prompt_logprobs": 1, "stream": True},
            "prompt_logprobs",
        ),
        ("best_of above n", COMPLETIONS, {"best_of": 2}, "best_of"),
        ("best_of below n", COMPLETIONS, {"best_of": 1, "n": 2}, "best_of"),
        ("two functions of one name", CHAT, two, "tools"),
        ("a choice without tools", CHAT, {"tool_choice": "required"}, "tool_choice"),
        ("a named choice without tools", CHAT, {"tool_choice": named}, "tool_choice"),
        ("a choice of none of them", CHAT, {**tools, "tool_choice": named}, "tool_choice"),
        ("two forms", CHAT, {**json_form, field: {"regex": "a"}}, field),
        ("no form", CHAT, {field: {}}, field),
        ("only nulls as form", CHAT, {field: {"regex": None}}, field),
        ("two forms in one", COMPLETIONS, {field: {"regex": "a", "choice": ["a"]}}, field),
        ("a form without an end", CHAT, endless, "ignore_eos"),
        ("choices without an end", COMPLETIONS, unending, "ignore_eos"),
        ("a name that is not shown", CHAT, {"messages": [named_user]}, "messages[0].name"),
        ("prompt and messages", TOKENIZE, user("x"), "prompt"),
        ("neither of them", TOKENIZE, {"prompt": None}, "prompt"),
        ("tools with a prompt", TOKENIZE, tools, "tools"),
        ("special tokens with messages", TOKENIZE, special, "add_special_tokens"),
        ("reasoning at the end", RESPONSES, {"input": [reasoning()]}, "input"),
        ("a result without a call", CHAT, {"messages": [result]}, "messages[0].tool_call_id"),
        ("a result without a call, as an item", RESPONSES, {"input": [output]}, "input"),
        ("a named choice of none", RESPONSES, {"tool_choice": flat}, "tool_choice"),
        ("a forced choice without tools", RESPONSES, {"tool_choice": "required"}, "tool_choice"),
        ("two flat functions of one name", RESPONSES, {"tools": [flat, flat]}, "tools"),
    ]
    for name, path, change, param in rows:
        yield bad_field(name, path, change, param)


def reasoning() -> dict[str, Any]:
    return {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "x"}]}


def unsupported() -> Iterator[Case]:
    """Fields of OpenAI's API and of other servers that are not here: named, never ignored."""
    chat = (
        "audio best_of chat_template documents echo suffix function_call functions"
        " include_reasoning length_penalty lora_request mirostat mm_processor_kwargs model_path"
        " num_beams prompt prompt_embeds"
        " repeat_penalty skip_special_tokens spaces_between_special_tokens"
        " truncate_prompt_tokens typical_p use_beam_search web_search_options"
        " kv_transfer_params cache_salt logits_processors guided_whitespace_pattern"
    )
    for name in chat.split():
        yield bad_field(f"a chat with {name}", CHAT, {name: 1}, name, "not supported")
    texts = "messages chat_template best prompt_embeds tools response_format"
    texts += " guided_whitespace_pattern cache_salt"
    for name in texts.split():
        yield bad_field(f"a completion with {name}", COMPLETIONS, {name: 1}, name, "not supported")
    responses = "messages max_tokens prompt n stop seed logit_bias top_logprobs moderation"
    for name in responses.split():
        yield bad_field(f"a response with {name}", RESPONSES, {name: 1}, name, "not supported")
    for path, body in BODIES.items():
        for model in ("gpt-4", "", "../../etc/passwd", "tiny\0", "TINY", " tiny", "x" * 256):
            status = 400 if not model else 404
            yield bad_value(
                f"{path}: model {model[:20]!r}",
                path,
                lambda body=body, model=model: {**body, "model": model},
                status=status,
                param="model",
            )


def contents(url: str) -> Iterator[Case]:
    """Parts that are no text. Were `url` ever fetched, its server would see it."""
    parts: list[dict[str, Any]] = [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "image_url", "image_url": url},
        {"type": "image_url", "image_url": {"url": "file:///etc/passwd"}},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}},
        {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}},
        {"type": "audio_url", "audio_url": {"url": url}},
        {"type": "video_url", "video_url": {"url": url}},
        {"type": "file", "file": {"file_id": "x"}},
        {"type": "refusal", "refusal": "no"},
        {"type": "image_embeds", "image_embeds": "AAAA"},
        {"type": "thinking", "thinking": "x"},
        {"type": "text"},
        {"text": "x"},
        {"type": "Text", "text": "x"},
    ]
    for number, part in enumerate(parts):
        name = f"{part.get('type')} in a message ({number})"
        place = "messages[0].content[0]"
        match part:
            case {"type": "text"}:
                param = f"{place}.text"
            case _:
                param = f"{place}.type"
        yield bad_field(name, CHAT, user([part]), param)
        yield bad_field(f"{name}, tokenized", TOKENIZE, {"prompt": None, **user([part])}, param)
    part = "input[0].content[0].type"
    items: list[tuple[dict[str, Any], str]] = [
        ({"type": "item_reference", "id": "x"}, "input[0].type"),
        ({"type": "web_search_call", "id": "x"}, "input[0].type"),
        ({"type": "computer_call"}, "input[0].type"),
        ({"role": "user", "content": [{"type": "input_image", "image_url": url}]}, part),
        ({"role": "user", "content": [{"type": "input_file", "file_url": url}]}, part),
        ({"role": "user", "content": [{"type": "text", "text": "x"}]}, part),
        ({"role": "robot", "content": "x"}, "input[0].role"),
    ]  # fmt: skip
    for number, (item, param) in enumerate(items):
        yield bad_field(
            f"an item of input that is no text ({number})", RESPONSES, {"input": [item]}, param
        )
    for role in ("robot", "System", "function", "assistant ", "", "ｕｓｅｒ", "user\0"):  # noqa: RUF001
        change = {"messages": [{"role": role, "content": "x"}]}
        yield bad_field(f"the role {role!r}", CHAT, change, "messages[0].role")
    for name in ("a b", "é", "x" * 129, "", "a;b", "../x", "{{ 7 * 7 }}", "f\n"):
        for path, given in ((CHAT, tool(name)), (RESPONSES, {"type": "function", "name": name})):
            place = "tools[0].function.name" if path == CHAT else "tools[0].name"
            yield bad_field(f"{path}: a function {name!r}"[:60], path, {"tools": [given]}, place)
    for kind in ("file_search", "code_interpreter", "mcp"):
        change = {"tools": [{"type": kind, "name": "x", "server_url": url}]}
        yield bad_field(
            f"the tool {kind}", RESPONSES, {"tools": [{"type": kind, "name": "x"}]}, "tools[0].type"
        )
        yield bad_field(f"the tool {kind} with more", RESPONSES, change, "tools[0].type")
    for given in ({"type": "web_search"}, {"type": "custom", "name": "x"}):
        change = {"tools": [{**given, "server_url": url}]}
        yield bad_field(
            f"the tool {given['type']} with a URL", RESPONSES, change, "tools[0].server_url"
        )


ARGUMENTS = {
    "no JSON": '{"a": 1',
    "two values": "{} {}",
    "an array": "[1]",
    "a text": '"a"',
    "null": "null",
    "deep": '{"a":' + "[" * 70 + "]" * 70 + "}",
    "deeper than templates are rendered": '{"a":' + "[" * 700 + "]" * 700 + "}",
    "deeper than JSON is read": '{"a":' + "[" * 20_000 + "]" * 20_000 + "}",
    "NaN": '{"a": NaN}',
    "an infinite number": '{"a": 1e999}',
    "a huge number": '{"a": ' + "9" * 5000 + "}",
    "a key twice": '{"a": 1, "a": 2}',
    "half a surrogate pair": '{"a": "\\ud800"}',
}


def past_arguments() -> Iterator[Case]:
    """Arguments of earlier calls, which are JSON inside of JSON."""
    for name, text in ARGUMENTS.items():
        called = {"name": "f", "arguments": text}
        call = {"id": "c", "type": "function", "function": called}
        messages = [
            {"role": "user", "content": "x"},
            {"role": "assistant", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c", "content": "x"},
        ]
        param = "messages[1].tool_calls[0].function.arguments"
        yield bad_field(f"arguments: {name}", CHAT, {"messages": messages}, param)
        change = {"prompt": None, "messages": messages}
        yield bad_field(f"arguments: {name}, tokenized", TOKENIZE, change, param)
        items = [
            {"role": "user", "content": "x"},
            {"type": "function_call", "call_id": "c", **called},
            {"type": "function_call_output", "call_id": "c", "output": "x"},
        ]
        yield bad_field(f"arguments: {name}, as an item", RESPONSES, {"input": items}, "input")


def templates() -> Iterator[Case]:
    """Attempts to bring a template, or to reach its variables."""
    for field in ("chat_template", "template", "jinja", "chat_template_path"):
        source = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
        yield bad_field(f"{field} of one's own", CHAT, {field: source}, field, "not supported")
    for name in (
        "messages", "tools", "add_generation_prompt", "bos_token", "eos_token", "raise_exception",
        "strftime_now", "self", "__class__", "enable_thinking ", "namespace", "loop", "range",
    ):  # fmt: skip
        change = {"chat_template_kwargs": {name: 1}}
        yield bad_field(f"the variable {name}", CHAT, change, f"chat_template_kwargs.{name}")
    for value in (0, 1, "true", "{{ 7 * 7 }}", "x" * 200):
        change = {"chat_template_kwargs": {"enable_thinking": value}}
        param = "chat_template_kwargs.enable_thinking"
        yield bad_field(f"enable_thinking {str(value)[:9]!r}", CHAT, change, param)
    for value in ([], {}, None, 0.5, "x" * 257):
        change = {"chat_template_kwargs": {"enable_thinking": value}}
        param = "chat_template_kwargs.enable_thinking"
        yield bad_field(f"enable_thinking of type {type(value).__name__}", CHAT, change, param)
