"""lowlat serve: its options, and what is refused before a model is loaded."""

import builtins
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

from lowlat.cli.serve import _served_name
from lowlat.generate.model import Model
from lowlat.serve.async_engine import AsyncEngine
from lowlat.serve.config import ServeConfig

Invoke = Callable[..., Result]
KEY = "k" * 32


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[tuple[AsyncEngine, ServeConfig]]:
    """What would have been served; nothing listens."""
    calls: list[tuple[AsyncEngine, ServeConfig]] = []

    def run(
        engine: AsyncEngine,
        config: ServeConfig,
        listener: socket.socket,
        *,
        on_ready: Callable[[], None],
    ) -> None:
        calls.append((engine, config))
        on_ready()

    monkeypatch.setattr("lowlat.serve.run.run", run)
    monkeypatch.setattr("lowlat.serve.http.logs.configure", lambda: None)
    return calls


def test_options_reach_server_and_engine(
    lowlat: Invoke, served: list[tuple[AsyncEngine, ServeConfig]], tmp_path: Path
) -> None:
    keys = tmp_path / "keys"
    keys.write_text(f"{KEY}\n")
    result = lowlat(
        "serve", "tiny", "--port", "0", "--api-key-file", str(keys), "--allowed-host", "a.example",
        "--served-model-name", "mine", "--max-queue", "7", "--request-timeout", "60",
        "--drain-seconds", "5",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("lowlat serves mine on http://127.0.0.1:")
    assert KEY not in result.output
    ((engine, config),) = served
    assert engine.max_queue == 7
    assert config.api_keys == (KEY,)
    assert config.allowed_hosts == ("a.example",)
    assert config.model_name == "mine"
    assert (config.request_seconds, config.drain_seconds) == (60.0, 5.0)


@pytest.mark.parametrize(("mode", "is_exposed"), [(0o600, False), (0o604, True), (0o620, True)])
def test_an_exposed_key_file_is_one_warning(
    lowlat: Invoke,
    served: list[tuple[AsyncEngine, ServeConfig]],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    mode: int,
    is_exposed: bool,
) -> None:
    keys = tmp_path / "keys"
    keys.write_text(f"{KEY}\n")
    keys.chmod(mode)
    assert lowlat("serve", "tiny", "--port", "0", "--api-key-file", str(keys)).exit_code == 0
    warning = "other users can read or write the file of --api-key-file; run chmod 600 on it"
    warnings = [each.getMessage() for each in caplog.records if each.levelname == "WARNING"]
    assert warnings == [warning] * is_exposed


def test_context_and_machine_reach_the_loader(
    lowlat: Invoke,
    served: list[tuple[AsyncEngine, ServeConfig]],
    monkeypatch: pytest.MonkeyPatch,
    alphabet_model: Any,
) -> None:
    loaded: list[dict[str, Any]] = []

    def load(name: str, **options: Any) -> Any:
        loaded.append(options)
        return alphabet_model

    monkeypatch.setattr("lowlat.api.load", load)
    lowlat("serve", "tiny", "--port", "0", "--max-context", "99", "--dtype", "int8")
    assert (loaded[0]["context"], loaded[0]["dtype"]) == (99, "int8")


@pytest.fixture
def unloadable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading a model fails the test."""

    def load(name: str, **options: Any) -> Any:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("lowlat.api.load", load)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--host", "0.0.0.0"), "--api-key-file"),
        (("--host", "no.such.host.invalid", "--api-key-file", "keys"), "--host"),
        (("--port", "70000"), "port must be"),
        (("--cache-memory", "inf"), "--cache-memory must be"),
        (("--cache-memory", "1e9"), "--cache-memory 1e+09: exceeds the"),
        (("--served-model-name", ""), "--served-model-name is empty"),
        (("--api-key-file", "missing"), "No such file"),
        (("--drain-seconds", "-1"), "drain-seconds must be"),
        (("--request-timeout", "0"), "request-timeout must be"),
    ],
)
def test_faults_are_found_before_a_model_is_loaded(
    lowlat: Invoke,
    unloadable: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("keys").write_text(f"{KEY}\n")
    result = lowlat("serve", "tiny", *arguments)
    assert result.exit_code != 0
    assert words in str(result.exception)
    assert "\n" not in str(result.exception)


def test_no_context_is_too_short_before_a_model_is_loaded(lowlat: Invoke, unloadable: None) -> None:
    result = lowlat("serve", "tiny", "--max-context", "0")
    assert result.exit_code == 2
    assert "--max-context" in result.output


def test_a_taken_port_is_found_before_a_model_is_loaded(lowlat: Invoke, unloadable: None) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = lowlat("serve", "tiny", "--port", str(port))
    assert "choose another --host or --port" in str(result.exception)


def test_without_the_extra_the_remedy_is_named(
    lowlat: Invoke, unloadable: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = builtins.__import__

    def no_uvicorn(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "uvicorn":
            raise ModuleNotFoundError("No module named 'uvicorn'", name="uvicorn")
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_uvicorn)
    result = lowlat("serve", "tiny")
    assert "pip install 'lowlat[serve]'" in str(result.exception)


def test_clients_do_not_see_folders(tmp_path: Path) -> None:
    folder = tmp_path / "private" / "my-model"
    folder.mkdir(parents=True)
    assert _served_name(str(folder)) == "my-model"
    assert _served_name(f"{folder}/") == "my-model"
    assert _served_name("org/model") == "org/model"
    assert _served_name(str(folder.rename(folder.with_name("m\udcff")))) == "m\ufffd"


def test_a_prefix_cache_on_disk_reaches_the_model(
    lowlat: Invoke,
    served: list[tuple[AsyncEngine, ServeConfig]],
    alphabet_model: Model,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    given: dict[str, Any] = {}

    def load(name: str, **options: Any) -> Model:
        given.update(options)
        return alphabet_model

    monkeypatch.setattr("lowlat.api.load", load)
    options = ("--prefix-cache-dir", str(tmp_path), "--prefix-cache-disk", "0.5")
    assert lowlat("serve", "tiny", "--port", "0", *options).exit_code == 0
    assert given["prefix_cache_dir"] == tmp_path
    assert given["prefix_cache_disk_bytes"] == 2**29


def test_a_size_on_disk_needs_a_folder(lowlat: Invoke) -> None:
    result = lowlat("serve", "tiny", "--port", "0", "--prefix-cache-disk", "5")
    assert "--prefix-cache-disk needs --prefix-cache-dir" in str(result.exception)
