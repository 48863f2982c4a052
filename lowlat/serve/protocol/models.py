"""What the server tells of its model and of itself."""

from typing import Literal

from lowlat.serve.protocol.base import WireModel


class ModelCard(WireModel):
    """OpenAI's fields, then extensions."""

    id: str
    object: Literal["model"] = "model"
    created: int
    """Unix time in seconds when the server started."""
    owned_by: Literal["lowlat"] = "lowlat"
    context_length: int
    """Most tokens of prompt and answer together."""
    cache_bytes_per_token: int
    cache_dtype: str
    batch_invariant: bool
    """Whether tokens never depend on what else runs, nor on speculation."""
    has_chat_template: bool
    """Without one there are completions, but no chats."""
    supports_tools: bool
    reasoning: bool
    """Whether answers may begin with thoughts, returned as reasoning_content."""


class ModelList(WireModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class Status(WireModel):
    status: Literal["ok"] = "ok"
