"""Models without a usable tokenizer: token ids in and out; text is an error when it is used."""

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import Tokenizer, decoders, models

import lowlat
from lowlat.checkpoint.fetch.model_names import BUNDLED_MODELS
from lowlat.utils.errors import UserError
from tests import forked

MINNOW = BUNDLED_MODELS["minnow"]
IDS = [5, 300, 17, 42, 9, 1000, 3]


def bpe() -> models.BPE:
    return models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")])


def with_decoder(decoder: Any) -> tokenizers.Tokenizer:
    backend = Tokenizer(bpe())
    backend.decoder = decoder
    return backend


TOKENIZERS: dict[str, Callable[[], tokenizers.Tokenizer] | None] = {
    "none": None,
    "WordLevel": lambda: Tokenizer(models.WordLevel({"a": 0}, "a")),
    "Unigram": lambda: Tokenizer(models.Unigram([("a", 0.0), ("b", -1.0)], 0, False)),
    "WordPiece": lambda: Tokenizer(models.WordPiece({"a": 0}, unk_token="a")),
    "BPE without decoder": lambda: Tokenizer(bpe()),
    "BPE with another decoder": lambda: with_decoder(decoders.BPEDecoder()),
}


@pytest.fixture(params=TOKENIZERS)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """minnow with its tokenizer exchanged."""
    path = tmp_path / "model"
    path.mkdir()
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        if (MINNOW / name).exists():
            shutil.copy(MINNOW / name, path)
    backend = TOKENIZERS[request.param]
    if backend is not None:
        backend().save(str(path / "tokenizer.json"))
    return path


def test_token_ids_work_and_text_does_not(folder: Path) -> None:
    model, whole = lowlat.load(folder), lowlat.load(MINNOW)
    assert model.logits(IDS).equal(whole.logits(IDS))
    answer = model.generate(IDS, max_tokens=5, temperature=0.8, seed=1, ignore_eos=True)
    expected = whole.generate(IDS, max_tokens=5, temperature=0.8, seed=1, ignore_eos=True)
    assert not isinstance(answer, list) and not isinstance(expected, list)
    assert answer.token_ids == expected.token_ids and answer.text == ""
    score, known = model.perplexity(IDS), whole.perplexity(IDS)
    assert score.perplexity == known.perplexity and known.bits_per_byte > 0
    assert model.engine.eos_ids == whole.engine.eos_ids
    tokenizer = model.tokenizer
    uses: list[Callable[[], object]] = [
        lambda: model.generate("text"),
        lambda: model.generate(IDS, stop=["x"]),
        lambda: model.generate(IDS, stream=True),
        lambda: model.generate([{"role": "user", "content": "text"}]),
        lambda: model.perplexity("some text"),
        lambda: tokenizer.decode(IDS),
        lambda: tokenizer.encode_batch(["a"]),
        lambda: tokenizer.save(folder / "saved"),
    ]
    for use in uses:
        with pytest.raises(UserError, match=r"not found; copy it|is not supported"):
            use()


@pytest.mark.parametrize("folder", ["none"], indirect=True)
def test_the_command_names_the_file(folder: Path) -> None:
    ended = forked.run(
        [sys.executable, "-m", "lowlat", "generate", str(folder), "-p", "x"],
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 2 and str(folder) in ended.stderr.splitlines()[-1]
    assert "Traceback" not in ended.stderr
