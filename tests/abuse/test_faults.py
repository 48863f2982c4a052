"""Injected errors inside the server, over HTTP: only the affected request fails.

Each part that works on a request is made to fail for requests that hold POISON.
"""

import json
import threading
from collections.abc import Callable
from typing import Any

import pytest

from lowlat.engine.engine import Engine
from lowlat.engine.request_table import RequestTable
from lowlat.engine.runner import ModelRunner
from lowlat.generate.completion import CompletionBuilder
from lowlat.generate.grammar import CompiledGrammar, GrammarCompiler, GrammarState
from lowlat.serve import async_engine as engine_module
from lowlat.serve.chat.output_parser import OutputParser
from lowlat.serve.protocol.structured_outputs import StructuredOutputs
from lowlat.serve.routes import chat as routes_chat
from lowlat.serve.routes import completions as routes_completions
from lowlat.text.tokenizer import Tokenizer

from .local import NAME, Local, counting_model, listening, successors, until
from .wire import SECONDS, Reply, call, get

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
POISON = "~"
"""Its byte, 126, is in no other request, and no other token is followed by it."""
SECRET = "secret detail"


def is_poisoned(*values: object) -> bool:
    """Whether POISON is in texts, ids or prompts."""
    return any(
        POISON in value if isinstance(value, str) else 126 in value  # pyright: ignore
        for value in values
    )


def fail() -> None:
    raise RuntimeError(SECRET)


Patch = Callable[[pytest.MonkeyPatch], None]


def in_the_model(patch: pytest.MonkeyPatch) -> None:
    step = ModelRunner.step

    def broken(self: ModelRunner, chunks: Any) -> Any:
        if any(is_poisoned(chunk.tokens) for chunk in chunks):
            fail()
        return step(self, chunks)

    patch.setattr(ModelRunner, "step", broken)


def in_the_sampler(patch: pytest.MonkeyPatch) -> None:
    append = RequestTable.append

    def broken(self: RequestTable, sequence: Any, *rest: Any) -> Any:
        if is_poisoned(sequence.request.prompt):
            fail()
        return append(self, sequence, *rest)

    patch.setattr(RequestTable, "append", broken)


def in_detokenizing(patch: pytest.MonkeyPatch) -> None:
    push = CompletionBuilder.push

    def broken(self: Any, event: Any) -> None:
        if is_poisoned(self.request.prompt):
            fail()
        push(self, event)

    patch.setattr(CompletionBuilder, "push", broken)


def in_starting(patch: pytest.MonkeyPatch) -> None:
    add = Engine.add

    def broken(self: Engine, prompt: Any, *rest: Any) -> Any:
        if is_poisoned(prompt):
            fail()
        return add(self, prompt, *rest)

    patch.setattr(Engine, "add", broken)


def in_tokenizing(patch: pytest.MonkeyPatch) -> None:
    encode = Tokenizer.encode

    def broken(self: Tokenizer, text: str, **more: Any) -> Any:
        if is_poisoned(text):
            fail()
        return encode(self, text, **more)

    patch.setattr(Tokenizer, "encode", broken)
    prepare = routes_chat.prepare_chat

    def broken_chat(model: Any, request: Any) -> Any:
        if is_poisoned(str(request.messages)):
            fail()
        return prepare(model, request)

    patch.setattr(routes_chat, "prepare_chat", broken_chat)


def in_admission(patch: pytest.MonkeyPatch) -> None:
    check = Engine.check

    def broken(self: Engine, prompt: Any, params: Any) -> Any:
        if is_poisoned(prompt):
            fail()
        return check(self, prompt, params)

    patch.setattr(Engine, "check", broken)


FAULTS: dict[str, Patch] = {
    "model": in_the_model,
    "sampler": in_the_sampler,
    "detokenizing": in_detokenizing,
    "starting": in_starting,
    "tokenizing": in_tokenizing,
    "admission": in_admission,
}


def in_masks(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(GrammarState, "mask", lambda self: fail())


def in_accepting(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(GrammarState, "accept", lambda self, token: fail())


def in_starting_a_grammar(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(CompiledGrammar, "start", lambda self: fail())


def in_compiling(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(GrammarCompiler, "compile", lambda self, output: fail())


def in_reading_grammars(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(StructuredOutputs, "to_output", lambda self: fail())


GRAMMAR_FAULTS: dict[str, Patch] = {
    "mask": in_masks,
    "accept": in_accepting,
    "start": in_starting_a_grammar,
    "compile": in_compiling,
    "read": in_reading_grammars,
}


def completion(text: str, **more: Any) -> dict[str, Any]:
    return {"model": NAME, "prompt": text, "max_tokens": 9, "temperature": 0, **more}


def check_failed(reply: Reply, *, stream: bool) -> None:
    """In the error shape, as a 500 or as the last event of a stream, and without details."""
    assert SECRET.encode() not in reply.body
    if stream and reply.status == 200:
        *_, last = [part for part in reply.body.decode().split("\n\n") if part]
        error = json.loads(last.removeprefix("data: "))["error"]
        assert b"[DONE]" not in reply.body
    else:
        assert reply.status == 500
        error = reply.error
    assert (error["type"], error["code"]) == ("server_error", "internal_error")


def check_others(server: Local, send_bad: Callable[[], None]) -> None:
    """While and after bad requests are sent, good ones are answered right."""
    answers: list[Reply] = []

    def ask() -> None:
        for text in ("abc", "x", "hello" * 9):
            answers.append(call(server.port, COMPLETIONS, completion(text)))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    send_bad()
    for thread in threads:
        thread.join(SECONDS)
    assert len(answers) == 12
    for reply in answers:
        assert reply.status == 200, reply
        text = json.loads(reply.body)["choices"][0]["text"]
        assert text in {successors(end, 9) for end in "cxo"}
    assert get(server.port, "/health").status == 200
    until(lambda: server.is_idle, "the end")
    server.model.engine.check_integrity()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("fault", FAULTS)
def test_an_error_ends_its_own_request(
    monkeypatch: pytest.MonkeyPatch, fault: str, stream: bool
) -> None:
    with listening() as server:
        FAULTS[fault](monkeypatch)

        def send() -> None:
            for _ in range(3):
                body = completion(POISON, stream=stream)
                check_failed(call(server.port, COMPLETIONS, body), stream=stream)
                messages = [{"role": "user", "content": POISON}]
                chat = {"model": NAME, "messages": messages, "max_tokens": 9, "stream": stream}
                check_failed(call(server.port, CHAT, chat), stream=stream)

        check_others(server, send)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("fault", GRAMMAR_FAULTS)
def test_a_grammar_error_ends_its_own_request(
    monkeypatch: pytest.MonkeyPatch, fault: str, stream: bool
) -> None:
    with listening() as server:
        GRAMMAR_FAULTS[fault](monkeypatch)
        body = completion("abc", stream=stream, structured_outputs={"regex": "[a-z]+"})

        def send() -> None:
            for _ in range(3):
                check_failed(call(server.port, COMPLETIONS, body), stream=stream)

        check_others(server, send)


@pytest.mark.parametrize("stream", [False, True])
def test_an_error_in_parsing_the_answer(monkeypatch: pytest.MonkeyPatch, stream: bool) -> None:
    """The parser of answers, and the step to the wire."""
    with listening() as server:
        with monkeypatch.context() as patch:
            patch.setattr(OutputParser, "push", lambda self, text: fail())
            patch.setattr(routes_chat, "usage_of", lambda call: fail())
            messages = [{"role": "user", "content": "x"}]
            chat = {"model": NAME, "messages": messages, "max_tokens": 9, "stream": stream}
            check_others(server, lambda: check_failed(call(server.port, CHAT, chat), stream=stream))
        monkeypatch.setattr(routes_completions, "usage_of", lambda call: fail())
        more = {"stream_options": {"include_usage": True}} if stream else {}
        body = completion("abc", stream=stream, **more)
        check_failed(call(server.port, COMPLETIONS, body), stream=stream)
        until(lambda: server.is_idle, "the end")


@pytest.mark.parametrize("error", [MemoryError, RecursionError, AssertionError, KeyError])
def test_no_kind_of_exception_goes_further(
    monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    def broken() -> None:
        raise error(SECRET)

    monkeypatch.setitem(globals(), "fail", broken)
    with listening() as server:
        in_the_sampler(monkeypatch)
        body = completion(POISON)
        check_others(
            server, lambda: check_failed(call(server.port, COMPLETIONS, body), stream=False)
        )


def test_an_engine_that_ends_is_not_healthy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Regression: clients that wait forever, and a load balancer that keeps sending requests."""
    model = counting_model()
    with listening(model) as server:
        assert get(server.port, "/health").status == 200
        monkeypatch.setattr(model.engine.scheduler, "schedule", fail)
        for stream in (False, True):
            reply = call(server.port, COMPLETIONS, completion("abc", stream=stream))
            if reply.status == 503:
                assert reply.error["code"] == "engine_stopped"
            else:
                check_failed(reply, stream=stream)
        until(lambda: get(server.port, "/health").status == 503, "the 503")
        assert get(server.port, "/health").error["code"] == "engine_stopped"
        assert get(server.port, "/ready").status == 503
        assert call(server.port, COMPLETIONS, completion("abc")).status == 503
        assert get(server.port, "/v1/models").status == 200


def test_an_engine_that_hangs_is_not_healthy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "STALL_SECONDS", 0.2)
    model = counting_model()
    step, may_go = model.engine.step, threading.Event()

    def held() -> Any:
        assert may_go.wait(SECONDS)
        return step()

    with listening(model) as server:
        monkeypatch.setattr(model.engine, "step", held)
        answers: list[Reply] = []
        thread = threading.Thread(
            target=lambda: answers.append(call(server.port, COMPLETIONS, completion("abc")))
        )
        thread.start()
        until(lambda: get(server.port, "/health").status == 503, "the 503")
        may_go.set()
        thread.join(SECONDS)
        assert json.loads(answers[0].body)["choices"][0]["text"] == successors("abc", 9)
        until(lambda: get(server.port, "/health").status == 200, "the 200")


def test_an_error_in_a_route_is_returned_without_details(monkeypatch: pytest.MonkeyPatch) -> None:
    from lowlat.serve.routes import endpoint

    async def broken(*_: object, **__: object) -> None:
        fail()

    with listening() as server:
        monkeypatch.setattr(endpoint, "read_body", broken)
        check_failed(call(server.port, COMPLETIONS, completion("abc")), stream=False)
        monkeypatch.undo()
        assert call(server.port, COMPLETIONS, completion("abc")).status == 200
        until(lambda: server.is_idle, "the end")


def test_one_of_several_prompts_fails_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer is whole or an error; the other prompts' pages come back."""
    with listening() as server:
        in_the_sampler(monkeypatch)
        body = completion("abc") | {"prompt": ["abc", POISON, "x"], "max_tokens": 300}
        for stream in (False, True):
            check_failed(call(server.port, COMPLETIONS, {**body, "stream": stream}), stream=stream)
            until(lambda: server.is_idle, "the end")


def test_the_loop_is_not_held_up_by_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Regression: a template or a long text that stops all other connections."""
    may_go = threading.Event()
    prepare = routes_chat.prepare_chat

    def slow(*args: Any) -> Any:
        assert may_go.wait(SECONDS)
        return prepare(*args)

    monkeypatch.setattr(routes_chat, "prepare_chat", slow)
    with listening() as server:
        messages = [{"role": "user", "content": "x"}]
        chat = {"model": NAME, "messages": messages, "max_tokens": 3}
        thread = threading.Thread(target=lambda: call(server.port, CHAT, chat))
        thread.start()
        until(lambda: server.state.num_requests == 1, "the chat")
        assert call(server.port, COMPLETIONS, completion("abc")).status == 200
        may_go.set()
        thread.join(SECONDS)
        until(lambda: server.is_idle, "the end")
