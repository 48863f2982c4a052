"""Tokenizers as GGUF metadata: what the reader makes of it is the tokenizer it was made of."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from gguf import GGUFWriter
from tokenizers import models

from lowlat.text.folder import read_folder
from lowlat.text.gguf_keys import PRE_NAMES, PROBES, gguf_vocabulary, has_merges
from lowlat.text.gguf_vocab import read_gguf
from lowlat.text.parts import TokenizerParts
from lowlat.text.pretokenizers import splitting
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


def test_no_two_ways_look_alike() -> None:
    """Ways that differ in nothing but whether whole tokens are merged are told apart by that."""
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
    assert after.eos_ids >= {2, 9}


def test_sentencepiece(make_sentencepiece: Callable[..., Path], tmp_path: Path) -> None:
    """Scores made of the order of merges give the merges back."""
    parts = read_gguf(make_sentencepiece())
    before = Tokenizer(parts)
    after = written(parts, before.vocab_size + 3, tmp_path)
    for text in ("abc bc ab", " a  b", "é🙂 abcabc", ""):
        assert after.encode(text) == before.encode(text), text
        assert after.decode(after.encode(text)) == before.decode(before.encode(text))


def test_ids_beyond_the_embedding(make_folder: MakeFolder) -> None:
    parts = read_folder(make_folder())
    with pytest.raises(UserError, match=r"has ids up to \d+, the embedding 300 rows"):
        gguf_vocabulary(parts, 300)


def test_no_merges() -> None:
    from fakes import byte_tokenizer

    assert not has_merges(byte_tokenizer()._parts)
