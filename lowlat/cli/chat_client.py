"""Chat client: a model on a server with OpenAI's API, as a chat backend.

Sends the requests and explains their errors. Statistics that the server does not send are left out.
"""

import json
import os
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console

from lowlat.cli.chat_backend import ChatBackend, Message
from lowlat.cli.tables import print_rows
from lowlat.generate.completion import Completion, Usage
from lowlat.generate.params import SamplingOptions
from lowlat.serve.config import read_keys
from lowlat.utils.errors import UserError

CONNECT_SECONDS = 10.0
THINKING, THOUGHT = "<think>\n", "\n</think>\n\n"


@dataclass(slots=True)
class _Answer:
    """The received part of a streamed answer."""

    write: Callable[[str], None]
    pieces: list[str] = field(default_factory=list)
    finish_reason: str | None = None
    usage: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, Any] = field(default_factory=dict)
    is_thinking: bool = False

    def push(self, chunk: dict[str, Any]) -> None:
        """Add one chunk of the stream."""
        self.usage = chunk.get("usage") or self.usage
        self.seconds = chunk.get("lowlat") or self.seconds
        for choice in chunk.get("choices") or []:
            delta = choice.get("delta") or {}
            self._push_reasoning(delta.get("reasoning_content"))
            if delta.get("content"):
                self._end_reasoning()
                self.pieces.append(delta["content"])
                self.write(delta["content"])
            self.finish_reason = choice.get("finish_reason") or self.finish_reason

    def _push_reasoning(self, text: str | None) -> None:
        """Print reasoning text, which is not part of the answer."""
        if not text:
            return
        if not self.is_thinking:
            self.write(THINKING)
            self.is_thinking = True
        self.write(text)

    def _end_reasoning(self) -> None:
        if self.is_thinking:
            self.write(THOUGHT)
            self.is_thinking = False

    def completion(self) -> Completion:
        count = self.usage.get("completion_tokens", 0)
        # Servers send other reasons too ("tool_calls", "content_filter", "abort").
        ended = "length" if self.finish_reason == "length" else "stop"
        return Completion(
            "".join(self.pieces),
            token_ids=(),
            finish_reason=ended if self.finish_reason else "abort",
            logprobs=None,
            usage=Usage(
                prompt_tokens=self.usage.get("prompt_tokens", 0),
                completion_tokens=count,
                prefill_seconds=self.seconds.get("prefill_seconds", 0.0),
                decode_seconds=self.seconds.get("decode_seconds", 0.0),
            ),
        )


class _Refused(UserError):
    """An error response, with the rejected field `param` if the server names it."""

    def __init__(self, message: str, param: str | None) -> None:
        super().__init__(message)
        self.param = param


class ChatClient(ChatBackend):
    """The model `name` of the server at `url`, or its only model.

    Raises UserError if the server cannot be reached, rejects the key, or does not have the model.
    """

    def __init__(self, url: str, *, name: str | None = None, api_key: str | None = None) -> None:
        self._url = url.rstrip("/").removesuffix("/v1")
        _check_port(url)
        headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        # An answer may take minutes, so only connecting has a timeout.
        timeout = httpx.Timeout(None, connect=CONNECT_SECONDS)
        self._client = httpx.Client(headers=headers, timeout=timeout)
        self._model = self._choose(name)

    @property
    def description(self) -> str:
        context = self._model.get("max_model_len")
        detail = "" if context is None else f", context {context:,}"
        return f"{self._model['id']} at {self._url}{detail}"

    @property
    def cache_bytes_per_token(self) -> int:
        return self._model.get("cache_bytes_per_token") or 0

    def answer(
        self,
        messages: Sequence[Message],
        sampling: SamplingOptions,
        write: Callable[[str], None],
        interrupted: threading.Event,
    ) -> Completion:
        body = {
            "model": self._model["id"],
            "messages": list(messages),
            "stream": True,
            "stream_options": {"include_usage": True},
            **{name: value for name, value in sampling.items() if value is not None},
        }
        try:
            return self._answer(body, write, interrupted)
        except _Refused as refused:
            if refused.param not in ("max_tokens", "max_completion_tokens"):
                raise
            # Fewer tokens fit in the context; without max_tokens the server uses all of them.
            del body["max_tokens"]
            return self._answer(body, write, interrupted)

    def _answer(
        self, body: dict[str, Any], write: Callable[[str], None], interrupted: threading.Event
    ) -> Completion:
        answer = _Answer(write)
        for chunk in self._stream(body):
            try:
                answer.push(chunk)
            except (AttributeError, TypeError) as error:
                raise self._foreign() from error
            if interrupted.is_set():
                break
        return answer.completion()

    def report(self, completion: Completion, console: Console) -> None:
        usage = completion.usage
        rows = {"model": self.description}
        if self.cache_bytes_per_token:
            rows["cache per token"] = f"{self.cache_bytes_per_token:,} bytes"
        if usage.prompt_tokens:
            rows["speed"] = (
                f"{usage.decode_tokens_per_second:.1f} tok/s ({usage.completion_tokens} tokens; "
                f"prompt of {usage.prompt_tokens} in {usage.prefill_seconds:.2f} s)"
            )
        print_rows(rows, console)

    def _choose(self, name: str | None) -> dict[str, Any]:
        try:
            response = self._client.get(f"{self._url}/v1/models")
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise self._unreachable(error) from error
        self._check(response)
        try:
            models = {model["id"]: model for model in response.json()["data"]}
        except (ValueError, KeyError, TypeError) as error:
            raise self._foreign() from error
        if name is None and len(models) == 1:
            return next(iter(models.values()))
        if name not in models:
            known = ", ".join(models)
            what = "several models" if name is None else f"no model '{name}'"
            raise UserError(f"{self._url} has {what}; give one of: {known}")
        return models[name]

    def _stream(self, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The chunks of a streamed answer."""
        try:
            url = f"{self._url}/v1/chat/completions"
            with self._client.stream("POST", url, json=body) as response:
                self._check(response)
                for line in response.iter_lines():
                    if not line.startswith("data:") or line.endswith("[DONE]"):
                        continue
                    yield self._chunk(line.removeprefix("data:"))
        except httpx.HTTPError as error:
            raise self._unreachable(error) from error

    def _chunk(self, data: str) -> dict[str, Any]:
        """A chunk of a stream. Raises UserError for a malformed chunk or an error."""
        try:
            chunk = json.loads(data)
        except ValueError as error:
            raise self._foreign() from error
        if not isinstance(chunk, dict):
            raise self._foreign()
        if error := chunk.get("error"):
            message = error.get("message") if isinstance(error, dict) else None
            raise UserError(f"{self._url}: {message or error}")
        return chunk

    def _check(self, response: httpx.Response) -> None:
        if response.is_success:
            return
        response.read()
        param = None
        try:
            error = response.json()["error"]
            message, param = error["message"], error.get("param")
        except (ValueError, KeyError, TypeError, AttributeError):
            message = f"status {response.status_code}"
        hint = "; give the key's file as --api-key-file" if response.status_code == 401 else ""
        raise _Refused(f"{self._url}: {message}{hint}", param)

    def _foreign(self) -> UserError:
        return UserError(
            f"{self._url} does not answer as OpenAI's API does; check --url and what runs there"
        )

    def _unreachable(self, error: Exception) -> UserError:
        return UserError(
            f"cannot talk to {self._url}: {error}; check --url and that the server runs"
        )


def _check_port(url: str) -> None:
    """Raises UserError for a port out of range, which would connect to another port."""
    try:
        port = httpx.URL(url).port
    except httpx.InvalidURL:  # reported by the first request
        return
    if port is not None and not 1 <= port <= 65535:
        raise UserError(f"--url {url}: port {port} is not from 1 to 65535; give the server's")


def read_key(path: Path | None) -> str | None:
    """The first key of an --api-key-file; without one, LOWLAT_API_KEY from the environment."""
    if path is None:
        origin, key = "LOWLAT_API_KEY", os.environ.get("LOWLAT_API_KEY") or None
    else:
        origin, key = f"--api-key-file '{path}'", read_keys(path)[0]
    if key is not None and not re.fullmatch("[!-~]+", key):
        raise UserError(f"{origin}: a key must be printable ASCII characters without spaces")
    return key
