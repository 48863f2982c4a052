"""lowlat train: every mistake that a recipe or a command line is likely to hold ends in one line,
which names file and key and says what to do, and with exit code 2.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lowlat.cli import main
from lowlat.data.build import build
from lowlat.data.selection import BuildOptions
from lowlat.train.cost import dry_run as dryrun
from tests.fakes import byte_tokenizer

RECIPE = """
name = "small"
precision = "fp32"
[data]
folder = "tokens"
[log]
tensorboard = false
[[phase]]
name = "first"
steps = 2
sequence_length = 7
batch_size = 2
micro_batch_size = 1
learning_rate = 1e-3
[model]
model_type = "llama"
hidden_size = 24
intermediate_size = 31
num_hidden_layers = 1
num_attention_heads = 3
num_key_value_heads = 1
head_dim = 8
max_position_embeddings = 32
rms_norm_eps = 1e-6
rope_theta = 10000.0
tie_word_embeddings = true
"""
NO_MODEL = RECIPE[: RECIPE.index("[model]")]
Fails = Callable[..., str]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Entered; holds the data of RECIPE."""
    (tmp_path / "text").mkdir()
    for number in range(9):
        (tmp_path / "text" / f"{number}.txt").write_text(f"document {number} " * 3)
    build(tmp_path / "tokens", BuildOptions(sources=(str(tmp_path / "text"),)), byte_tokenizer())
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def train(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """The exit code of `lowlat train ARGUMENTS`."""

    def run(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["lowlat", "train", *arguments])
        with pytest.raises(SystemExit) as ended:
            main.run()
        assert isinstance(ended.value.code, int)
        return ended.value.code

    return run


@pytest.fixture
def fails(train: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> Fails:
    """What `lowlat train ARGUMENTS` says as it ends with exit code 2, in one line."""

    def run(*arguments: str) -> str:
        capsys.readouterr()
        assert train(*arguments) == 2
        *_, line = capsys.readouterr().err.splitlines()
        assert line.startswith("lowlat: error: ")
        return line.removeprefix("lowlat: error: ")

    return run


def test_no_recipe(folder: Path, fails: Fails) -> None:
    said = fails("absent.toml")
    assert said == (
        "absent.toml: cannot be read (No such file or directory); name a recipe in TOML, such as "
        "recipes/tiny.toml"
    )
    (folder / "r.toml").write_text("name = ")
    assert fails("r.toml").startswith("r.toml: is not TOML (")


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("name = ", "sedd = 1\nname = ", "sedd is not a key of recipes; did you mean seed?"),
        (
            "learning_rate",
            "lerning_rate",
            "phase.0.lerning_rate is not a key of recipes; did you mean learning_rate? (and 1",
        ),
        ("folder = ", "foldr = ", "data.foldr is not a key of recipes; did you mean folder?"),
        ("steps = 2\n", "", "phase.0.steps is missing"),
        ("steps = 2", "steps = 'two'", "phase.0.steps: must be a valid integer, not 'two'"),
        (
            "micro_batch_size = 1",
            "micro_batch_size = 1.5",
            "phase.0.micro_batch_size: must be a valid integer, not 1.5",
        ),
        (
            "= 2\nmicro",
            "= 0\nmicro",
            "phase.0: batch_size: must be a multiple of micro_batch_size 1, not 0",
        ),
        (
            "micro_batch_size = 1",
            "micro_batch_size = 3",
            "phase.0: batch_size: must be a multiple of micro_batch_size 3, not 2",
        ),
        ("'small'", "'a/b'", "name: must be letters, digits, '.', '_' and '-', a letter or digit"),
        ("1e-3", "-1e-3", "phase.0.learning_rate: must be greater than or equal to 0, not -0.001"),
        ("1e-3", "nan", "phase.0.learning_rate: must be a finite number, not nan"),
        (
            "1e-3",
            "'1e-3'",
            "phase.0.learning_rate: must be a number, or segments such as "
            "[{ to = 1e-3, steps = 100 }], not '1e-3'",
        ),
        ("1e-3", "[]", "phase.0.learning_rate: must have 1 entries or more"),
        (
            "1e-3",
            "[{ to = 1e-3, shape = 'sine' }]",
            "phase.0.learning_rate.0.shape: must be 'linear', 'cosine' or 'constant', not 'sine'",
        ),
        (
            "1e-3",
            "[{ to = 1e-3, steps = 3 }]",
            "phase.0: learning_rate: its segments last longer than steps 2",
        ),
        ("'fp32'", "'fp16'", "precision: must be 'fp32', 'bf16' or 'fp8', not 'fp16'"),
        ("[log]", "[optimizer]\nname = 'sgd'\n[log]", "optimizer.name: must be 'adamw' or 'muon'"),
        (
            "[log]",
            "[optimizer]\nbetas = 0.9\n[log]",
            "optimizer.betas: must be a list of two numbers, not 0.9",
        ),
        (
            "[log]",
            "[checkpoints]\nkeep_last = 1\n[log]",
            "checkpoints.keep_last: must be greater than or",
        ),
        (
            "[log]",
            "[lora]\nrank = 2\nalpha = 4.0\n[log]",
            "lora needs base_model, a checkpoint whose",
        ),
        ("name = ", "base_model = 'x'\nname = ", "give either [model] or base_model, not both"),
        ("name = ", "device = 'gpu'\nname = ", "device = 'gpu' is not available; set cpu, or cuda"),
        ("[log]", "[parallel]\ndata = 2\n[log]", "[parallel] is for 2 processes, 1 started"),
        ("'llama'", "'gpt9'", '[model]: model_type "gpt9" is not supported; supported: deepseek'),
        ("hidden_size = 24\n", "", "[model]: hidden_size is missing"),
        ("hidden_size = 24", "hiden = 24", "[model]: hidden_size is missing"),
        ("rope_theta", "dropout = 0.5\nrope_theta", "[model]: dropout (0.5) is unknown and may"),
        (
            "rope_theta",
            "vocab_size = 99\nrope_theta",
            "the data has 260 token ids, but the model's vocab_size is 99; leave vocab_size out",
        ),
        (
            "sequence_length = 7",
            "sequence_length = 33",
            "phase first: sequence_length 33 exceeds max_position_embeddings 32; raise max_",
        ),
        (
            "1e-3",
            "1e-3\nrope_scaling = { type = 'yarn', factr = 2.0 }",
            "phase first: rope_scaling: rope_scaling.factr (2.0) is not a setting of rope_type "
            "'yarn'",
        ),
    ],
)
def test_recipe(folder: Path, fails: Fails, old: str, new: str, said: str) -> None:
    old, new = old.replace("'", '"'), new.replace("'", '"')
    assert old in RECIPE
    (folder / "r.toml").write_text(RECIPE.replace(old, new, 1))
    assert fails("r.toml").startswith(f"r.toml: {said}")
    assert not (folder / "runs" / "small" / "saves" / "step-00000001").exists()


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("'tokens'", "'tokenz'", "tokenz: no such folder; build it with lowlat data build"),
        ("'tokens'", "'empty'", "empty/tokens.json: not found; build the folder with lowlat"),
        (
            "'tokens'",
            "'tokens'\nfim_rate = 0.5",
            "tokens: the tokenizer has no fill-in-the-middle tokens such as <|fim_prefix|>; set",
        ),
        (
            "sequence_length = 7",
            "sequence_length = 600",
            "tokens: train has 306 tokens, fewer than the 601 of a window; shorten the sequence",
        ),
    ],
)
def test_data(folder: Path, fails: Fails, old: str, new: str, said: str) -> None:
    text = RECIPE.replace("embeddings = 32", "embeddings = 999")
    (folder / "r.toml").write_text(text.replace(old.replace("'", '"'), new.replace("'", '"'), 1))
    assert fails("r.toml").startswith(said)


@pytest.mark.parametrize(
    ("base_model", "said"),
    [
        ("nosuchmodel", "r.toml: base_model: model 'nosuchmodel' is unknown; give a folder with"),
        ("empty", "r.toml: base_model: folder 'empty' holds no config.json, so it is not a model"),
        ("deepseek-v3", "r.toml: base_model: 'deepseek-v3' is known by its config only"),
    ],
)
def test_start(folder: Path, fails: Fails, base_model: str, said: str) -> None:
    (folder / "r.toml").write_text(f'base_model = "{base_model}"\n{NO_MODEL}')
    assert fails("r.toml").startswith(said)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--set", "steps"], "--set steps: write key=value, such as seed=1 or phase.0.steps=50"),
        (["--set", "phase.3.steps=2"], "--set phase.3.steps=2: the recipe has no such place"),
        (["--set", "phase.0.step=2"], "r.toml: phase.0.step is not a key of recipes; did you mean"),
        (["--set", "phase.0.steps=two"], "r.toml: phase.0.steps: must be a valid integer, not"),
        (
            ["--out", "text"],
            "{folder}/text: is not empty and is not a run folder; name a new folder",
        ),
        (["--out", "r.toml"], "{folder}/r.toml: cannot be used"),
    ],
)
def test_arguments(folder: Path, fails: Fails, arguments: list[str], said: str) -> None:
    (folder / "r.toml").write_text(RECIPE)
    found = fails("r.toml", *arguments)
    assert found.startswith(said.format(folder=folder))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            ["phase.0.sequence_length=33"],
            "r.toml: phase first: sequence_length 33 exceeds max_position_embeddings 32; raise",
        ),
        (["data.fim_rate=0.5"], "tokens: the tokenizer has no fill-in-the-middle tokens such as"),
        (
            ["trainable='attention'", "precision='fp8'"],
            "r.toml: trainable = 'attention' trains in bf16 or fp32",
        ),
        (
            ["parallel.tensor=2"],
            "r.toml: parallel.tensor 2 does not divide num_attention_heads 3; choose one that does",
        ),
        (["parallel.expert=2"], "r.toml: parallel.expert 2 does not divide n_routed_experts 0"),
        (
            ["phase.0.batch_size=1e30"],
            "r.toml: phase.0: batch_size: must be at most 1,000,000,000, not 1e+30",
        ),
        (["phase.0.batch_size=1e9"], "r.toml: phase 'first' needs about "),
        (["model.vocab_size=300", "data.folder='none'", "phase.0.sequence_length=33"], "r.toml: "),
    ],
)
def test_a_dry_run_refuses_what_a_run_does(
    folder: Path, monkeypatch: pytest.MonkeyPatch, fails: Fails, changes: list[str], said: str
) -> None:
    """Regression: a recipe that is found good and then refused. The machine is a small one."""
    monkeypatch.setattr(dryrun, "memory_limit", lambda: 2**33)
    (folder / "r.toml").write_text(RECIPE)
    arguments = ["r.toml", *(word for change in changes for word in ("--set", change))]
    dry = fails(*arguments, "--dry-run")
    assert dry.startswith(said)
    if "'none'" not in str(changes) and "parallel" not in str(changes):
        assert fails(*arguments) == dry


def test_a_dry_run_that_does_not_fit(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    train: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Ends as the run would, after its table."""
    monkeypatch.setattr(dryrun, "memory_limit", lambda: 2**27)
    (folder / "r.toml").write_text(RECIPE)
    assert train("r.toml", "--dry-run") == 2
    printed = capsys.readouterr()
    assert "Memory per" in printed.out
    assert "r.toml: phase 'first' needs about 420 MB of memory" in printed.err


def test_a_dry_run_before_there_is_data(
    folder: Path, train: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "r.toml").write_text(RECIPE)
    changes = ["--set", "model.vocab_size=300", "--set", "data.folder='none'"]
    assert train("r.toml", "--dry-run", *changes) == 0
    assert "none: does not exist yet; the data was not checked" in capsys.readouterr().err


def test_what_is_there(folder: Path, train: Callable[..., int], fails: Fails) -> None:
    """A changed recipe on a run, and exports and reports of what is no run or has no such save."""
    (folder / "r.toml").write_text(RECIPE)
    assert train("r.toml", "--quiet") == 0
    run = "runs/small"
    assert (folder / run / "model").is_dir()
    for arguments, said in (
        (
            ["r.toml", "--set", "phase.0.learning_rate=2e-3"],
            f"{folder}/{run}: was trained with another recipe: phase.0.learning_rate was 0.001 and "
            "is 0.002; restore it, or choose another --out for the changed one",
        ),
        (["export", "absent", "dst"], "absent: no such folder; name the folder of a run"),
        (["export", "empty", "dst"], "empty: has no checkpoint yet"),
        (
            ["export", run, "dst", "--step", "7"],
            f"{run}: has no checkpoint of step 7; --step may be 2",
        ),
        (["export", run, "dst", "--dtype", "fp9"], "--dtype 'fp9' is unknown; choose one of"),
        (["export", run, "text"], f"{folder}/text: exists already; choose another destination"),
        (["export", run, "dst", "--adapter"], f"{run}: was trained without lora; leave out"),
        (["report", "r.toml"], "r.toml: line 1: not valid JSON"),
        (["report", "absent"], "absent: no such log; name the folder of a training run"),
    ):
        assert fails(*arguments).startswith(said), arguments
    assert not (folder / "dst").exists()
