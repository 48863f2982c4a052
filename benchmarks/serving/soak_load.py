"""Load generator of the soak test, with a canary request whose output must not change.

Counts responses and checks them; `serving.soak_checks` has samples and bounds.
"""

import asyncio
import json
import random
import time
from dataclasses import dataclass, field
from typing import Any

import httpx

from serving.client import events
from serving.soak_requests import CHAT, COMPLETIONS, Call, Mix

CANARY_SECONDS = 5.0
CANARY_TOKENS = 24
AT_ONCE = 6
MOST_FAULTS = 20
"""Number of failures to report per kind."""


@dataclass(kw_only=True, slots=True)
class Tally:
    """Counts of responses."""

    answered: int = 0
    cancelled: int = 0
    refused: int = 0
    busy: int = 0
    canaries: int = 0
    kinds: dict[str, int] = field(default_factory=dict)
    """Calls by manner and kind."""
    faults: list[str] = field(default_factory=list)
    """The first MOST_FAULTS wrong responses, one line each."""
    fault_count: int = 0

    def fault(self, text: str) -> None:
        self.fault_count += 1
        if len(self.faults) < MOST_FAULTS:
            self.faults.append(text[:400])


class Load:
    """Sends requests to one server until stopped."""

    def __init__(self, client: httpx.AsyncClient, mix: Mix, model: str, *, rate: float) -> None:
        """`rate`: mean calls per second of a Poisson process."""
        self.tally = Tally()
        self._client = client
        self._mix = mix
        self._model = model
        self._rate = rate
        self._moments = random.Random(rate)

    async def run(self, seconds: float) -> None:
        """Send requests for this long, then wait for the last responses."""
        end = time.monotonic() + seconds
        async with asyncio.TaskGroup() as group:
            group.create_task(self._canaries(end))
            while time.monotonic() < end:
                group.create_task(self._call(self._mix.draw()))
                await asyncio.sleep(self._moments.expovariate(self._rate))

    async def warm_up(self, count: int) -> None:
        """Make `count` calls one after the other, then AT_ONCE of each invalid kind together, so
        that the server has started all threads and allocated all buffers.
        """
        for _ in range(count):
            await self._call(self._mix.draw())
        for call in self._mix.invalid():
            await asyncio.gather(*(self._call(call) for _ in range(AT_ONCE)))
        await self.canary()

    async def prefill(self, words: int) -> None:
        """Send a prompt of this many random words, which shares no prefix with others."""
        body = {"model": self._model, "prompt": self._mix.words(words, words), "max_tokens": 1}
        (await self._client.post(COMPLETIONS, json=body)).raise_for_status()

    async def _call(self, call: Call) -> None:
        kind = f"{call.manner}: {call.kind}"
        self.tally.kinds[kind] = self.tally.kinds.get(kind, 0) + 1
        try:
            if call.abort_seconds is None:
                await self._check(call)
            else:
                await self._abort(call, call.abort_seconds)
        except (httpx.HTTPError, json.JSONDecodeError, KeyError, TypeError) as error:
            self.tally.fault(f"{call.manner} {call.kind}: {type(error).__name__}: {error}")

    async def _abort(self, call: Call, seconds: float) -> None:
        """Send a request and disconnect after `seconds`; any partial response is correct."""
        try:
            async with asyncio.timeout(seconds):
                await self._exchange(call)
        except TimeoutError:
            pass  # the intended abort
        self.tally.cancelled += 1

    async def _check(self, call: Call) -> None:
        status, content = await self._exchange(call)
        if status == 429 and call.manner == "ordinary":
            self.tally.busy += 1
        elif call.manner == "invalid":
            if 400 <= status < 500 and is_error(content):
                self.tally.refused += 1
            else:
                self.tally.fault(f"invalid {call.kind}: HTTP {status} {json.dumps(content)}")
        else:
            wrong = wrong_with(call, content) if status == 200 else json.dumps(content)
            if wrong is None:
                self.tally.answered += 1
            else:
                self.tally.fault(f"{call.kind} at {call.path}: HTTP {status} {wrong}")

    async def _exchange(self, call: Call) -> tuple[int, Any]:
        """Status and JSON of the response; for a stream, the list of its events."""
        body = call.body if isinstance(call.body, bytes) else json.dumps(call.body).encode()
        headers = {"content-type": "application/json"}
        request = self._client.stream("POST", call.path, content=body, headers=headers)
        async with request as response:
            if response.status_code == 200 and call.is_stream:
                return 200, [event async for event in events(response)]
            return response.status_code, json.loads(await response.aread())

    async def _canaries(self, end: float) -> None:
        expected: Any = None
        while time.monotonic() < end:
            answer = await self.canary()
            expected = answer if expected is None else expected
            self.tally.canaries += 1
            if answer != expected:
                self.tally.fault(f"canary changed: {json.dumps(answer)}, first {expected!r}")
            await asyncio.sleep(CANARY_SECONDS)

    async def canary(self) -> Any:
        """Choices of the canary response, with text and log-probabilities."""
        body = {
            "model": self._model,
            "prompt": "The kettle sings and",
            "max_tokens": CANARY_TOKENS,
            "temperature": 0,
            "ignore_eos": True,
            "logprobs": 1,
        }
        response = await self._client.post(COMPLETIONS, json=body)
        return response.json().get("choices", response.text)

    async def has_chat(self) -> bool:
        """Whether the model has a chat template."""
        message = {"role": "user", "content": "Hello"}
        body = {"model": self._model, "messages": [message], "max_tokens": 1}
        return (await self._client.post(CHAT, json=body)).status_code == 200


def is_error(content: Any) -> bool:
    """Whether `content` is an error in the API's format."""
    error = content.get("error") if isinstance(content, dict) else None
    return isinstance(error, dict) and {"message", "type", "param", "code"} <= set(error)


def wrong_with(call: Call, content: Any) -> str | None:
    """Description of the first error in a response; None if it is correct."""
    assert isinstance(call.body, dict)
    wanted = call.body.get("n", 1)
    parts = content if call.is_stream else [content]
    if any("error" in part for part in parts):
        return f"error within: {json.dumps(parts[-1])}"
    choices = [choice for part in parts for choice in part.get("choices", ())]
    ended = {choice["index"] for choice in choices if choice.get("finish_reason")}
    if ended != set(range(wanted)):
        return f"{len(ended)} of {wanted} choices ended"
    reasons = {choice["finish_reason"] for choice in choices if choice.get("finish_reason")}
    return None if reasons <= {"stop", "length"} else f"ended by {sorted(reasons)}"
