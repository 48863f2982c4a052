"""Bodies of the allowed size that cost as much to parse, validate and refuse as they can."""

import json
from collections.abc import Callable
from typing import Any

from lowlat.generate import structured
from lowlat.serve.protocol import limits

from .cases import (
    CHAT,
    COMPLETIONS,
    COUNT_TOKENS,
    DETOKENIZE,
    EMBEDDINGS,
    MESSAGES,
    OLLAMA_CHAT,
    OLLAMA_EMBED,
    OLLAMA_GENERATE,
    OLLAMA_SHOW,
    RESPONSES,
    TOKENIZE,
)

NAME = "counting"
MOST = limits.MAX_BODY_BYTES - 200
"""Bytes left for what varies."""


def packed(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def chat(messages: object, **more: Any) -> bytes:
    return packed({"model": NAME, "messages": messages, "max_tokens": 1, **more})


def prompt(inner: bytes) -> bytes:
    """A completion whose prompt is this JSON."""
    return body(b"prompt", inner)[:-1] + b',"max_tokens":1}'


def body(field: bytes, inner: bytes) -> bytes:
    """A request whose `field` is this JSON."""
    return b'{"model":"%s","%s":%s}' % (NAME.encode(), field, inner)


def completion(**fields: object) -> bytes:
    return packed({"model": NAME, "prompt": "x", "max_tokens": 1, **fields})


def filled(open: bytes, item: bytes, close: bytes) -> bytes:
    """`item` as often as it fits."""
    return open + item * ((MOST - len(open + close)) // len(item) - 1) + item.rstrip(b",") + close


def user(content: object) -> dict[str, object]:
    return {"role": "user", "content": content}


def schema_tool(schema: object) -> dict[str, object]:
    return {"type": "function", "function": {"name": "f", "parameters": schema}}


def long_tools(path: str, characters: int) -> bytes:
    """A chat with 60 tools, whose descriptions have so many characters together."""
    shown = {"description": "word " * (characters // 60 // 5)}
    tools: list[dict[str, object]] = []
    for number in range(60):
        function = {"name": f"f{number}", **shown}
        if path == MESSAGES:
            tools.append({**function, "input_schema": {"type": "object"}})
        else:
            tools.append({"type": "function", "function": function})
    limit = {} if path == OLLAMA_CHAT else {"max_tokens": 1}
    return packed({"model": NAME, "messages": [user("x")], "tools": tools, **limit})


def long_text(path: str, text: str) -> bytes:
    """A body for `path` with this text, which needs no more than the text."""
    if path in (EMBEDDINGS, OLLAMA_EMBED):
        return packed({"model": NAME, "input": text})
    if path == RESPONSES:
        return packed({"model": NAME, "input": text, "max_output_tokens": 1})
    if path in (COMPLETIONS, OLLAMA_GENERATE, TOKENIZE):
        return packed({"model": NAME, "prompt": text})
    limit = {"max_tokens": 1} if path in (CHAT, MESSAGES) else {}
    return packed({"model": NAME, "messages": [user(text)], **limit})


PART = {"type": "text", "text": "x"}
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
UNKNOWN = {f"k{number}": 1 for number in range(300_000)}
FEW_UNKNOWN = dict(list(UNKNOWN.items())[:40])
ITEM = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "x"}]}
LONG_CALL = {**CALL, "function": {"name": "f", "arguments": '{"a":[' + "1.5," * 9000 + "1]}"}}

USE = {"type": "tool_use", "id": "c", "name": "f", "input": {"a": [1.5, "x"]}}
RESULT = {"type": "tool_result", "tool_use_id": "c", "content": [PART]}
OLLAMA_CALL = {"function": {"name": "f", "arguments": {"a": "x"}}}
ITEM_CALL = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}
ITEM_OUTPUT = {"type": "function_call_output", "call_id": "c", "output": "x"}

LONG_GRAMMAR = 'start: "a"\n' + "x" * (structured.MAX_GRAMMAR_BYTES - 20) + ': "b"\n'

HEAVY: dict[str, tuple[str, Callable[[], bytes]]] = {
    "parts with unknown fields": (
        CHAT,
        lambda: chat([user([{"unknown": 1}] * 140)] * 2048),
    ),
    "fewer parts with unknown fields": (
        CHAT,
        lambda: chat([user([{**PART, "x": 1}] * 6)] * 2048),
    ),
    "parts": (CHAT, lambda: chat([user([PART] * 8)] * 2048)),
    "parts of few messages": (CHAT, lambda: chat([user([PART] * 200)] * 90)),
    "parts, the last one bad": (CHAT, lambda: chat([user([PART] * 8)] * 2047 + [user([1])])),
    "tool calls": (CHAT, lambda: chat([{"role": "assistant", "tool_calls": [CALL] * 64}] * 120)),
    "tool calls of long arguments": (
        CHAT,
        lambda: chat([user("x"), {"role": "assistant", "tool_calls": [LONG_CALL] * 110}]),
    ),
    "unknown fields": (CHAT, lambda: packed(UNKNOWN)),
    "2,000 unknown fields": (CHAT, lambda: packed(dict(list(UNKNOWN.items())[:2000]))),
    "unknown fields of messages": (
        CHAT,
        lambda: chat([{**user("x"), **FEW_UNKNOWN}] * 1000),
    ),
    "biases": (COMPLETIONS, lambda: prompt(b'"x"')[:-1] + b',"logit_bias":%s}' % packed(UNKNOWN)),
    "2,000 bad biases": (
        COMPLETIONS,
        lambda: packed(
            {"model": NAME, "prompt": "x", "logit_bias": dict(list(UNKNOWN.items())[:2000])}
        ),
    ),
    "metadata": (CHAT, lambda: chat([user("x")], metadata=UNKNOWN)),
    "client metadata": (CHAT, lambda: chat([user("x")], client_metadata={"a": ["x"] * 90_000})),
    "client metadata of numbers": (
        RESPONSES,
        lambda: packed({"model": NAME, "input": "x", "client_metadata": {"a": [1] * 2_000_000}}),
    ),
    "a prediction": (
        CHAT,
        lambda: chat([user("x")], prediction={"type": "content", "content": [PART] * 19_000}),
    ),
    "allowed ids": (COMPLETIONS, lambda: completion(allowed_token_ids=[97] * (1 << 16))),
    "two million allowed ids": (COMPLETIONS, lambda: completion(allowed_token_ids=[1] * 2_000_000)),
    "bad words": (COMPLETIONS, lambda: completion(bad_words=["ab" * 128] * 128)),
    "90,000 bad words": (COMPLETIONS, lambda: completion(bad_words=["x"] * 90_000)),
    "a guided schema": (CHAT, lambda: chat([user("x")], guided_json={"enum": ["x"] * 90_000})),
    "a text of a guided schema": (CHAT, lambda: chat([user("x")], guided_json='"' * (MOST // 2))),
    "a guided pattern": (CHAT, lambda: chat([user("x")], guided_regex="a?" * (MOST // 2 - 99))),
    "guided choices": (CHAT, lambda: chat([user("x")], guided_choice=["x"] * 90_000)),
    "a guided grammar": (CHAT, lambda: chat([user("x")], guided_grammar=LONG_GRAMMAR)),
    "a guided grammar of 4 MB": (
        CHAT,
        lambda: chat([user("x")], guided_grammar='start: "a"' + " " * (MOST - 200)),
    ),
    "a schema of numbers": (
        CHAT,
        lambda: chat([user("x")], tools=[schema_tool({"enum": [1.5] * 900_000})]),
    ),
    "a schema of texts": (
        CHAT,
        lambda: chat([user("x")], tools=[schema_tool({"enum": ["\n" * 40] * 45_000})]),
    ),
    "schemas": (
        CHAT,
        lambda: chat(
            [user("x")],
            tools=[
                {"type": "function", "function": {"name": f"f{n}", "parameters": {"a": [{}] * 700}}}
                for n in range(128)
            ],
            tool_choice="required",
        ),
    ),
    "a response format": (
        CHAT,
        lambda: chat(
            [user("x")],
            response_format={
                "type": "json_schema",
                "json_schema": {"name": "x", "schema": {"enum": list(range(90_000))}},
            },
        ),
    ),
    "input items": (RESPONSES, lambda: packed({"model": NAME, "input": [ITEM] * 2048})),
    "input items, the last one bad": (
        RESPONSES,
        lambda: packed({"model": NAME, "input": [ITEM] * 2000 + [{"type": "x"}]}),
    ),
    "tools that are echoed": (
        RESPONSES,
        lambda: packed(
            {
                "model": NAME,
                "input": "x",
                "stream": True,
                "max_output_tokens": 1,
                "tool_choice": "none",
                "tools": [
                    {"type": "function", "name": f"f{n}", "parameters": {"enum": ["x"] * 700}}
                    for n in range(128)
                ],
            }
        ),
    ),
    "calls and outputs as input items": (
        RESPONSES,
        lambda: packed({"model": NAME, "input": [ITEM_CALL, ITEM_OUTPUT] * 1024}),
    ),
    "unknown fields of input items": (
        RESPONSES,
        lambda: packed({"model": NAME, "input": [{**ITEM, **FEW_UNKNOWN}] * 1000}),
    ),
    "Anthropic's blocks": (
        MESSAGES,
        lambda: chat([user([PART] * 8), {"role": "assistant", "content": [USE]}] * 1024),
    ),
    "Anthropic's tool results": (MESSAGES, lambda: chat([user([RESULT] * 4)] * 2048)),
    "unknown fields of Anthropic's blocks": (
        MESSAGES,
        lambda: chat([user([{**PART, **FEW_UNKNOWN}] * 5)] * 400),
    ),
    "Anthropic's system blocks": (
        MESSAGES,
        lambda: chat([user("x")], system=[{**PART, "text": "x" * 16_000}] * 250),
    ),
    "Ollama's tool calls": (
        OLLAMA_CHAT,
        lambda: packed(
            {
                "model": NAME,
                "messages": [{"role": "assistant", "tool_calls": [OLLAMA_CALL] * 8}] * 900,
            }
        ),
    ),
    "unknown options": (
        OLLAMA_CHAT,
        lambda: packed({"model": NAME, "messages": [user("x")], "options": UNKNOWN}),
    ),
    "images": (
        OLLAMA_GENERATE,
        lambda: packed({"model": NAME, "prompt": "x", "images": ["x"] * 90_000}),
    ),
    "a context of ids": (
        OLLAMA_GENERATE,
        lambda: packed({"model": NAME, "prompt": "x", "context": [1] * 2_000_000}),
    ),
    "a format": (
        OLLAMA_GENERATE,
        lambda: packed({"model": NAME, "prompt": "x", "format": {"enum": ["x"] * 90_000}}),
    ),
    "unknown fields to show": (OLLAMA_SHOW, lambda: packed({"model": NAME, **UNKNOWN})),
    "2,000 unknown fields to show": (
        OLLAMA_SHOW,
        lambda: packed({"model": NAME, **dict(list(UNKNOWN.items())[:2000])}),
    ),
    "a list to show": (OLLAMA_SHOW, lambda: packed({"model": NAME, "verbose": ["x"] * 90_000})),
    "a name of 4 MB to show": (OLLAMA_SHOW, lambda: packed({"model": "x" * MOST})),
    "texts to embed": (EMBEDDINGS, lambda: body(b"input", filled(b"[", b'"ab",', b"]"))),
    "long texts to embed": (EMBEDDINGS, lambda: body(b"input", packed(["ab " * 660] * 2048))),
    "ids to embed": (EMBEDDINGS, lambda: body(b"input", packed([[97] * 680] * 2048))),
    "texts for Ollama to embed": (
        OLLAMA_EMBED,
        lambda: packed({"model": NAME, "input": ["ab"] * 90_000}),
    ),
    "messages to tokenize": (
        TOKENIZE,
        lambda: packed({"model": NAME, "messages": [user([PART] * 8)] * 2048}),
    ),
    "messages to count": (
        COUNT_TOKENS,
        lambda: packed({"model": NAME, "messages": [user([PART] * 8)] * 2048}),
    ),
    "a million ids": (COMPLETIONS, lambda: prompt(packed([97] * (1 << 20)))),
    "two million ids": (COMPLETIONS, lambda: prompt(filled(b"[", b"1,", b"]"))),
    "lists of ids": (COMPLETIONS, lambda: prompt(packed([[1000] * 6000] * 128))),
    "floats": (COMPLETIONS, lambda: prompt(filled(b"[", b"1.5,", b"]"))),
    "ids to detokenize": (DETOKENIZE, lambda: body(b"tokens", packed([97] * (1 << 20)))),
    "log-probabilities of prompts": (
        COMPLETIONS,
        lambda: packed(
            {"model": NAME, "prompt": [[97] * 500] * 128, "max_tokens": 0, "prompt_logprobs": 3}
        ),
    ),
    "echoed log-probabilities": (
        COMPLETIONS,
        lambda: packed(
            {
                "model": NAME,
                "prompt": [[97] * 500] * 32,
                "max_tokens": 0,
                "echo": True,
                "logprobs": 3,
            }
        ),
    ),
    "objects": (COMPLETIONS, lambda: prompt(filled(b"[", b"{},", b"]"))),
    "arrays": (COMPLETIONS, lambda: prompt(filled(b"[", b"[],", b"]"))),
    "texts": (COMPLETIONS, lambda: prompt(filled(b"[", b'"ab",', b"]"))),
    "literals": (COMPLETIONS, lambda: prompt(filled(b"[", b"null,", b"]"))),
    "brackets": (COMPLETIONS, lambda: prompt(filled(b"", b"[", b""))),
    "escapes": (COMPLETIONS, lambda: prompt(filled(b'"', b"\\n", b'"'))),
    "pairs of escapes": (COMPLETIONS, lambda: prompt(filled(b'"', b"\\ud83d\\ude00", b'"'))),
    "half a pair at the end": (COMPLETIONS, lambda: prompt(filled(b'"', b"\\\\", b'\\ud83d"'))),
    "a text of four-byte characters": (
        TOKENIZE,
        lambda: body(b"prompt", filled(b'"', "😀".encode(), b'"')),
    ),
    "a text without words": (CHAT, lambda: chat([user("a" * MOST)])),
    "a long number": (COMPLETIONS, lambda: prompt(filled(b"", b"1", b".5"))),
    "quotes": (COMPLETIONS, lambda: filled(b"", b'"', b"")),
    "backslashes": (COMPLETIONS, lambda: filled(b'{"a":"', b"\\", b"")),
    "commas": (COMPLETIONS, lambda: filled(b"[", b",", b"")),
    "one type of 4 MB": (CHAT, lambda: chat([user([{"type": "x" * MOST, "text": ""}])])),
    "one key of 4 MB": (CHAT, lambda: packed({"x" * MOST: 1})),
}
"""Path and body, by name."""
