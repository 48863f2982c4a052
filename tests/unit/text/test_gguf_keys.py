"""Tokenizers as GGUF metadata: what the reader makes of it is the tokenizer it was made of."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from gguf import GGUFWriter
from tokenizers import models

from lowlat.data.vocabulary import train_bpe
from lowlat.text.folder import read_folder
from lowlat.text.gguf_keys import PRE_NAMES, PROBES, gguf_vocabulary, has_merges
from lowlat.text.gguf_vocab import read_gguf
from lowlat.text.parts import TokenizerParts, set_around
from lowlat.text.pretokenizers import splitting
from lowlat.text.token_bytes import SPACE_MARK
from lowlat.text.tokenizer import Tokenizer
from lowlat.utils.errors import UserError

MakeFolder = Callable[..., Path]
TEXTS = [
    "the cat sat",
    "größe 日本語\n\n🙂",
    "<|im_start|>user\nhi<|im_end|><think>",
    "",
    " 2024  it's 12345 ",
    "x\t\r\n y  ",
]


def written(parts: TokenizerParts, rows: int, folder: Path) -> Tokenizer:
    """Through a GGUF file without tensors."""
    path = folder / "vocabulary.gguf"
    writer = GGUFWriter(path, "llama")
    for key, value in gguf_vocabulary(parts, rows).items():
        add: Any = {bool: writer.add_bool, int: writer.add_uint32, str: writer.add_string}.get(
            type(value), writer.add_array
        )
        add(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return Tokenizer.from_gguf(path)


@pytest.mark.parametrize("pre", PRE_NAMES)
def test_the_way_of_cutting_is_found(
    make_folder: MakeFolder, backend: tokenizers.Tokenizer, tmp_path: Path, pre: str
) -> None:
    """For every known way: texts are cut as the tokenizer cut them."""
    parts = read_folder(make_folder(bos_token="<|endoftext|>"))
    steps = splitting(pre, "here")
    model = parts.backend.model
    assert isinstance(model, models.BPE)
    model.ignore_merges = steps.ignore_merges
    parts.backend.model = model
    parts.backend.pre_tokenizer = steps.pre_tokenizer()
    if (normalizer := steps.normalizer()) is not None:
        parts.backend.normalizer = normalizer
    before, after = Tokenizer(parts), written(parts, 400, tmp_path)
    for text in TEXTS:
        assert after.encode(text) == before.encode(text), text
        assert after.decode(after.encode(text)) == before.decode(before.encode(text))
    assert after.chat_template == before.chat_template
    assert after.special_ids == before.special_ids
    assert after.added_tokens == before.added_tokens
    assert after.eos_ids >= before.eos_ids
    assert after.bos_id == before.bos_id


def test_a_trained_vocabulary_has_a_name(tmp_path: Path) -> None:
    """With combining accents, which NFC would compose."""
    before = train_bpe(["cafe\u0301 au lait, the cat sat on 12 mats\n"] * 4, 300)
    before.save(tmp_path)
    parts = read_folder(tmp_path)
    after = written(parts, 400, tmp_path)
    assert gguf_vocabulary(parts, 400)["tokenizer.ggml.pre"] == "stablelm2"
    for text in [*TEXTS, *PROBES, "cafe\u0301"]:
        assert after.encode(text) == before.encode(text), text


def test_no_two_ways_look_alike() -> None:
    """Pre-tokenizers that differ only in whether whole tokens are merged are distinguished by
    that."""
    seen: dict[tuple[Any, ...], str] = {}
    for pre in PRE_NAMES:
        steps = splitting(pre, "here")
        cuts = [tuple(steps.pre_tokenizer().pre_tokenize_str(probe)) for probe in PROBES]
        key = (*cuts, steps.ignore_merges, steps.nfc)
        assert key not in seen, (pre, seen[key])
        seen[key] = pre


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("eos", [True, False])
def test_bos_and_eos(make_folder: MakeFolder, tmp_path: Path, bos: bool, eos: bool) -> None:
    parts = read_folder(
        make_folder(bos_token="<|endoftext|>", add_bos_token=bos, add_eos_token=eos)
    )
    before, after = Tokenizer(parts), written(parts, 400, tmp_path)
    assert after.encode("the cat") == before.encode("the cat")
    assert (before.encode("")[:1] == [0]) == bos


def test_several_ends(make_folder: MakeFolder, tmp_path: Path) -> None:
    """The end of a turn has a key of its own."""
    files = {"generation_config.json": '{"eos_token_id": [2, 9]}'}
    after = written(read_folder(make_folder(files=files)), 400, tmp_path)
    assert after.eos_ids == {2, 9}


@pytest.mark.parametrize(("ends", "said"), [([2, 9, 11], ""), ([2, 9, 11, 13], "not stop at 13")])
def test_more_ends_than_two(
    make_folder: MakeFolder,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    ends: list[int],
    said: str,
) -> None:
    """The third is llama.cpp's end of message; <|endoftext|>, which is no end here, stays none."""
    files = {"generation_config.json": json.dumps({"eos_token_id": ends})}
    parts = read_folder(make_folder(files=files))
    keys = gguf_vocabulary(parts, 400)
    found = [keys[f"tokenizer.ggml.{role}_token_id"] for role in ("eos", "eot", "eom")]
    assert found == [2, 9, 11]
    assert said in caplog.text and bool(caplog.text) == bool(said)
    assert written(parts, 400, tmp_path).eos_ids == set(ends)


def test_the_template_for_tools(make_folder: MakeFolder, tmp_path: Path) -> None:
    named = [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}]
    after = written(read_folder(make_folder(chat_template=named)), 400, tmp_path)
    assert after.apply_chat_template([]) == "D"
    assert after.apply_chat_template([], tools=[]) == "T"


def test_what_stands_around_a_text_and_cannot_be_said(
    make_folder: MakeFolder, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    parts = read_folder(make_folder(bos_token="<|im_start|>"))
    set_around(parts.backend, ["<|endoftext|>", "<|im_start|>"], [])
    written(parts, 400, tmp_path)
    assert "cannot express that <|endoftext|> <|im_start|> is put around a text" in caplog.text


def test_sentencepiece(make_sentencepiece: Callable[..., Path], tmp_path: Path) -> None:
    """Scores made of the order of merges give the merges back."""
    parts = read_gguf(make_sentencepiece())
    before = Tokenizer(parts)
    after = written(parts, before.vocab_size + 3, tmp_path)
    for text in ("abc bc ab", " a  b", "é🙂 abcabc", ""):
        assert after.encode(text) == before.encode(text), text
        assert after.decode(after.encode(text)) == before.decode(before.encode(text))


def cut_by_metaspace(parts: TokenizerParts, scheme: str) -> TokenizerParts:
    """The sentencepiece tokenizer as newer files have it: spaces are put by the cutting."""
    spec = json.loads(parts.backend.to_str())
    spec["normalizer"] = None
    spec["pre_tokenizer"] = {
        "type": "Metaspace",
        "replacement": SPACE_MARK,
        "prepend_scheme": scheme,
        "split": False,
    }
    return replace(parts, backend=tokenizers.Tokenizer.from_str(json.dumps(spec)))


@pytest.mark.parametrize(
    ("scheme", "differs"), [("never", False), ("first", True), ("always", True)]
)
def test_spaces_that_llama_cpp_puts_elsewhere_are_said(
    make_sentencepiece: Callable[..., Path],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    scheme: str,
    differs: bool,
) -> None:
    """Regression: Mistral's newer tokenizers gave other tokens behind [INST], unsaid."""
    parts = cut_by_metaspace(read_gguf(make_sentencepiece()), scheme)
    after = written(parts, 300, tmp_path)
    assert ("llama.cpp puts spaces into texts where" in caplog.text) == differs
    assert (after.encode("a<s>bc") != Tokenizer(parts).encode("a<s>bc")) == (scheme == "first")
    assert (after.encode(" bc") != Tokenizer(parts).encode(" bc")) == differs
    assert after.encode("abc bc") == Tokenizer(parts).encode("abc bc")


def test_sentencepiece_that_scores_cannot_say(make_sentencepiece: Callable[..., Path]) -> None:
    parts = read_gguf(make_sentencepiece())
    spec = json.loads(parts.backend.to_str())
    spec["normalizer"]["normalizers"].append({"type": "Lowercase"})
    changed = replace(parts, backend=tokenizers.Tokenizer.from_str(json.dumps(spec)))
    with pytest.raises(UserError, match=r"encodes .* differently than GGUF files can express; use"):
        gguf_vocabulary(changed, 300)


def test_ids_beyond_the_embedding(make_folder: MakeFolder) -> None:
    parts = read_folder(make_folder())
    with pytest.raises(UserError, match=r"has ids up to \d+, the embedding 300 rows"):
        gguf_vocabulary(parts, 300)


def test_no_merges() -> None:
    from tests.fakes import byte_tokenizer

    assert not has_merges(byte_tokenizer()._parts)
