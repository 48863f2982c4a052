"""lowlat serve with several models: --model, --config, and what is refused before one is loaded."""

import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import Result

from lowlat import api
from lowlat.cli.serve_models import ModelTable, parse_model
from lowlat.serve.async_engine import AsyncEngine
from lowlat.serve.config import ServeConfig
from lowlat.serve.load_progress import LoadProgress
from lowlat.serve.served_model import ServedModel
from lowlat.utils.errors import UserError
from tests.lora import drawn_updates, save_adapter

Invoke = Callable[..., Result]
Served = list[tuple[AsyncEngine | Sequence[ServedModel], ServeConfig]]


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Served:
    """What would have been served; nothing listens."""
    calls: Served = []

    def run(
        models: AsyncEngine | Sequence[ServedModel],
        config: ServeConfig,
        listener: socket.socket,
        *,
        on_ready: Callable[[], None],
    ) -> None:
        calls.append((models, config))
        on_ready()

    monkeypatch.setattr("lowlat.serve.run.run", run)
    monkeypatch.setattr("lowlat.serve.http.logs.configure", lambda: None)
    return calls


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch, alphabet_model: Any) -> list[tuple[str, dict]]:
    """Names and options of loaded models."""
    calls: list[tuple[str, dict]] = []

    def load(name: str, **options: Any) -> Any:
        calls.append((name, options))
        return alphabet_model

    monkeypatch.setattr("lowlat.api.load", load)
    return calls


def on_demand(served: Served) -> tuple[list[ServedModel], ServeConfig]:
    ((models, config),) = served
    assert not isinstance(models, AsyncEngine)
    return list(models), config


def test_a_model_with_options() -> None:
    assert parse_model("a=minnow") == ModelTable(name="a", path="minnow")
    assert parse_model("org/a=org/b@rev") == ModelTable(name="org/a", path="org/b@rev")
    assert parse_model("a=pypi:p==1/f.gguf").path == "pypi:p==1/f.gguf"
    given = "a=org/b@rev@dtype=int4,cache=int8,max_context=99,cache_memory=0.5,speculate=false"
    assert parse_model(f"{given},alias=b,alias=7") == ModelTable(
        name="a",
        path="org/b@rev",
        aliases=["b", "7"],
        dtype="int4",
        cache="int8",
        max_context=99,
        cache_memory=0.5,
        speculate=False,
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("minnow", "write NAME=MODEL"),
        ("=minnow", "write NAME=MODEL"),
        ("a=", "write NAME=MODEL"),
        ("minnow@dtype=int4", "write NAME=MODEL"),
        ("a=minnow@dtype=int3", "dtype: "),
        ("a=minnow@quant=int4", "quant is not a key of a model"),
        ("a=minnow@dtype=int4,", "'' is not of the form"),
        ("a=minnow@dtype=int4,dtype=int8", "dtype is given twice"),
        ("a=minnow@path=b", "path is given twice"),
        ("a=minnow@max_context=1", "max_context: "),
        ("a=minnow@max_context=x", "max_context: "),
        ("a=minnow@cache_memory=inf", "cache_memory: "),
        ("a\n=minnow", "name: "),
    ],
)
def test_an_invalid_model_is_one_line(text: str, words: str) -> None:
    with pytest.raises(UserError, match=r"^--model ") as error:
        parse_model(text)
    assert words in str(error.value)
    assert "\n" not in str(error.value).replace(text, "")


def test_several_models_are_loaded_on_demand(
    lowlat: Invoke, served: Served, loaded: list[tuple[str, dict]]
) -> None:
    result = lowlat(
        "serve", "minnow", "--model", "small=minnow@dtype=int8,max_context=64,alias=gpt",
        "--port", "0", "--memory", "1.5", "--unload-after", "60", "--load-timeout", "7",
        "--max-queue", "9", "--dtype", "fp32",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("lowlat serves minnow, small on http://127.0.0.1:")
    models, config = on_demand(served)
    assert [(model.name, model.aliases) for model in models] == [
        ("minnow", ()),
        ("small", ("gpt",)),
    ]
    assert config.memory_bytes == 1.5 * 2**30
    assert (config.load_seconds, config.unload_seconds) == (7.0, 60.0)
    assert loaded == []
    plain, small = (model.prepared for model in models)
    assert plain is not None and small is not None
    assert small.info.context == 64 < plain.info.context
    assert small.info.weights_bytes < plain.info.weights_bytes / 2
    # Together they fit.
    assert plain.num_bytes + small.num_bytes <= 1.5 * 2**30
    assert models[0].max_queue == 9
    for prepared in (plain, small):
        prepared.load(LoadProgress())
    (first, options), (second, own) = loaded
    assert first == second == "minnow"
    assert (options["dtype"], options["context"]) == ("fp32", None)
    assert (own["dtype"], own["context"]) == ("int8", 64)
    assert own["max_cache_bytes"] == small.num_bytes - small.info.weights_bytes


def test_the_estimate_is_what_loading_takes() -> None:
    from lowlat.cli.serve_on_demand import Machine, served_models
    from lowlat.serve.model_info import ModelInfo

    tables = [
        ModelTable(name=dtype, path="minnow", dtype=dtype, cache_memory=0.01)  # pyright: ignore
        for dtype in ("int8", "bf16")
    ]
    machine = Machine(device="cpu", threads=None, memory=2**30, disk={})
    for model in served_models(tables, machine, max_queue=1):
        assert model.prepared is not None
        loaded = model.prepared.load(LoadProgress())
        info = ModelInfo.of(loaded)
        assert info.weights_bytes == model.prepared.info.weights_bytes
        assert (info.context, info.chat_template) == (
            model.prepared.info.context,
            model.prepared.info.chat_template,
        )
        cache = loaded.runner.cache
        assert cache.num_pages * cache.page_bytes <= 0.01 * 2**30


def test_shares_leave_room_for_caches_with_a_size() -> None:
    from lowlat.cli.serve_on_demand import Machine, served_models

    tables = [
        ModelTable(name="a", path="minnow", dtype="bf16", cache_memory=0.08),
        ModelTable(name="b", path="minnow", dtype="bf16"),
    ]
    machine = Machine(device="cpu", threads=None, memory=int(0.15 * 2**30), disk={})
    prepared = [model.prepared for model in served_models(tables, machine, max_queue=1)]
    sizes = [each.num_bytes - each.info.weights_bytes for each in prepared if each is not None]
    assert sizes[0] == int(0.08 * 2**30) and sizes[1] > 0
    assert sum(each.num_bytes for each in prepared if each is not None) <= machine.memory


@pytest.mark.parametrize("num_known", [0, 1])
def test_models_whose_weights_come_to_be_known_fit_together(
    monkeypatch: pytest.MonkeyPatch, num_known: int
) -> None:
    from lowlat.cli import serve_on_demand

    known = iter([True] * num_known + [False] * 3)
    monkeypatch.setattr(serve_on_demand, "needs_fetch", lambda name: not next(known))
    tables = [ModelTable(name=name, path="minnow", dtype="bf16") for name in "abc"]
    machine = serve_on_demand.Machine(device="cpu", threads=None, memory=2**27, disk={})
    models = serve_on_demand.served_models(tables, machine, max_queue=1)
    assert [model.prepared is not None for model in models].count(True) == num_known
    sizes = []
    for model in models:
        assert model.prepare is not None
        prepared = model.prepared or model.prepare(LoadProgress())
        assert prepared.num_bytes > prepared.info.weights_bytes
        sizes.append(prepared.num_bytes)
    assert sum(sizes) <= machine.memory


def test_adapters_count_in_the_estimate(adapter: Path) -> None:
    from lowlat.cli.serve_on_demand import Machine, served_models
    from lowlat.serve.model_info import ModelInfo

    table = ModelTable(
        name="a", path="minnow", dtype="bf16", lora={"sql": str(adapter)}, cache_memory=0.01
    )
    machine = Machine(device="cpu", threads=None, memory=2**30, disk={})
    (model,) = served_models([table], machine, max_queue=1)
    assert model.prepared is not None
    loaded = model.prepared.load(LoadProgress())
    assert ModelInfo.of(loaded).weights_bytes == model.prepared.info.weights_bytes


def test_one_named_model_is_loaded_at_once(
    lowlat: Invoke, served: Served, loaded: list[tuple[str, dict]]
) -> None:
    result = lowlat("serve", "--model", "a=minnow@dtype=int8,alias=b", "--port", "0")
    assert result.exit_code == 0, result.output
    ((engine, config),) = served
    assert isinstance(engine, AsyncEngine)
    assert (config.model_name, config.model_aliases) == ("a", ("b",))
    assert (loaded[0][0], loaded[0][1]["dtype"]) == ("minnow", "int8")


def test_one_model_may_be_loaded_on_demand(
    lowlat: Invoke, served: Served, loaded: list[tuple[str, dict]]
) -> None:
    result = lowlat("serve", "minnow", "--port", "0", "--unload-after", "5")
    assert result.exit_code == 0, result.output
    assert [model.name for model in on_demand(served)[0]] == ["minnow"]
    assert loaded == []


CONFIG = """
port = 0
memory = 2
max_queue = 5
allowed_host = ["a.example"]
speculate = false
dtype = "int8"

[[model]]
name = "a"
path = "minnow"
aliases = ["x", "y"]

[[model]]
name = "b"
path = "minnow"
dtype = "bf16"
"""


def test_a_file_has_options_and_models(
    lowlat: Invoke, served: Served, loaded: list[tuple[str, dict]], tmp_path: Path
) -> None:
    file = tmp_path / "models.toml"
    file.write_text(CONFIG)
    result = lowlat("serve", "--config", str(file), "--max-queue", "6")
    assert result.exit_code == 0, result.output
    models, config = on_demand(served)
    assert [(model.name, model.aliases) for model in models] == [("a", ("x", "y")), ("b", ())]
    assert (config.port, config.memory_bytes) == (0, 2 * 2**30)
    assert config.allowed_hosts == ("a.example",)
    # The command line precedes the file.
    assert models[0].max_queue == 6
    for model in models:
        assert model.prepared is not None
        model.prepared.load(LoadProgress())
    assert [options["dtype"] for _, options in loaded] == ["int8", "bf16"]
    assert [options["speculates"] for _, options in loaded] == [False, False]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("port = ", "is not TOML"),
        ("prot = 1", "prot is not a key of the server; did you mean port?"),
        ("port = 'x'", "port: "),
        ("port = true", "port: "),
        ("speculate = 1", "speculate: "),
        ("memory = 0", "memory: "),
        ("model = 3", "model must be tables"),
        ("models = []", "models is not a key of the server; did you mean model?"),
        ("[[model]]\nname = 'a'", "[[model]] 1: path is missing"),
        ("[[model]]\nname = 'a'\npath = 'minnow'\nquant = 1", "[[model]] 1: quant is not a key"),
        ("[[model]]\nname = 'a'\npath = 'minnow'\ndtype = 4", "[[model]] 1: dtype: "),
    ],
)
def test_an_invalid_file_is_one_line(
    lowlat: Invoke, served: Served, tmp_path: Path, text: str, words: str
) -> None:
    file = tmp_path / "models.toml"
    file.write_text(text)
    error = lowlat("serve", "--port", "0", "--config", str(file)).exception
    assert isinstance(error, UserError)
    assert str(error).startswith(str(file)) and words in str(error)
    assert "\n" not in str(error)
    assert served == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("minnow", "minnow"), "two models have the name 'minnow'"),
        (("minnow", "--model", "a=minnow@alias=minnow"), "two models have the name 'minnow'"),
        (("minnow", "./missing"), "./missing"),
        (("minnow", "no-such-model"), "no-such-model"),
        (("minnow", "deepseek-v3"), "deepseek-v3"),
        (("minnow", "--model", "a=minnow", "--served-model-name", "b"), "--served-model-name"),
        (("minnow", "--model", "a=minnow", "--memory", "1e9"), "--memory 1e+09: exceeds"),
        (("minnow", "--model", "a=minnow", "--memory", "inf"), "--memory must be"),
        (("minnow", "--model", "a=minnow", "--memory", "0.01"), "GiB of memory (--memory)"),
        (("minnow", "--model", "a=minnow", "--dtype", "int3"), "dtype: "),
        (("minnow", "--model", "a=minnow@max_context=999999999"), "context"),
        (("minnow", "--memory", "1"), "--memory is for several models"),
        (("minnow", "--unload-after", "0"), "unload-after must be"),
        (("minnow", "--load-timeout", "nan"), "load-timeout must be"),
        (("--config", "missing.toml"), "missing.toml"),
    ],
)
def test_what_cannot_be_served_is_refused_at_once(
    lowlat: Invoke,
    served: Served,
    loaded: list[tuple[str, dict]],
    arguments: tuple[str, ...],
    words: str,
) -> None:
    error = lowlat("serve", "--port", "0", *arguments).exception
    assert isinstance(error, UserError), error
    assert words in str(error) and "\n" not in str(error)
    assert served == [] and loaded == []


# LoRA adapters


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    from lowlat.checkpoint.hf_folder import open_checkpoint
    from lowlat.checkpoint.load import read_config
    from lowlat.model.transformer import Transformer

    config = read_config(open_checkpoint(api.prepare("minnow")))
    with torch.device("meta"):
        model = Transformer(config)
    updates = drawn_updates(model, rank=2, seed=1, names=("o_proj",))
    return save_adapter(tmp_path / "adapter", config, updates)


def test_adapters_of_one_model(
    lowlat: Invoke, served: Served, loaded: list[tuple[str, dict]], adapter: Path
) -> None:
    result = lowlat("serve", "minnow", "--lora", f"sql={adapter}", "--lora", "b=c", "--port", "0")
    assert result.exit_code == 0, result.output
    ((_, options),) = loaded
    assert options["lora"] == {"sql": str(adapter), "b": "c"}


def test_adapters_of_models_loaded_on_demand(
    lowlat: Invoke, served: Served, loaded: list[tuple[str, dict]], adapter: Path
) -> None:
    file = adapter.parent / "models.toml"
    file.write_text(
        f'[[model]]\nname = "one"\npath = "minnow"\nlora = {{ sql = "{adapter.name}" }}\n'
    )
    two = f"two=minnow@lora.chat={adapter}"
    result = lowlat("serve", "--config", str(file), "--model", two, "--port", "0")
    assert result.exit_code == 0, result.output
    models, _ = on_demand(served)
    names = {model.name: model.adapters for model in models}
    assert names == {"one": ("sql",), "two": ("chat",)}
    for model in models:
        assert model.prepared is not None
        model.prepared.load(LoadProgress())
    assert {str(adapter)} == {
        folder for _, options in loaded for folder in options["lora"].values()
    }


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--lora", "sql"], "--lora 'sql': write NAME=FOLDER"),
        (["--lora", "=x"], "--lora '=x': write NAME=FOLDER"),
        (["--lora", "a=x", "--lora", "a=y"], "--lora 'a=y': the name a is given twice"),
        (["--lora", "minnow=x"], "two models have the name 'minnow'"),
        (["--lora", "a=x", "--model", "b=minnow"], "--lora adds to one model; use --model"),
        (
            ["--model", "b=minnow@lora.a=nowhere"],
            "model 'b': nowhere/adapter_config.json: cannot be read",
        ),
    ],
)
def test_invalid_adapters_are_one_line(
    lowlat: Invoke, served: Served, arguments: list[str], words: str
) -> None:
    error = lowlat("serve", "minnow", *arguments, "--port", "0").exception
    assert isinstance(error, UserError), error
    assert words in str(error) and "\n" not in str(error)
    assert served == []
