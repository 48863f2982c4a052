"""Responses of /v1/models, /health and /ready."""

from typing import Literal

from lowlat.serve.protocol.base import WireModel


class ModelCard(WireModel):
    """OpenAI's fields, then extensions."""

    id: str
    object: Literal["model"] = "model"
    created: int
    """Unix time in seconds when the server started."""
    owned_by: Literal["lowlat"] = "lowlat"
    max_model_len: int
    """Context length: maximum number of tokens of prompt and output together."""
    cache_bytes_per_token: int
    cache_dtype: str
    batch_invariant: bool
    """Whether tokens are independent of batch composition and speculative decoding."""
    has_chat_template: bool
    """Without a chat template, only completions are available."""
    supports_tools: bool
    reasoning: bool
    """Whether outputs may begin with reasoning, returned as reasoning_content."""


class ModelList(WireModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class Status(WireModel):
    status: Literal["ok"] = "ok"
