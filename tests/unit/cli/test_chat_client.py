"""lowlat chat --url: a conversation over HTTP, and what its faults say."""

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

from lowlat.cli.chat_client import ChatClient, read_key
from lowlat.utils.errors import UserError

Invoke = Callable[..., Result]
KEY = "secret"


class Script(BaseHTTPRequestHandler):
    """A server that answers with the words of its script and remembers what it was asked."""

    asked: list[dict[str, Any]]
    deltas: list[dict[str, Any]]
    models: list[str]
    listed: Any = None
    """What /v1/models says instead of them."""
    ending: str = "length"
    has_usage: bool = True
    after: bytes = b""
    """What the stream says at its end."""
    refused: str | None = None
    """The field a refusal names."""

    def do_GET(self) -> None:
        if self.headers["Authorization"] != f"Bearer {KEY}":
            self._send(401, {"error": {"message": "the API key is missing or wrong"}})
            return
        if self.listed is not None:
            self._send(200, self.listed)
            return
        entries = [{"id": name, "cache_bytes_per_token": 480} for name in self.models]
        self._send(200, {"data": entries})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append(body)
        if body.get("max_tokens", 0) > 1000:
            fault = {"message": "max_tokens: at most 1000", "param": self.refused}
            self._send(400, {"error": fault})
            return
        self.send_response(200)
        self.end_headers()
        chunks = [{"choices": [{"delta": delta, "finish_reason": None}]} for delta in self.deltas]
        chunks.append({"choices": [{"delta": {}, "finish_reason": self.ending}]})
        usage = {"prompt_tokens": 7, "completion_tokens": 4}
        seconds = {"prefill_seconds": 0.5, "decode_seconds": 0.3}
        if self.has_usage:
            chunks.append({"choices": [], "usage": usage, "lowlat": seconds})
        for chunk in chunks:
            self.wfile.write(f"data: {json.dumps(chunk)}\n\n".encode())
        self.wfile.write(self.after + b"data: [DONE]\n\n")

    def _send(self, status: int, body: dict[str, Any]) -> None:
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Script]]:
    class Own(Script):
        pass

    Own.asked = []
    Own.deltas = [{"role": "assistant"}, {"content": "ab"}, {"content": "cd"}]
    Own.models = ["tiny"]
    monkeypatch.setenv("LOWLAT_API_KEY", KEY)
    yield Own


@pytest.fixture
def url(script: type[Script]) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), script)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_conversation_over_http(lowlat: Invoke, url: str, script: type[Script]) -> None:
    result = lowlat("chat", "--url", url, "--seed", "3", "--system", "S", stdin="one\ntwo\n")
    assert result.exit_code == 0, result.stderr
    assert result.stdout == "abcd\nabcd\n"
    assert "4 tokens (token limit), 10.0 tok/s; prefill 7 tokens in 0.50 s; KV cache 11 x 480" in (
        result.stderr
    )
    first, second = script.asked
    assert first["model"] == "tiny" and first["seed"] == 3 and first["stream"] is True
    assert [message["content"] for message in second["messages"]] == ["S", "one", "abcd", "two"]
    assert "min_p" in first and "logit_bias" not in first


def test_figures_that_a_server_keeps_are_not_made_up(
    lowlat: Invoke, url: str, script: type[Script]
) -> None:
    """Which they are, too, where an answer is left before its end."""
    script.has_usage = False
    result = lowlat("chat", "--url", url, stdin="one\n")
    assert result.stdout == "abcd\n"
    assert result.stderr.endswith("no usage from the server (token limit)\n")
    assert "tok/s" not in lowlat("chat", "--url", url, "--once", "hello").stdout


def test_once_prints_a_report(lowlat: Invoke, url: str) -> None:
    result = lowlat("chat", "tiny", "--url", f"{url}/v1/", "--once", "hello")
    assert result.stdout.startswith("abcd\n\nmodel")
    for words in ("tiny at http://127.0.0.1", "480 bytes", "10.0 tok/s"):
        assert words in result.stdout


def test_reasoning_is_shown_and_is_no_part_of_the_answer(
    lowlat: Invoke, url: str, script: type[Script]
) -> None:
    script.deltas = [{"reasoning_content": "hm"}, {"reasoning_content": "m"}, {"content": "yes"}]
    result = lowlat("chat", "--url", url, stdin="one\ntwo\n")
    assert result.stdout.startswith("<think>\nhmm\n</think>\n\nyes\n")
    assert script.asked[1]["messages"][1]["content"] == "yes"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("other",), "has no model 'other'; give one of: tiny"),
        (("--max-tokens", "2000", "--once", "hello"), "max_tokens: at most 1000"),
        (("--dtype", "int4"), "--dtype is set on the server"),
        (("--threads", "1"), "--threads is set on the server"),
        (("--api-key-file", "/nowhere"), "--api-key-file '/nowhere': No such file"),
    ],
)
def test_faults_are_one_line(
    lowlat: Invoke, url: str, options: tuple[str, ...], message: str
) -> None:
    result = lowlat("chat", *options, "--url", url)
    assert isinstance(result.exception, UserError)
    assert message in str(result.exception) and "\n" not in str(result.exception)


def test_a_context_that_leaves_less_than_asked_for_is_filled(
    lowlat: Invoke, url: str, script: type[Script]
) -> None:
    """Regression: a server's context that ends conversations sooner than a local model's does."""
    script.refused = "max_tokens"
    result = lowlat("chat", "--url", url, "--max-tokens", "2000", stdin="one\n")
    assert result.exit_code == 0 and result.stdout == "abcd\n"
    assert "max_tokens" not in script.asked[1] and script.asked[1]["messages"]


@pytest.mark.parametrize("reason", ["abort", "function_call", "content_filter", "eos"])
def test_other_servers_have_reasons_of_their_own(
    lowlat: Invoke, url: str, script: type[Script], reason: str
) -> None:
    script.ending = reason
    result = lowlat("chat", "--url", url, stdin="one\n")
    assert result.exit_code == 0 and result.stdout == "abcd\n"
    assert "token limit" not in result.stderr


@pytest.mark.parametrize("listed", [[], "<html>", {"data": 3}, {"data": [{}]}, {"data": ["tiny"]}])
def test_a_server_of_something_else_is_distinguished(
    url: str, script: type[Script], listed: Any
) -> None:
    script.listed = listed
    with pytest.raises(UserError, match="does not answer as OpenAI's API does; check --url"):
        ChatClient(url, api_key=KEY)


@pytest.mark.parametrize(
    ("after", "message"),
    [
        (b"data: {oops\n\n", "does not answer as OpenAI's API does"),
        (b"data: 3\n\n", "does not answer as OpenAI's API does"),
        (b'data: {"choices": [3]}\n\n', "does not answer as OpenAI's API does"),
        (b'data: {"error": "no more"}\n\n', "no more"),
        (b'data: {"error": {"message": "no less"}}\n\n', "no less"),
        (b'data: {"error": {"code": 7}}\n\n', "'code': 7"),
    ],
)
def test_a_stream_that_goes_wrong_is_one_line(
    lowlat: Invoke, url: str, script: type[Script], after: bytes, message: str
) -> None:
    script.after = after
    result = lowlat("chat", "--url", url, "--once", "hello")
    assert isinstance(result.exception, UserError)
    assert message in str(result.exception) and "\n" not in str(result.exception)


def test_a_key_that_no_header_can_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = tmp_path / "keys"
    keys.write_text("schl\u00fcssel\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"keys': keys must be ASCII text"):
        read_key(keys)
    monkeypatch.setenv("LOWLAT_API_KEY", "two words")
    with pytest.raises(UserError, match="LOWLAT_API_KEY: a key must be printable"):
        read_key(None)
    monkeypatch.setenv("LOWLAT_API_KEY", "")
    assert read_key(None) is None


def test_a_wrong_key_says_how_to_give_it(url: str) -> None:
    with pytest.raises(UserError, match="missing or wrong; give the key's file as --api-key-file"):
        ChatClient(url, api_key="wrong")


def test_several_models_are_a_question(url: str, script: type[Script]) -> None:
    script.models = ["one", "two"]
    with pytest.raises(UserError, match="several models; give one of: one, two"):
        ChatClient(url, api_key=KEY)
    assert "two at http" in ChatClient(url, name="two", api_key=KEY).description


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "nonsense", "http://[", "ftp://127.0.0.1"])
def test_a_server_that_is_not_there(url: str) -> None:
    with pytest.raises(UserError, match=r"cannot talk to .*; check --url"):
        ChatClient(url)


@pytest.mark.parametrize("port", [0, 65536, 83767])
def test_a_port_that_cannot_be_is_refused(port: int) -> None:
    """Regression: a question sent to another server, on the port's lower 16 bits."""
    with pytest.raises(UserError, match=f"port {port} is not from 1 to 65535"):
        ChatClient(f"http://127.0.0.1:{port}")


def test_a_key_file_belongs_to_a_url(lowlat: Invoke, tmp_path: Path) -> None:
    result = lowlat("chat", "tiny", "--api-key-file", str(tmp_path / "keys"))
    assert isinstance(result.exception, UserError)
    assert "--api-key-file needs --url" in str(result.exception)


def test_the_first_key_of_a_file_is_taken(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("# mine\n\n  one \ntwo\n")
    assert read_key(keys) == "one"
    keys.write_text("# nothing\n")
    with pytest.raises(UserError, match="contains no key"):
        read_key(keys)
