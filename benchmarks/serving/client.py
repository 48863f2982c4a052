"""Streaming client: sends one completion request and records when its chunks arrive.

Times are measured by the client and include HTTP. A failed request is recorded, so that failures
under load appear in the figures.
"""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from serving.workload import Work

TIMEOUT = 900.0
"""Seconds without a byte after which a request has failed."""


@dataclass(kw_only=True, slots=True)
class Answer:
    """The response to one request. Times are in seconds of time.perf_counter."""

    started: float
    pieces: list[float]
    """Arrival times of chunks with text."""
    ended: float = 0.0
    prompt_tokens: int = 0
    output_tokens: int = 0
    """Count in the server's usage object."""
    error: str | None = None

    @property
    def ttft(self) -> float:
        """Time to first token: seconds from sending to the first text."""
        return self.pieces[0] - self.started

    @property
    def gaps(self) -> list[float]:
        """Seconds between chunks."""
        return [after - before for before, after in zip(self.pieces, self.pieces[1:], strict=False)]

    @property
    def tpot(self) -> float | None:
        """Mean seconds per output token after the first; None for fewer than two."""
        if self.output_tokens < 2:
            return None
        return (self.pieces[-1] - self.pieces[0]) / (self.output_tokens - 1)


def body_of(work: Work, model: str, extra: dict[str, Any]) -> dict[str, Any]:
    """The request: greedy, exactly `work.output` tokens if the server supports `extra`."""
    return {
        "model": model,
        "prompt": list(work.prompt),
        "max_tokens": work.output,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
        **extra,
    }


async def ask(client: httpx.AsyncClient, body: dict[str, Any], expected: int) -> Answer:
    """One streamed response. Anything but `expected` tokens is recorded as its error."""
    answer = Answer(started=time.perf_counter(), pieces=[])
    try:
        async with client.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code != 200:
                text = (await response.aread()).decode(errors="replace")
                answer.error = f"HTTP {response.status_code}: {text[:200]}"
            else:
                await _read(response, answer)
    except (httpx.HTTPError, json.JSONDecodeError) as error:
        answer.error = f"{type(error).__name__}: {error}"
    answer.ended = time.perf_counter()
    if answer.error is None and (answer.output_tokens != expected or not answer.pieces):
        answer.error = f"{answer.output_tokens} tokens instead of {expected}"
    return answer


async def _read(response: httpx.Response, answer: Answer) -> None:
    async for event in events(response):
        if "error" in event:
            answer.error = f"error in the stream: {json.dumps(event['error'])[:200]}"
            return
        if any(choice.get("text") for choice in event.get("choices", ())):
            answer.pieces.append(time.perf_counter())
        if usage := event.get("usage"):
            answer.prompt_tokens = usage["prompt_tokens"]
            answer.output_tokens = usage["completion_tokens"]


async def events(response: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    """The JSON objects of a server-sent stream, up to its [DONE]."""
    async for line in response.aiter_lines():
        if not line.startswith("data:"):
            continue
        data = line.removeprefix("data:").strip()
        if data == "[DONE]":
            return
        yield json.loads(data)


def new_client(url: str, *, connections: int, key: str | None = None) -> httpx.AsyncClient:
    """A client with its own connection pool, without stale connections to a stopped server."""
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    limits = httpx.Limits(max_connections=connections, max_keepalive_connections=connections)
    return httpx.AsyncClient(base_url=url, timeout=TIMEOUT, limits=limits, headers=headers)


async def ask_all(
    url: str, work: Sequence[Work], model: str, extra: dict[str, Any], concurrency: int
) -> list[Answer]:
    """All responses, with `concurrency` requests in flight."""
    waiting = iter(work)
    answers: list[Answer] = []

    async def user(client: httpx.AsyncClient) -> None:
        for one in waiting:
            answers.append(await ask(client, body_of(one, model, extra), one.output))

    async with new_client(url, connections=concurrency) as client:
        await asyncio.gather(*(user(client) for _ in range(concurrency)))
    return answers
