"""The app of `lowlat serve`, listening, over a scripted engine.

All of the server is real but the engine; SCRIPTS holds the output of the model.
"""

import asyncio
import contextlib
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import uvicorn
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lowlat.generate.completion import CompletionDelta
from lowlat.generate.model import Model
from lowlat.generate.params import SamplingParams
from lowlat.serve.app import build_app, make_state
from lowlat.serve.async_engine import AsyncEngine
from lowlat.serve.config import ServeConfig
from lowlat.serve.generation import Generation
from lowlat.serve.state import ServerState
from tests.fakes import EOS, USER, ScriptedModel, byte_tokenizer, gqa_config

CONTEXT = 4096
TABLE = "| a | b |\n|---|--:|\n| 1 | 2 |\n\n"
CODE = "```python\nprint('" + "a long line, " * 12 + "')\n```\n"
EVERYTHING = (
    "Text with `code`, a [link](https://example.org) and\nmore.\n\n> quoted\n\n"
    "| a | b | c | d |\n|---|--:|--|--|\n"
    "| one long cell | two long cells | three long cells | four long cells |\n\n"
    f"{CODE}\n" + "".join(f"- item {n}\n" for n in range(20))
)
SENTENCE = "Sentence * of a **very** long answer.\n\n"

Script = tuple[list[str], float]
"""Pieces of text, one token each, and the seconds before each piece."""


def script_for(text: str) -> Script:
    """Output of the model for `text`: by the first word, or a repetition."""
    match text.partition(" ")[0]:
        case "slow":
            return ["slow "] * 10_000, 0.01  # no test waits for its end
        case "wait":
            return ["late"], 60.0
        case "count":
            return [f"{n} " for n in range(100)], 0.001
        case "table":
            return [*(TABLE + CODE)], 0.0
        case "everything":
            return [*EVERYTHING], 0.0
        case "novel":
            return [f"{word} " for word in (SENTENCE * 300).split(" ")], 0.0
        case _:
            return [*f"You said: **{text}**"], 0.001


class ScriptedGeneration(Generation):
    """One answer; each piece is one token."""

    def __init__(self, engine: "ScriptedEngine", prompt: Sequence[int], max_tokens: int | None):
        self.prompt = tuple(prompt)
        self.cached_tokens = 0
        self.prefill_seconds, self.decode_seconds = 0.25, 0.5
        self.is_cancelled = False
        """Whether it was given up before its last token."""
        self._is_over = False
        pieces, self._pause = script_for(engine.last_text(prompt))
        self._is_truncated = max_tokens is not None and max_tokens < len(pieces)
        self._pieces = pieces[:max_tokens] if self._is_truncated else pieces

    async def __aiter__(self) -> AsyncIterator[CompletionDelta]:
        for number, piece in enumerate(self._pieces, 1):
            await asyncio.sleep(self._pause)
            is_last = number == len(self._pieces)
            self._is_over = is_last
            finish = ("length" if self._is_truncated else "stop") if is_last else None
            yield CompletionDelta(
                index=0, text=piece, tokens=(0,), logprobs=(), finish_reason=finish, error=None
            )

    def cancel(self) -> None:
        self.is_cancelled = not self._is_over


class ScriptedEngine(AsyncEngine):
    """What the app asks of a engine, without an engine."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.max_queue = 1
        self.generations: list[ScriptedGeneration] = []

    async def start(self) -> None:
        pass

    def check_room(self, num_preparing: int = 0) -> None:
        pass

    @property
    def is_healthy(self) -> bool:
        return True

    @property
    def has_failed(self) -> bool:
        return False

    async def drain(self, seconds: float) -> None:
        pass

    def check(self, prompt: Sequence[int], params: SamplingParams) -> None:
        pass

    async def submit(
        self, prompt: Sequence[int], params: SamplingParams, **options: object
    ) -> ScriptedGeneration:
        self.generations.append(ScriptedGeneration(self, prompt, params.max_tokens))
        return self.generations[-1]

    def last_text(self, prompt: Sequence[int]) -> str:
        """Text of the last user message; the whole prompt if there is none."""
        ids = list(prompt)
        if USER in ids:
            start = len(ids) - ids[::-1].index(USER)
            ids = ids[start : ids.index(EOS, start)]
        return self.model.tokenizer.decode(ids)


class Recorder:
    """Middleware that records the JSON bodies of completion requests in order."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self.requests: list[dict[str, Any]] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = bytearray()

        async def listen() -> Message:
            message = await receive()
            if message["type"] == "http.request":
                body.extend(message.get("body", b""))
                if not message.get("more_body"):
                    self.requests.append(json.loads(body))
            return message

        is_kept = scope["type"] == "http" and scope["path"].endswith("/completions")
        await self._app(scope, listen if is_kept else receive, send)


@dataclass(frozen=True)
class Server:
    """A running server, its engine and what it was asked."""

    url: str
    engine: AsyncEngine
    requests: list[dict[str, Any]]

    def wait_for_cancel(self) -> None:
        """Wait until the last requested answer is cancelled; fails after a minute."""
        assert isinstance(self.engine, ScriptedEngine)
        deadline = time.monotonic() + 60.0
        while not self.engine.generations[-1].is_cancelled:
            assert time.monotonic() < deadline, "the server went on generating"
            time.sleep(0.01)


@contextlib.contextmanager
def serve(engine: AsyncEngine | None = None, *, keys: tuple[str, ...] = ()) -> Iterator[Server]:
    """A server on a free port of this machine, for as long as the context lasts."""
    engine = engine or ScriptedEngine(tiny_chat_model())
    with serve_state(make_state(engine, ServeConfig(api_keys=keys))) as (url, requests):
        yield Server(url, engine, requests)


@contextlib.contextmanager
def serve_state(state: ServerState) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """The URL of a running server, and what it is asked."""
    recorder = Recorder(build_app(state))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        config = uvicorn.Config(
            recorder, log_config=None, access_log=False, ws="none", timeout_graceful_shutdown=1
        )
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", recorder.requests
        server.should_exit = True
        thread.join()


def tiny_chat_model(*, has_template: bool = True, name: str = "tiny") -> Model:
    """A model of bytes whose likeliest answer is the alphabet from `a` on."""
    tokenizer = byte_tokenizer() if has_template else byte_tokenizer(chat_template=None)
    config = gqa_config(max_position_embeddings=CONTEXT)

    def successor(token: int) -> int:
        return ord("a") if token > ord("z") else EOS if token == ord("z") else token + 1

    return Model(ScriptedModel(config, successor), tokenizer, name=name)
