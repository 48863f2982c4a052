"""lm-eval's numbers: by transformers, through the server's API, and by the Python model class."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lowlat.bench import lm_eval
from lowlat.bench.lm_eval import LowlatLM
from lowlat.utils.errors import UserError
from tests import forked

pytestmark = pytest.mark.slow
WORDS = "a tiny model of random weights knows no language but gives the same numbers".split()
CLOSE = {"rel": 2e-4, "abs": 2e-4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama of random weights with a tokenizer, as transformers saves them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    path = tmp_path_factory.mktemp("llama")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    backend.train_from_iterator([" ".join(WORDS)] * 5, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", model_max_length=128
    )
    tokenizer.save_pretrained(path)
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).float().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def url(folder: Path) -> Iterator[str]:
    """`lowlat serve` in a process of its own."""
    command = [sys.executable, "-m", "lowlat", "serve", str(folder), "--port", "0"]
    command += ["--dtype", "fp32", "--served-model-name", "tiny"]
    process = forked.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert process.stdout is not None
        greeting = process.stdout.readline()
        assert greeting.startswith("lowlat serves tiny on http://"), greeting
        yield greeting.split()[4]
    finally:
        process.terminate()
        process.wait(60)
        if process.stdout is not None:
            process.stdout.close()


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Multiple choice, and rolling log-likelihoods of texts, one of them beyond the context."""
    path = tmp_path_factory.mktemp("task") / "data.jsonl"
    rows = [
        {
            "question": " ".join(WORDS[index : index + 4]),
            "choices": [WORDS[index], f"{WORDS[-index]} {WORDS[3]}", "no"],
            "answer": index % 3,
            "text": " ".join(WORDS * (1 + 8 * (index == 2))),
        }
        for index in range(6)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    shared = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(path)}},
        "test_split": "test",
    }
    choice = {
        **shared,
        "task": "tiny_choice",
        "output_type": "multiple_choice",
        "doc_to_text": "Q: {{question}}\nA:",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    rolling = {
        **shared,
        "task": "tiny_rolling",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "text",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    }
    return [choice, rolling]


def evaluate(model: Any, tasks: list[dict[str, Any]]) -> tuple[list[Any], dict[str, Any]]:
    """All responses in order, and the metrics of the tasks."""
    from lm_eval import simple_evaluate

    found = simple_evaluate(model=model, tasks=tasks, bootstrap_iters=0, cache_requests=False)
    assert found is not None
    responses = [
        response
        for task in tasks
        for sample in sorted(found["samples"][task["task"]], key=lambda sample: sample["doc_id"])
        for response in sample["filtered_resps"]
    ]
    metrics = {
        f"{task}: {name}": value
        for task, values in found["results"].items()
        for name, value in values.items()
        if isinstance(value, float)
    }
    return responses, metrics


@pytest.fixture(scope="module")
def reference(folder: Path, tasks: list[dict[str, Any]]) -> tuple[list[Any], dict[str, Any]]:
    from lm_eval.models.huggingface import HFLM

    model = HFLM(
        pretrained=str(folder), device="cpu", dtype="float32", max_length=MAX_LENGTH, batch_size=4
    )
    return evaluate(model, tasks)


MAX_LENGTH = 126
"""Of an input, with places for the token that it predicts and for one that is generated."""


def same(
    found: tuple[list[Any], dict[str, Any]], expected: tuple[list[Any], dict[str, Any]]
) -> None:
    assert len(found[0]) == len(expected[0]) == 24
    for ours, theirs in zip(found[0], expected[0], strict=True):
        if isinstance(theirs, tuple | list):
            assert ours[0] == pytest.approx(theirs[0], **CLOSE)
            assert ours[1] == theirs[1]
        else:
            assert ours == pytest.approx(theirs, **CLOSE)
    assert found[1] == pytest.approx(expected[1], **CLOSE)


def test_through_the_api(
    folder: Path, url: str, tasks: list[dict[str, Any]], reference: tuple[list[Any], dict[str, Any]]
) -> None:
    """lm-eval's local-completions: echo with logprobs, of token ids in batches."""
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    model = LocalCompletionsAPI(
        base_url=f"{url}/v1/completions",
        model="tiny",
        tokenizer=str(folder),
        tokenizer_backend="huggingface",
        # Of prompt and output together.
        max_length=MAX_LENGTH + 2,
        batch_size=3,
    )
    same(evaluate(model, tasks), reference)


def test_by_the_model_class(
    folder: Path, tasks: list[dict[str, Any]], reference: tuple[list[Any], dict[str, Any]]
) -> None:
    model = LowlatLM(str(folder), dtype="fp32", batch_size=5)
    assert model.max_length == MAX_LENGTH
    same(evaluate(model, tasks), reference)


def test_generation(folder: Path) -> None:
    """Greedy, up to a stop string, and with the options that tasks set."""
    from lm_eval.api.instance import Instance

    def ask(context: str, **options: Any) -> str:
        arguments = (context, options)
        request = Instance("generate_until", {}, arguments, 0)
        (text,) = model.generate_until([request])
        return text

    model = LowlatLM(str(folder), dtype="fp32")
    whole = ask("a tiny", max_gen_toks=12)
    ids = model.tok_encode("a tiny")
    assert whole == str(model.model.generate(ids, max_tokens=12))
    assert ask("a tiny", max_gen_toks=12, until=[whole[3]]) == whole[: whole.index(whole[3])]
    assert ask("a tiny", max_gen_toks=12, do_sample=False, temperature=1.0) == whole
    # A long context loses its start.
    assert ask("x " * 300 + "a tiny", max_gen_toks=4)
    with pytest.raises(UserError, match="generation option 'x'"):
        ask("a", x=1)
    with pytest.raises(UserError, match="max_gen_toks"):
        ask("a", max_gen_toks=500)


def test_the_command(
    folder: Path,
    tmp_path: Path,
    tasks: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """`python -m lowlat.bench.lm_eval` with a task in a file."""
    (tmp_path / "tiny_choice.yaml").write_text(json.dumps(tasks[0]))
    command = [sys.executable, "-m", "lowlat.bench.lm_eval", "--model", "lowlat"]
    command += ["--model_args", f"model={folder},dtype=fp32", "--tasks", "tiny_choice"]
    command += ["--include_path", str(tmp_path), "--output_path", str(tmp_path / "out")]
    offline = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    done = forked.run(command, capture_output=True, text=True, env=offline)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "tiny_choice" in done.stdout and "acc_norm" in done.stdout
    monkeypatch.setattr(sys, "argv", [*command[2:6], "model=/no/such/model", *command[7:]])
    with pytest.raises(SystemExit, match="2"):
        lm_eval.main()
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith("error:")
