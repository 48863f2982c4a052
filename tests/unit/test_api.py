"""The offline batch API."""

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

import lowlat
from lowlat import api
from lowlat.checkpoint.fetch.model_names import BUNDLED_MODELS
from lowlat.generate.model import Model
from lowlat.generate.params import SamplingParams
from lowlat.utils.errors import UserError
from lowlat.utils.progress import SilentProgress
from tests import forked
from tests.fakes import ScriptedModel, byte_tokenizer, gqa_config


@pytest.fixture
def llm(monkeypatch: pytest.MonkeyPatch) -> lowlat.LLM:
    def load(name: str, **options: object) -> Model:
        model = ScriptedModel(gqa_config(), lambda token: ord("a") if token >= 122 else token + 1)
        return Model(model, byte_tokenizer(), name=name)

    monkeypatch.setattr(api, "load", load)
    return lowlat.LLM("counting")


def test_many_prompts_with_one_kind_of_options(llm: lowlat.LLM) -> None:
    found = llm.generate(["abc", list(b"xy"), "k"], max_tokens=3, progress=SilentProgress())
    assert found == ["def", "zab", "lmn"]


def test_each_prompt_with_its_own_options(llm: lowlat.LLM) -> None:
    params = [SamplingParams(max_tokens=1), SamplingParams(max_tokens=2, temperature=0.01, n=2)]
    assert llm.generate(["a", "b"], params) == ["b", ["cd", "cd"]]


@pytest.mark.parametrize(
    "prompt",
    ["abc", list(b"abc"), [{"role": "user", "content": "abc"}]],
    ids=["text", "ids", "chat"],
)
def test_a_single_prompt_is_a_list_of_one(
    llm: lowlat.LLM, prompt: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Regression: each letter of a text taken for a prompt of its own."""
    monkeypatch.setattr(llm.model, "encode_prompt", lambda one: list(b"abc") * (one == prompt))
    options = {"max_tokens": 3, "progress": SilentProgress()}
    assert llm.generate(prompt, **options) == ["def"]  # pyright: ignore
    assert llm.model.generate_many(prompt, **options) == [["def"]]  # pyright: ignore
    assert llm.generate([], **options) == []


def test_progress_counts_prompts(llm: lowlat.LLM) -> None:
    from lowlat.utils import progress

    seen: list[int] = []

    class Counting(SilentProgress):  # pyright: ignore
        def task(self, label: str, total: int | None = None, unit: progress.Unit = "items"):
            assert (label, total, unit) == ("generating", 3, "items")
            context = super().task(label, total, unit)
            task = context.__enter__()
            advance = task.advance
            task.advance = lambda n=1: (seen.append(n), advance(n))
            return _Entered(task)

    class _Entered:
        def __init__(self, task: progress.Task) -> None:
            self.task = task

        def __enter__(self) -> progress.Task:
            return self.task

        def __exit__(self, *error: object) -> None:
            pass

    llm.generate(["a", "b", "c"], max_tokens=2, progress=Counting())
    assert sum(seen) == 3


@pytest.mark.parametrize(
    ("params", "options", "message"),
    [
        (SamplingParams(), {"max_tokens": 3}, "give max_tokens in params or as a keyword"),
        ([SamplingParams()], {}, "2 prompts need as many params, got 1"),
        (None, {"max_tokens": 200}, "context of 97"),
        (None, {"maximum": 3}, "option 'maximum' is unknown"),
    ],
)
def test_what_cannot_be_served_generates_nothing(
    llm: lowlat.LLM, params: object, options: dict[str, object], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        llm.generate(["a", "b"], params, **options)  # pyright: ignore
    assert not llm.model.engine.has_work and llm.model.runner.allocator.num_used == 0


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError):
        lowlat.LLM(str(tmp_path / "nothing"))


def test_a_path_is_no_preset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="default"):
        lowlat.load(Path("default"))
    (tmp_path / "default").mkdir()
    (tmp_path / "default" / "config.json").touch()
    assert lowlat.api.prepare(Path("default")).samefile(tmp_path / "default")
    assert lowlat.api.prepare(tmp_path / "default") == tmp_path / "default"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_cache_bytes": True}, "max_cache_bytes must be an integer of bytes"),
        ({"max_cache_bytes": 1 << 60}, "exceeds the"),
        ({"context": 1}, "context must be an integer from 2"),
        ({"device": "gpu"}, "device 'gpu' is unknown"),
    ],
)
def test_options_are_looked_at_before_weights(
    options: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api, "load_model", None)
    with pytest.raises(UserError, match=message):
        lowlat.load("minnow", **options)


WRONG_TYPES = """
import numpy
import lowlat
alone = {"role": "user", "content": "abc"}
llm = lowlat.LLM("minnow", context=numpy.int64(64), max_cache_bytes=numpy.int64(1 << 26))
assert type(llm.model.context) is int
assert llm.generate(alone, max_tokens=2) == llm.generate([[alone]], max_tokens=2)
for use in (
    lambda: lowlat.load("minnow", max_cache_bytes=1.5e9),
    lambda: lowlat.load("minnow", context="5"),
    lambda: lowlat.load("minnow", context=2.5),
    lambda: llm.generate(["a"], "x"),
    lambda: llm.generate(["a"], 5),
):
    try:
        use()
    except lowlat.UserError as error:
        print(error)
"""


def test_options_of_a_wrong_type_are_named() -> None:
    """In a process whose calls nothing checks, as a user's are; integers of numpy are integers, and
    a message alone is a chat, not texts that are its keys.
    """
    command = [sys.executable, "-c", WRONG_TYPES]
    told = forked.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert [line.split(" must be")[0] for line in told] == [
        "max_cache_bytes", "context", "context", "params", "params",
    ]  # fmt: skip


def test_a_truncated_file_is_refused_before_its_vocabulary_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which takes seconds: regression: a download cut short that looked like a long loading."""

    def refuse(path: Path) -> None:
        raise AssertionError("read the vocabulary")

    monkeypatch.setattr(api.Tokenizer, "from_gguf", refuse)
    (tmp_path / "m.gguf").write_bytes(b"GGUF\x03\0\0\0")
    with pytest.raises(UserError, match="it is truncated"):
        lowlat.load(str(tmp_path / "m.gguf"))


def test_a_path_that_is_not_utf8(tmp_path: Path) -> None:
    """The name in results and responses is valid Unicode."""
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/m\xff"))
    shutil.copytree(BUNDLED_MODELS["minnow"], folder)
    model = lowlat.load(folder)
    assert model.name == f"{tmp_path}/m\ufffd"
    assert model.logits([1, 2]).shape == (2, model.config.vocab_size)


CACHED = """
import json, sys
import lowlat
kind, folder = sys.argv[1:]
prompt = [(7 * place) % 251 for place in range(300)]
if kind == "LLM":
    llm = lowlat.LLM("minnow", prefix_cache_dir=folder)
    model, (found,) = llm.model, llm.generate([prompt], max_tokens=8, ignore_eos=True)
else:
    model = lowlat.load("minnow", prefix_cache_dir=folder)
    found = model.generate(prompt, max_tokens=8, ignore_eos=True)
print(json.dumps([found.token_ids, found.usage.cached_tokens]))
"""


def test_a_prefix_cache_on_disk_outlives_the_process(tmp_path: Path) -> None:
    """Of LLM and of Model, which share the pages."""
    found: list[Any] = []
    for kind in ("LLM", "LLM", "Model"):
        command = [sys.executable, "-c", CACHED, kind, str(tmp_path)]
        told = forked.run(command, capture_output=True, text=True, check=True).stdout
        found.append(json.loads(told))
    assert [tokens for tokens, _ in found] == [found[0][0]] * 3
    assert [cached for _, cached in found] == [0, 256, 256]
