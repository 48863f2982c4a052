"""BadRequest cases: a name, the bytes, and the expected rejection."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tests.server.tiny_server import NAME

from .wire import post

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
RESPONSES = "/v1/responses"
MESSAGES = "/v1/messages"
COUNT_TOKENS = "/v1/messages/count_tokens"
OLLAMA_CHAT = "/api/chat"
OLLAMA_GENERATE = "/api/generate"
OLLAMA_EMBED = "/api/embed"
EMBEDDINGS = "/v1/embeddings"
OLLAMA_SHOW = "/api/show"
TOKENIZE = "/tokenize"
DETOKENIZE = "/detokenize"

BODIES: dict[str, dict[str, Any]] = {
    CHAT: {"model": NAME, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2},
    COMPLETIONS: {"model": NAME, "prompt": "Hi", "max_tokens": 2},
    RESPONSES: {"model": NAME, "input": "Hi", "max_output_tokens": 2},
    MESSAGES: {"model": NAME, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2},
    COUNT_TOKENS: {"model": NAME, "messages": [{"role": "user", "content": "Hi"}]},
    OLLAMA_CHAT: {"model": NAME, "messages": [{"role": "user", "content": "Hi"}]},
    OLLAMA_GENERATE: {"model": NAME, "prompt": "Hi"},
    OLLAMA_SHOW: {"model": NAME},
    EMBEDDINGS: {"model": NAME, "input": "Hi"},
    OLLAMA_EMBED: {"model": NAME, "input": "Hi"},
    TOKENIZE: {"model": NAME, "prompt": "Hi"},
    DETOKENIZE: {"model": NAME, "tokens": [72, 105]},
}
"""A good body for each path."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One bad request. Bytes are made when they are sent, as some have megabytes."""

    name: str
    make: Callable[[], bytes] = field(repr=False)
    status: int = 400
    param: str | None = None
    """What `param` of the error must be."""
    words: str = ""
    """What its message must hold."""


def bad_body(
    name: str, path: str, body: Callable[[], bytes], *, status: int = 400, **expected: Any
) -> Case:
    """A body of these bytes, sent as JSON."""
    return Case(name=name, make=lambda: post(path, body()), status=status, **expected)


def bad_value(name: str, path: str, value: Callable[[], Any], **expected: Any) -> Case:
    """A body that is this JSON value."""
    return bad_body(name, path, lambda: json.dumps(value()).encode(), **expected)


def bad_field(name: str, path: str, change: dict[str, Any], param: str, words: str = "") -> Case:
    """A good body but for these fields; the error must name `param`."""
    return bad_value(name, path, lambda: {**BODIES[path], **change}, param=param, words=words)


def user(content: Any) -> dict[str, Any]:
    """A chat of one message."""
    return {"messages": [{"role": "user", "content": content}]}


def tool(name: str, **schema: Any) -> dict[str, Any]:
    """A function with this schema for its arguments."""
    return {"type": "function", "function": {"name": name, "parameters": schema or None}}
