"""The answer to a completions request, whole or streamed.

Owns the form of choices and of their log-probabilities, which is older than that of chats.
"""

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Literal

from lowlat.generate import completion
from lowlat.serve.call import Call
from lowlat.serve.generation import Delta
from lowlat.serve.protocol import completions as wire
from lowlat.serve.replies import new_id, now, timings_of, usage_of
from lowlat.serve.stream import DONE, event
from lowlat.text.tokenizer import Tokenizer


class CompletionReply:
    """Makes the answer to `request` from the deltas of `call`; `echoes` are the prompts' texts
    that answers begin with.
    """

    def __init__(self, call: Call, request: wire.CompletionRequest, echoes: Sequence[str]) -> None:
        self._call = call
        self._request = request
        self._n = request.n or 1
        self._echoes = echoes
        self._id = new_id("cmpl-")
        self._created = now()

    async def whole(self) -> wire.CompletionResponse:
        """The answer when it is complete."""
        count = self._n * len(self._echoes)
        texts = [[self._echoes[index // self._n]] for index in range(count)]
        logprobs: list[list[completion.TokenLogprob]] = [[] for _ in range(count)]
        reasons: list[Literal["stop", "length"] | None] = [None] * count
        async with aclosing(self._call.deltas()) as deltas:
            async for number, delta in deltas:
                index = number * self._n + delta.index
                texts[index].append(delta.text)
                logprobs[index].extend(delta.logprobs)
                reasons[index] = _finish(delta)
        choices = [
            wire.CompletionChoice(
                index=index,
                text="".join(texts[index]),
                logprobs=self._logprobs(logprobs[index]),
                finish_reason=reasons[index],
            )
            for index in range(count)
        ]
        return self._response(choices, is_last=True)

    async def events(self) -> AsyncGenerator[bytes, None]:
        """The answer as events while it comes."""
        begun: set[int] = set()
        async with aclosing(self._call.deltas()) as deltas:
            async for number, delta in deltas:
                index = number * self._n + delta.index
                echo = "" if index in begun else self._echoes[number]
                begun.add(index)
                if not (echo or delta.text or delta.logprobs or delta.finish_reason):
                    continue
                choice = wire.CompletionChoice(
                    index=index,
                    text=echo + delta.text,
                    logprobs=self._logprobs(delta.logprobs),
                    finish_reason=_finish(delta),
                )
                yield event(self._response([choice]).model_dump_json())
        if self._request.includes_usage:
            yield event(self._response([], is_last=True).model_dump_json())
        yield DONE

    def _response(
        self, choices: list[wire.CompletionChoice], *, is_last: bool = False
    ) -> wire.CompletionResponse:
        return wire.CompletionResponse(
            id=self._id,
            created=self._created,
            model=self._request.model,
            choices=choices,
            usage=usage_of(self._call) if is_last else None,
            lowlat=timings_of(self._call) if is_last else None,
        )

    def _logprobs(self, entries: Sequence[completion.TokenLogprob]) -> wire.LegacyLogprobs | None:
        if self._request.logprobs is None:
            return None
        tokenizer = self._call.services.model.tokenizer
        return wire.LegacyLogprobs(
            tokens=[_token_text(tokenizer, entry.token) for entry in entries],
            token_logprobs=[entry.logprob for entry in entries],
            top_logprobs=[
                {_token_text(tokenizer, token): value for token, value in entry.top}
                for entry in entries
            ],
            text_offset=[entry.start for entry in entries],
        )


def _finish(delta: Delta) -> Literal["stop", "length"] | None:
    if delta.finish_reason is None:
        return None
    return "length" if delta.finish_reason == "length" else "stop"


def _token_text(tokenizer: Tokenizer, token: int) -> str:
    """A token's text, or its bytes where they are no whole characters: no two tokens look alike."""
    data = tokenizer.id_to_bytes(token)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
