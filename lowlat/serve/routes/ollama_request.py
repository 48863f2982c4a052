"""OllamaChatRequest and OllamaGenerateRequest: bodies of Ollama's API, and their conversion.

Chats become chat requests; raw prompts, and all prompts of models without a chat template, become
completions.
"""

import json
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from lowlat.serve.chat.template_features import SWITCHES, TemplateFeatures
from lowlat.serve.protocol import limits
from lowlat.serve.protocol.base import (
    ApiRequest,
    Description,
    FunctionName,
    GenerationRequest,
    Id,
    JsonSchemaObject,
    StrictModel,
)
from lowlat.serve.protocol.chat import ChatRequest
from lowlat.serve.protocol.completions import CompletionRequest
from lowlat.serve.protocol.errors import RequestError
from lowlat.serve.protocol.hints import Hint, TemplateHint
from lowlat.serve.protocol.sampling import SamplingRequest, Stop, TopLogprobs
from lowlat.serve.protocol.validation import validate

DEFAULTS = {"temperature": 0.8, "top_k": 40, "top_p": 0.9}
"""Ollama's sampling defaults."""
IGNORED_OPTIONS = (
    "num_ctx num_keep num_batch num_gpu main_gpu num_thread numa low_vram f16_kv logits_all"
    " vocab_only use_mmap use_mlock"
).split()

ModelName = Annotated[Id, AfterValidator(lambda name: name.removesuffix(":latest"))]
Images = Annotated[list[str], Field(max_length=0)]
HintNumber = Hint[int | None]
HintSwitch = Hint[bool | None]
KeepAlive = Hint[int | float | str | None]


class OllamaOptions(StrictModel):
    """Sampling options. Sizes of the context and of batches are those of the server."""

    num_predict: Annotated[int, Field(ge=-2)] | None = None
    """Maximum number of generated tokens; 0 and less: the rest of the context."""
    temperature: Annotated[float, Field(ge=0.0, le=2.0)] | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    min_p: Annotated[float, Field(ge=0.0, le=1.0)] | None = None
    seed: int | None = None
    """-1: a random one."""
    stop: Stop | None = None
    repeat_penalty: Annotated[float, Field(ge=0.01, le=100.0)] | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    num_ctx: HintNumber = None
    num_keep: HintNumber = None
    num_batch: HintNumber = None
    num_gpu: HintNumber = None
    main_gpu: HintNumber = None
    num_thread: HintNumber = None
    numa: HintSwitch = None
    low_vram: HintSwitch = None
    f16_kv: HintSwitch = None
    logits_all: HintSwitch = None
    vocab_only: HintSwitch = None
    use_mmap: HintSwitch = None
    use_mlock: HintSwitch = None


class OllamaFunctionCall(StrictModel):
    name: FunctionName
    arguments: dict[str, object]
    index: Hint[int | None] = None
    description: Hint[str | None] = None


class OllamaToolCall(StrictModel):
    id: Id | None = None
    type: Literal["function"] | None = None
    function: OllamaFunctionCall


class OllamaMessage(StrictModel):
    role: Literal["system", "user", "assistant", "tool"]
    content: str | None = None
    thinking: str | None = None
    images: Images | None = None
    tool_calls: Annotated[list[OllamaToolCall], Field(max_length=limits.MAX_TOOLS)] | None = None
    tool_name: FunctionName | None = None
    """Function of a tool result without a tool_call_id."""
    tool_call_id: Id | None = None


class OllamaFunction(StrictModel):
    name: FunctionName
    description: Description | None = None
    parameters: JsonSchemaObject | None = None


class OllamaTool(StrictModel):
    type: Literal["function"] | None = None
    function: OllamaFunction


class OllamaRequest(GenerationRequest):
    """Fields of chat and generate requests. Streams unless stream is false."""

    model: ModelName
    """The served model's name, also with `:latest`."""
    options: OllamaOptions | None = None
    format: Literal["", "json"] | JsonSchemaObject | None = None
    """json: any JSON object; or a JSON schema."""
    think: TemplateHint[bool | Literal["low", "medium", "high"] | None] = None
    """Turns reasoning on or off if the chat template can."""
    logprobs: bool | None = None
    top_logprobs: TopLogprobs | None = None
    """How many of the most likely tokens to return per position; requires logprobs."""
    keep_alive: KeepAlive = None
    truncate: Hint[bool | None] = None
    """Ignored: a prompt that exceeds the context is an error."""
    shift: Hint[bool | None] = None
    """Ignored: generation ends where the context ends."""


class OllamaChatRequest(OllamaRequest):
    """A chat to complete; without messages the model is only loaded."""

    messages: Annotated[list[OllamaMessage], Field(max_length=limits.MAX_MESSAGES)] | None = None
    tools: Annotated[list[OllamaTool], Field(max_length=limits.MAX_TOOLS)] | None = None


class OllamaGenerateRequest(OllamaRequest):
    """A prompt to answer or, with raw, to continue; without a prompt the model is only loaded."""

    prompt: str | None = None
    system: str | None = None
    raw: bool | None = None
    """Whether the prompt is continued as it is, without the chat template."""
    images: Images | None = None
    suffix: str | None = None
    """Text after the answer, for models with fill-in-the-middle tokens."""
    template: str | None = None
    context: list[int] | None = None

    @model_validator(mode="after")
    def _check(self) -> "OllamaGenerateRequest":
        for name in ("template", "context"):
            if getattr(self, name):
                raise RequestError(f"{name} is not supported; leave it out", param=name)
        if self.is_plain:
            for name in ("system", "think"):
                if getattr(self, name):
                    raise RequestError(
                        f"{name} cannot be combined with raw or suffix; leave it out", param=name
                    )
        return self

    @property
    def is_plain(self) -> bool:
        """Whether the prompt is completed without the chat template."""
        return bool(self.raw or self.suffix)


class OllamaShowRequest(ApiRequest):
    """The model to describe."""

    model: ModelName
    verbose: Hint[bool | None] = None


FIELDS = {
    "max_completion_tokens": "options.num_predict",
    "max_tokens": "options.num_predict",
    "response_format": "format",
    "structured_outputs": "format",
    "reasoning_effort": "think",
    "chat_template_kwargs": "think",
    **{
        name: f"options.{name}"
        for name in SamplingRequest.model_fields.keys() & OllamaOptions.model_fields.keys()
    },
    "repetition_penalty": "options.repeat_penalty",
}
"""Field of chats and completions -> field of this API."""


def chat_of(features: TemplateFeatures, request: OllamaChatRequest) -> ChatRequest:
    """The chat of a chat request."""
    return _chat(features, request, _messages(request.messages or []), request.tools or [])


def prompt_chat_of(features: TemplateFeatures, request: OllamaGenerateRequest) -> ChatRequest:
    """The chat of a prompt."""
    messages = [{"role": "system", "content": request.system}] if request.system else []
    messages.append({"role": "user", "content": request.prompt or ""})
    return _chat(features, request, messages, [])


def completion_of(request: OllamaGenerateRequest) -> CompletionRequest:
    """The completion of a raw prompt."""
    if request.system:
        raise RequestError(
            "system: this model has no chat template; put the text into the prompt",
            param="system",
        )
    completion = {
        **_sampling(request),
        "prompt": request.prompt,
        "suffix": request.suffix or None,
        "max_tokens": _max_tokens(request) or limits.MAX_PROMPT_TOKENS,
    }
    if request.format:
        schema = {"type": "object"} if isinstance(request.format, str) else request.format
        completion["structured_outputs"] = {"json": schema}
    if request.logprobs:
        completion["logprobs"] = request.top_logprobs or 0
    return validate(CompletionRequest, completion)


def _chat(
    features: TemplateFeatures,
    request: OllamaRequest,
    messages: list[dict[str, Any]],
    tools: list[OllamaTool],
) -> ChatRequest:
    if request.think and features.reasoning is None:
        raise RequestError("think: this model does not reason; leave it out", param="think")
    chat = {
        **_sampling(request),
        "messages": messages,
        "max_tokens": _max_tokens(request),
        "tools": [{"type": "function", "function": t.function.model_dump()} for t in tools] or None,
        "logprobs": request.logprobs,
        "top_logprobs": request.top_logprobs,
        "response_format": _response_format(request.format),
    }
    if isinstance(request.think, bool):
        switches = features.variables.keys() & set(SWITCHES)
        chat["chat_template_kwargs"] = dict.fromkeys(switches, request.think) or None
    else:
        chat["reasoning_effort"] = request.think
    return validate(ChatRequest, chat)


def _response_format(format: str | JsonSchemaObject | None) -> dict[str, Any] | None:
    if not format:
        return None
    if isinstance(format, str):
        return {"type": "json_object"}
    return {"type": "json_schema", "json_schema": {"name": "format", "schema": format}}


def _sampling(request: OllamaRequest) -> dict[str, Any]:
    """The fields that chats and completions share."""
    options = request.options or OllamaOptions()
    given = options.model_dump(exclude_none=True, exclude={"num_predict", *IGNORED_OPTIONS})
    if given.get("seed") == -1:
        del given["seed"]
    if "repeat_penalty" in given:
        given["repetition_penalty"] = given.pop("repeat_penalty")
    return {"model": request.model, **DEFAULTS, **given}


def _max_tokens(request: OllamaRequest) -> int | None:
    limit = (request.options or OllamaOptions()).num_predict
    return limit if limit is not None and limit > 0 else None


def _messages(given: list[OllamaMessage]) -> list[dict[str, Any]]:
    """The messages of a chat. Ollama's calls need no id: results follow in their order then."""
    messages: list[dict[str, Any]] = []
    unanswered: list[tuple[str, str]] = []
    num_calls = 0
    for place, message in enumerate(given):
        converted: dict[str, Any] = {"role": message.role, "content": message.content or ""}
        if message.role == "assistant":
            converted["reasoning_content"] = message.thinking
            if message.tool_calls:
                calls = enumerate(message.tool_calls, num_calls)
                converted["tool_calls"] = [_call(call, number) for number, call in calls]
                num_calls += len(message.tool_calls)
        elif message.role == "tool":
            converted["tool_call_id"] = _answered(message, unanswered, place)
        for call in converted.get("tool_calls", ()):
            unanswered.append((call["id"], call["function"]["name"]))
        messages.append(converted)
    return messages


def _call(call: OllamaToolCall, number: int) -> dict[str, Any]:
    arguments = json.dumps(call.function.arguments, ensure_ascii=False)
    function = {"name": call.function.name, "arguments": arguments}
    return {"id": call.id or f"call_{number}", "type": "function", "function": function}


def _answered(message: OllamaMessage, unanswered: list[tuple[str, str]], place: int) -> str:
    """The id of the call that a tool result belongs to."""
    for entry in unanswered:
        id, name = entry
        if message.tool_call_id in (None, id) and message.tool_name in (None, name):
            unanswered.remove(entry)
            return id
    raise RequestError(
        f"messages[{place}]: no earlier assistant message has the tool call of this result",
        param=f"messages[{place}]",
    )
