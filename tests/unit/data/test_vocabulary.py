"""Vocabularies: trained alike every time, and what existing ones say about ends and infilling."""

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest

from lowlat.data.vocabulary import (
    MIN_VOCAB,
    SPECIAL,
    begin_of_text,
    end_of_text,
    load_tokenizer,
    train_bpe,
)
from lowlat.text.fim_tokens import FimTokens, fim_tokens
from lowlat.text.tokenizer import Tokenizer
from lowlat.utils.errors import UserError

from .conftest import byte_level

TEXT = "The fish swims in the sea, and the sea is 1234 miles wide.\n\tif x == 0:\n日本語 🐟é\n"
CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]

TRAIN = """
import sys
from pathlib import Path
from lowlat.data.vocabulary import train_bpe
words = Path(sys.argv[1]).read_text().split()
texts = [" ".join(words[start:] + words[:start]) for start in range(len(words))]
train_bpe(texts, 700).save(sys.argv[2])
"""


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    return train_bpe([TEXT * 5, TEXT.upper() * 3], 340)


@pytest.mark.slow
def test_training_is_repeatable(tmp_path: Path) -> None:
    """Regression: a vocabulary that depends on hash seeds or threads."""
    source, digests = Path(__file__), set()
    for threads in ("1", "2", "2"):
        folder = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        command = [sys.executable, "-c", TRAIN, str(source), str(folder)]
        environment = {"RAYON_NUM_THREADS": threads, "PATH": ""}
        subprocess.run(command, check=True, env=environment, cwd=Path(__file__).parents[3])
        digests.add(hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest())
    assert len(digests) == 1


@pytest.mark.parametrize(
    "text", [TEXT, "", " ", "\x00\x7f", "unseen: ‽ñ\r\n\r\n   x", "<|im_end|>"]
)
def test_text_survives(trained: Tokenizer, text: str) -> None:
    ids = trained.encode(text, add_special_tokens=False, parse_special=False)
    assert trained.decode(ids, skip_special_tokens=False) == text
    assert not {*ids} & {*range(len(SPECIAL))}


def test_special_tokens_come_first(trained: Tokenizer) -> None:
    assert trained.vocab_size == 340
    assert [trained.added_tokens[index] for index in range(len(SPECIAL))] == [*SPECIAL]
    assert trained.special_ids == {*range(len(SPECIAL))}
    assert trained.encode("x")[0] == begin_of_text(trained) == 0
    assert end_of_text(trained) == 1 and trained.eos_ids == {1, SPECIAL.index("<|im_end|>")}
    assert fim_tokens(trained) == FimTokens(prefix=5, suffix=6, middle=7)


def test_digits_stand_alone(trained: Tokenizer) -> None:
    long = train_bpe(["1234 1234 1234\n" * 50], MIN_VOCAB + 50)
    for tokenizer in (trained, long):
        assert len(tokenizer.encode("1234", add_special_tokens=False)) == 4


def test_transformers_reads_it_alike(trained: Tokenizer, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    trained.save(tmp_path)
    other = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert other(TEXT)["input_ids"] == trained.encode(TEXT)
    assert other.eos_token_id == 1 and other.bos_token_id == 0 and other.pad_token_id == 2
    expected = (
        "<|begin_of_text|><|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nho<|im_end|>\n"
    )
    assert other.apply_chat_template(CHAT, tokenize=False) == expected
    own = Tokenizer.from_folder(tmp_path)
    assert own.apply_chat_template(CHAT, False) == expected
    assert own.encode(TEXT) == trained.encode(TEXT)
    assert own.apply_chat_template(CHAT[:1]).endswith("<|im_start|>assistant\n")


def test_little_text_gives_a_smaller_vocabulary() -> None:
    assert MIN_VOCAB < train_bpe(["aaa aaa aaa"], 5000).vocab_size < MIN_VOCAB + 10
    assert train_bpe([], MIN_VOCAB).vocab_size == MIN_VOCAB


@pytest.mark.parametrize("size", [0, -1, MIN_VOCAB - 1, 2**20 + 1])
def test_sizes_out_of_range(size: int) -> None:
    with pytest.raises(UserError, match=f"vocabulary of {size}: must be within {MIN_VOCAB} and"):
        train_bpe(["x"], size)


def test_the_end_of_a_text() -> None:
    tokenizer = byte_level(special=["<|endoftext|>", "<|im_end|>", "<|x|>"])
    assert end_of_text(tokenizer) == 256
    assert end_of_text(tokenizer, "<|x|>") == 258
    with pytest.raises(UserError, match="'<eos>' is not a special token of the tokenizer"):
        end_of_text(tokenizer, "<eos>")
    with pytest.raises(UserError, match="several tokens that end a text; name one with --end"):
        end_of_text(byte_level(special=["<|endoftext|>", "<|end_of_text|>"]))
    assert end_of_text(byte_level(special=["</s>"])) == 256, "the only eos"
    assert begin_of_text(tokenizer) is None


def test_infilling_of_other_families() -> None:
    deepseek = [f"<\uff5cfim\u2581{part}\uff5c>" for part in ("hole", "begin", "end")]
    found = fim_tokens(byte_level(special=["</s>", *deepseek]))
    assert found == FimTokens(prefix=258, suffix=257, middle=259)
    assert fim_tokens(byte_level(special=["</s>", *deepseek[:2]])) is None


def test_tokenizers_by_name(tmp_path: Path) -> None:
    byte_level().save(tmp_path)
    for name in (str(tmp_path), str(tmp_path / "tokenizer.json")):
        assert load_tokenizer(name).vocab_size == 262
    with pytest.raises(UserError, match="is known by its config only"):
        load_tokenizer("deepseek-v3")
    with pytest.raises(UserError, match="absent"):
        load_tokenizer(str(tmp_path / "absent"))


def test_batches_are_encoded_as_single_texts(trained: Tokenizer) -> None:
    texts = [TEXT, "", "<|im_end|> x", "日"]
    expected = [trained.encode(t, add_special_tokens=False, parse_special=False) for t in texts]
    assert trained.encode_batch(texts) == expected
