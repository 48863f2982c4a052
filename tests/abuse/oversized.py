"""Bad requests: more than allowed of anything that costs memory or time."""

import json
from collections.abc import Iterator

from lowlat.engine import params
from lowlat.generate.params import MAX_STOP_LENGTH
from lowlat.serve.protocol import limits
from tests.server.tiny_server import CONTEXT, NAME

from .cases import (
    BODIES,
    CHAT,
    COMPLETIONS,
    DETOKENIZE,
    RESPONSES,
    TOKENIZE,
    Case,
    bad_body,
    bad_field,
    bad_value,
    tool,
    user,
)

MiB = 1 << 20


def oversized() -> Iterator[Case]:
    """More than is allowed of anything that costs memory or time."""
    for path in BODIES:
        yield bad_body(
            f"{path}: a body above the cap",
            path,
            lambda path=path: json.dumps({**BODIES[path], "user": "u" * (5 * MiB)}).encode(),
            status=413,
            words=f"larger than {limits.MAX_BODY_BYTES} bytes",
        )
    message = {"role": "user", "content": "x"}
    yield bad_value(
        "2,049 messages",
        CHAT,
        lambda: {**BODIES[CHAT], "messages": [message] * (limits.MAX_MESSAGES + 1)},
        param="messages",
    )
    yield bad_value(
        "2,049 messages to tokenize",
        TOKENIZE,
        lambda: {"model": NAME, "messages": [message] * (limits.MAX_MESSAGES + 1)},
        param="messages",
    )
    yield bad_value(
        "2,049 items of input",
        RESPONSES,
        lambda: {**BODIES[RESPONSES], "input": [message] * (limits.MAX_MESSAGES + 1)},
        param="input",
    )
    yield bad_value(
        "instructions beside 2,048 items of input",
        RESPONSES,
        lambda: {
            **BODIES[RESPONSES],
            "instructions": "x",
            "input": [message] * limits.MAX_MESSAGES,
        },
        param="input",
    )
    call = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}
    yield bad_field("129 calls of one answer as items", RESPONSES, {"input": [call] * 129}, "input")
    part = {"type": "text", "text": "x"}
    many = limits.MAX_CONTENT_PARTS + 1
    yield bad_field("257 parts of a message", CHAT, user([part] * many), "messages[0].content")
    calls = [{"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}] * 129
    yield bad_field(
        "129 calls of one message",
        CHAT,
        {"messages": [{"role": "assistant", "tool_calls": calls}]},
        "messages[0].tool_calls",
    )
    yield bad_field(
        "129 tools",
        CHAT,
        {"tools": [tool(f"f{number}") for number in range(limits.MAX_TOOLS + 1)]},
        "tools",
    )
    yield bad_field("129 prompts", COMPLETIONS, {"prompt": ["x"] * 129}, "prompt")
    yield bad_field("129 lists of ids", COMPLETIONS, {"prompt": [[1]] * 129}, "prompt")
    yield bad_field("2 prompts times 65", COMPLETIONS, {"prompt": ["x", "y"], "n": 65}, "n")
    yield bad_field("n of 129", COMPLETIONS, {"n": 129}, "n")
    yield bad_field("n of a billion", CHAT, {"n": 10**9}, "n")
    yield bad_field("logprobs of 21", COMPLETIONS, {"logprobs": 21}, "logprobs")
    yield bad_field("logprobs of 20 times 7", COMPLETIONS, {"logprobs": 20, "n": 7}, "logprobs")
    yield bad_field(
        "top_logprobs of 20 times 7",
        CHAT,
        {"logprobs": True, "top_logprobs": 20, "n": 7},
        "top_logprobs",
    )
    for path in (CHAT, COMPLETIONS):
        yield bad_field(f"{path}: 17 stops", path, {"stop": ["x"] * 17}, "stop")
        long = "x" * (MAX_STOP_LENGTH + 1)
        yield bad_field(f"{path}: a long stop", path, {"stop": long}, "stop")
        yield bad_field(f"{path}: a long stop of two", path, {"stop": ["y", long]}, "stop[1]")
        yield bad_field(f"{path}: an empty stop", path, {"stop": ["y", ""]}, "stop[1]")
        bias = {str(token): 1 for token in range(params.MAX_LOGIT_BIAS + 1)}
        yield bad_field(f"{path}: 1,025 biases", path, {"logit_bias": bias}, "logit_bias")
    more = {f"key{number}": "x" for number in range(limits.MAX_METADATA + 1)}
    for path in (CHAT, RESPONSES):
        yield bad_field(f"{path}: 17 pairs of metadata", path, {"metadata": more}, "metadata")
        long = {"k": "x" * (limits.MAX_METADATA_VALUE + 1)}
        yield bad_field(f"{path}: long metadata", path, {"metadata": long}, "metadata.k")
    variables = {f"v{number}": 1 for number in range(limits.MAX_TEMPLATE_VARIABLES + 1)}
    yield bad_field(
        "17 template variables", CHAT, {"chat_template_kwargs": variables}, "chat_template_kwargs"
    )


def lengths() -> Iterator[Case]:
    """More tokens than the context holds, in every way to ask for them."""
    text = "x" * (CONTEXT + 1)
    yield bad_field(
        "max_tokens beyond the context", COMPLETIONS, {"max_tokens": 9000}, "max_tokens"
    )
    yield bad_field("max_tokens beyond it in a chat", CHAT, {"max_tokens": 9000}, "max_tokens")
    yield bad_value(
        "max_completion_tokens beyond it",
        CHAT,
        lambda: {"model": NAME, **user("x"), "max_completion_tokens": 9000},
        param="max_completion_tokens",
    )
    yield bad_field(
        "max_output_tokens beyond it", RESPONSES, {"max_output_tokens": 9000}, "max_output_tokens"
    )
    yield bad_field("max_tokens of a million", COMPLETIONS, {"max_tokens": 1 << 20}, "max_tokens")
    yield bad_field(
        "max_tokens above a million", COMPLETIONS, {"max_tokens": 2 << 20}, "max_tokens"
    )
    yield bad_field("a prompt beyond the context", COMPLETIONS, {"prompt": text}, "prompt")
    yield bad_field("ids beyond it", COMPLETIONS, {"prompt": [1] * (CONTEXT + 1)}, "prompt")
    yield bad_field("one prompt of two beyond it", COMPLETIONS, {"prompt": ["x", text]}, "prompt")
    yield bad_field("a message beyond it", CHAT, user(text), "messages")
    yield bad_field("input beyond it", RESPONSES, {"input": text}, "input")
    yield bad_field("instructions beyond it", RESPONSES, {"instructions": text}, "input")
    yield bad_field(
        "messages beyond it, tokenized", TOKENIZE, {"prompt": None, **user(text)}, "messages"
    )
    yield bad_field("an empty prompt", COMPLETIONS, {"prompt": ""}, "prompt")
    yield bad_field("an empty prompt of two", COMPLETIONS, {"prompt": ["x", ""]}, "prompt")
    yield bad_field("no ids", COMPLETIONS, {"prompt": []}, "prompt")
    yield bad_field("no ids in a list", COMPLETIONS, {"prompt": [[1], []]}, "prompt[1]")
    vocabulary = "an id outside the vocabulary"
    for path, field in ((COMPLETIONS, "prompt"), (DETOKENIZE, "tokens")):
        for token in (5000, 2**31 - 1):
            yield bad_field(f"{path} {vocabulary}: {token}", path, {field: [1, token]}, field)
        for token in (-1, 2**31, 2**63, 2**64):
            place = f"{field}[1]"
            yield bad_field(f"{path} an id of {token}", path, {field: [1, token]}, place)
    yield bad_field(
        "a bias outside the vocabulary", CHAT, {"logit_bias": {"5000": 1}}, "logit_bias"
    )
    for key in ("-1", "1.0", "", "٣", "1" * 10, "1e2", "NaN", " 1"):
        change = {"logit_bias": {key: 1}}
        yield bad_field(f"a bias of token {key!r}", CHAT, change, f"logit_bias.{key}")
