"""Tokenizers out of GGUF metadata, against the folder form of the same vocabulary."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from gguf import GGUFReader
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lowlat.text.tokenizer import Tokenizer
from lowlat.utils.errors import UserError

MakeGguf = Callable[..., Path]
TEXTS = ["the cat sat", "größe 日本語\n\n🙂", "<|im_start|>user\nhi<|im_end|><think>", "", " 2024 "]


def test_byte_level_ids_are_those_of_the_folder(
    make_gguf: MakeGguf, backend: tokenizers.Tokenizer
) -> None:
    tokenizer = Tokenizer.from_gguf(make_gguf())
    for text in TEXTS:
        assert tokenizer.encode(text) == backend.encode(text).ids
    assert tokenizer.vocab_size == backend.get_vocab_size()


def test_token_types_become_added_tokens(make_gguf: MakeGguf) -> None:
    """Regression: control tokens cut into pieces, or <think> hidden from the reader."""
    tokenizer = Tokenizer.from_gguf(make_gguf())
    think = tokenizer.vocab_size - 1
    assert tokenizer.encode("<|im_end|><think>") == [2, think]
    assert tokenizer.special_ids == {0, 1, 2}
    assert tokenizer.decode([2, think]) == "<think>"


def test_an_open_reader_serves_as_well(make_gguf: MakeGguf) -> None:
    assert Tokenizer.from_gguf(GGUFReader(make_gguf())).encode("<|im_start|>") == [1]


def test_end_tokens_by_id_and_by_name(make_gguf: MakeGguf) -> None:
    """Regression: a file that names the end of a document as eos, whose chat turns never end."""
    tokenizer = Tokenizer.from_gguf(make_gguf(ggml__eos_token_id=0, ggml__eot_token_id=7))
    assert tokenizer.eos_ids == {0, 2, 7}


@pytest.mark.parametrize(
    ("pre", "flag", "ids"),
    [("gpt-2", None, []), ("gpt-2", True, [1]), ("llama-bpe", None, [1]), ("llama-bpe", False, [])],
)
def test_bos_follows_the_flag_or_the_family(
    make_gguf: MakeGguf, pre: str, flag: bool | None, ids: list[int]
) -> None:
    tokenizer = Tokenizer.from_gguf(make_gguf(ggml__pre=pre, ggml__add_bos_token=flag))
    assert tokenizer.encode("") == ids
    assert tokenizer.encode("", add_special_tokens=False) == []


def test_unused_tokens_are_left_out(make_gguf: MakeGguf, backend: tokenizers.Tokenizer) -> None:
    """Regression: embedding padding counted as vocabulary."""
    count = backend.get_vocab_size()
    tokens = sorted(backend.get_vocab(), key=lambda token: backend.token_to_id(token) or 0)
    types = [3, 3, 3] + [1] * (count - 4) + [4, 5, 5]
    path = make_gguf(ggml__tokens=[*tokens, "[PAD0]", "[PAD1]"], ggml__token_type=types)
    assert Tokenizer.from_gguf(path).vocab_size == count


def test_sentencepiece_merges_follow_the_scores(make_sentencepiece: MakeGguf) -> None:
    """'abc' merges as _a (-1), bc (-2), _abc (-3); 'ab' (-4) never gets its turn."""
    tokenizer = Tokenizer.from_gguf(make_sentencepiece())
    assert tokenizer.encode("abc") == [1, 265]
    assert tokenizer.encode("a bc") == [1, 263, 259, 264]
    assert tokenizer.encode("</s>", add_special_tokens=False) == [2]


def test_sentencepiece_puts_a_space_after_special_tokens(make_sentencepiece: MakeGguf) -> None:
    tokenizer = Tokenizer.from_gguf(make_sentencepiece())
    assert tokenizer.encode("a</s>a", add_special_tokens=False) == [263, 2, 263]
    without = Tokenizer.from_gguf(make_sentencepiece(ggml__add_space_prefix=False))
    assert without.encode("a</s>a", add_special_tokens=False) == [260, 2, 260]


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581"), max_size=20)
)
def test_sentencepiece_round_trip(sentencepiece: Tokenizer, text: str) -> None:
    assert sentencepiece.decode(sentencepiece.encode(text, parse_special=False)) == text


@pytest.fixture
def sentencepiece(make_sentencepiece: MakeGguf) -> Tokenizer:
    return Tokenizer.from_gguf(make_sentencepiece())


def test_without_a_vocabulary_the_folder_is_the_remedy(make_gguf: MakeGguf) -> None:
    """Regression: advice to convert a file again that would have none again."""
    with pytest.raises(UserError, match=r"holds no vocabulary; use the folder it was converted"):
        Tokenizer.from_gguf(make_gguf(ggml__model="none", ggml__tokens=None))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"ggml__tokens": None}, "ggml.tokens is missing; the file holds no complete tokenizer"),
        ({"ggml__model": None}, "ggml.model is missing"),
        ({"ggml__model": "bert"}, "ggml.model 'bert' is not supported"),
        ({"ggml__pre": None}, "ggml.pre is missing"),
        ({"ggml__pre": "nope"}, "ggml.pre 'nope' is not supported"),
        ({"ggml__tokens": ["a", "a"], "ggml__token_type": [1, 1]}, "ggml.tokens holds 'a' twice"),
        ({"ggml__tokens": [1, 2]}, "ggml.tokens should be a list of strings"),
        ({"ggml__token_type": [1]}, "ggml.token_type has 1 entries for 332 tokens"),
        ({"ggml__merges": ["qq zz"]}, r"ggml.merges entry 0 \('qq zz'\) is not made of tokens"),
        ({"ggml__merges": ["ab"]}, r"ggml.merges entry 0 \('ab'\) is not made of tokens"),
        ({"ggml__eos_token_id": 999}, "ggml.eos_token_id is 999, outside the 332 tokens"),
        ({"ggml__bos_token_id": "x"}, "ggml.bos_token_id should be of type int"),
    ],
)
def test_errors_name_file_and_field(
    make_gguf: MakeGguf, changes: dict[str, Any], match: str
) -> None:
    with pytest.raises(UserError, match=r"model\.gguf: tokenizer\." + match):
        Tokenizer.from_gguf(make_gguf(**changes))


def test_scores_must_fit(make_sentencepiece: MakeGguf) -> None:
    with pytest.raises(UserError, match=r"ggml\.scores has 2 entries for 267 tokens"):
        Tokenizer.from_gguf(make_sentencepiece(ggml__scores=[0.5, 1.5]))


def test_an_unused_special_token_is_an_error(make_sentencepiece: MakeGguf) -> None:
    types = [2, 5, 3] + [6] * 256 + [1] * 8
    with pytest.raises(UserError, match="marks the bos_token '<s>' as unused"):
        Tokenizer.from_gguf(make_sentencepiece(ggml__token_type=types))


def test_files_that_are_no_gguf(tmp_path: Path, make_gguf: MakeGguf) -> None:
    with pytest.raises(UserError, match=r"none\.gguf: cannot be opened"):
        Tokenizer.from_gguf(tmp_path / "none.gguf")
    path = tmp_path / "text.gguf"
    path.write_text("hello, world")
    with pytest.raises(UserError, match=r"text\.gguf: is not a whole GGUF file"):
        Tokenizer.from_gguf(path)
    whole = make_gguf().read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"text\.gguf: is not a whole GGUF file"):
        Tokenizer.from_gguf(path)


@pytest.mark.slow
def test_smollm2(smollm_gguf: Path) -> None:
    """The real file: ids of a ChatML prompt, digits one by one, and every text back whole."""
    tokenizer = Tokenizer.from_gguf(smollm_gguf)
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_ids) == (49152, 1, {0, 2})
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "Hi 42"}])
    assert prompt.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    ids = tokenizer.encode(prompt, add_special_tokens=False)
    assert (ids[0], ids.count(1), ids.count(2)) == (1, 3, 2)
    assert ids[-4:] == [1, 520, 9531, 198]
    assert tokenizer.decode(ids, skip_special_tokens=False) == prompt
    for text in (
        "a  b\n\n\tc",
        "def f(x):\n    return 12 ** x",
        "日本語 한국어 🙂👨‍👩‍👧 e\u0301",
        "\x00\x7f",
    ):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    digits = [tokenizer.encode(digit)[0] for digit in "2024"]
    assert tokenizer.encode("2024") == digits
