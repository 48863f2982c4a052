"""Tokenizer files of a Hugging Face folder: which one wins, and what a broken one is called."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tokenizers
from tokenizers import models

from lowlat.text.parts import NoTokenizer, set_around
from lowlat.text.tokenizer import Tokenizer
from lowlat.utils.errors import UserError

MakeFolder = Callable[..., Path]


def test_eos_ids_come_from_every_file(make_folder: MakeFolder) -> None:
    """Regression: only tokenizer_config.json's eos read, so a chat model runs past its turn."""
    files = {
        "generation_config.json": '{"eos_token_id": [0, 7]}',
        "config.json": '{"eos_token_id": 5}',
    }
    assert Tokenizer.from_folder(make_folder(files)).eos_ids == {0, 2, 7}


def test_eos_id_of_config_json_without_a_generation_config(make_folder: MakeFolder) -> None:
    assert Tokenizer.from_folder(make_folder({"config.json": '{"eos_token_id": 5}'})).eos_ids == {
        2,
        5,
    }


def test_bos_and_eos_are_added_where_the_config_says(make_folder: MakeFolder) -> None:
    bos = {"content": "<|im_start|>", "lstrip": False}
    folder = make_folder(bos_token=bos, add_bos_token=True, add_eos_token=True)
    tokenizer = Tokenizer.from_folder(folder)
    plain = tokenizer.encode("hello", add_special_tokens=False)
    assert tokenizer.encode("hello") == [1, *plain, 2]
    assert tokenizer.bos_id == 1


def with_template(folder: Path, before: list[str], after: list[str]) -> Path:
    """`folder` with a tokenizer.json that puts these tokens around a text."""
    path = folder / "tokenizer.json"
    changed = tokenizers.Tokenizer.from_file(str(path))
    set_around(changed, before, after)
    changed.save(str(path))
    return folder


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, ([1, 0], [0])),
        ({"add_eos_token": True}, ([1, 0], [2])),
        ({"add_eos_token": False}, ([1, 0], [])),
        ({"add_bos_token": False}, ([], [0])),
        ({"add_bos_token": True, "add_eos_token": None}, ([1], [0])),
        ({"add_bos_token": None}, ([1, 0], [0])),
        ({"add_bos_token": True, "add_eos_token": True}, ([1], [2])),
    ],
)
def test_each_key_speaks_of_its_own_end(
    make_folder: MakeFolder, config: dict[str, Any], expected: tuple[list[int], list[int]]
) -> None:
    """Regression: add_eos_token alone took away what tokenizer.json puts before a text."""
    folder = make_folder(bos_token="<|im_start|>", **config)
    with_template(folder, ["<|im_start|>", "<|endoftext|>"], ["<|endoftext|>"])
    tokenizer = Tokenizer.from_folder(folder)
    before, after = expected
    plain = tokenizer.encode("hello", add_special_tokens=False)
    assert tokenizer.encode("hello") == [*before, *plain, *after]


def test_special_tokens_map_fills_gaps(make_folder: MakeFolder) -> None:
    files = {
        "special_tokens_map.json": '{"bos_token": "<|endoftext|>", "eos_token": "<|im_start|>"}'
    }
    tokenizer = Tokenizer.from_folder(make_folder(files))
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (0, {2})


def test_tokens_only_the_config_knows_are_added(make_folder: MakeFolder) -> None:
    declared = {"333": {"content": "<b>"}, "332": {"content": "<a>", "special": True}}
    tokenizer = Tokenizer.from_folder(make_folder(added_tokens_decoder=declared))
    assert tokenizer.encode("<a><b>") == [332, 333]
    assert tokenizer.special_ids == {0, 1, 2, 332}


def test_the_template_file_wins(make_folder: MakeFolder) -> None:
    assert Tokenizer.from_folder(make_folder({"chat_template.jinja": "X"})).chat_template == "X"


def test_the_default_of_named_templates_is_used(make_folder: MakeFolder) -> None:
    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    assert Tokenizer.from_folder(make_folder(chat_template=named)).chat_template == "D"


NAMED = [
    {"name": "tool_use", "template": "T{{ tools | length }}"},
    {"name": "default", "template": "D"},
]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}


def test_prompts_with_tools_have_their_own_template(
    make_folder: MakeFolder, tmp_path: Path
) -> None:
    """As in transformers: the one named tool_use, also after saving."""
    tokenizer = Tokenizer.from_folder(make_folder(chat_template=NAMED))
    tokenizer.save(tmp_path / "saved")
    for own in (tokenizer, Tokenizer.from_folder(tmp_path / "saved")):
        assert own.apply_chat_template([]) == "D"
        assert own.apply_chat_template([], tools=None) == "D"
        assert own.apply_chat_template([], tools=[TOOL, TOOL]) == "T2"


def test_the_tool_template_is_a_file_next_to_the_template_file(make_folder: MakeFolder) -> None:
    folder = make_folder({"chat_template.jinja": "X"}, chat_template=NAMED)
    assert Tokenizer.from_folder(folder).apply_chat_template([], tools=[TOOL]) == "X"
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("Y")
    assert Tokenizer.from_folder(folder).apply_chat_template([], tools=[TOOL]) == "Y"
    assert Tokenizer.from_folder(folder).apply_chat_template([]) == "X"


def test_settings_from_training_do_not_cut_text(
    tmp_path: Path, backend: tokenizers.Tokenizer
) -> None:
    """Regression: truncation and padding stored in tokenizer.json applied to prompts."""
    changed = tokenizers.Tokenizer.from_str(backend.to_str())
    changed.enable_truncation(3)
    changed.enable_padding(length=11)
    changed.save(str(tmp_path / "tokenizer.json"))
    text = "the cat sat on the mat"
    assert Tokenizer.from_folder(tmp_path).decode(backend.encode(text).ids) == text
    assert Tokenizer.from_folder(tmp_path).encode(text) == backend.encode(text).ids


@pytest.mark.parametrize(
    ("files", "config", "match"),
    [
        ({"tokenizer.json": "{\n\n!"}, {}, r"tokenizer\.json: not valid JSON .*line 3"),
        ({"tokenizer.json": "[]"}, {}, r"tokenizer\.json: must hold a JSON object, not list; get"),
        ({"tokenizer.json": "{}"}, {}, r"tokenizer\.json: not a usable tokenizer"),
        (
            {"tokenizer_config.json": '{"bos_token": "\\ud800"}'},
            {},
            r"_config\.json: not valid JSON \(\\ud800 is half of a surrogate pair\); get the file",
        ),
        ({"tokenizer_config.json": '{"a": 1, "a": 2}'}, {}, r"json: .*key 'a' appears twice"),
        ({"tokenizer_config.json": "{"}, {}, r"tokenizer_config\.json: not valid JSON .*line 1"),
        ({"generation_config.json": '{"eos_token_id": "x"}'}, {}, "eos_token_id should be"),
        ({}, {"eos_token": 5}, "eos_token should be a string"),
        ({}, {"eos_token": "<nope>"}, "eos_token '<nope>' is not in tokenizer.json"),
        (
            {},
            {"added_tokens_decoder": {"9": {"content": "<|im_end|>"}}},
            "id 9, tokenizer.json another",
        ),
        ({}, {"added_tokens_decoder": {"9": "x"}}, "added_tokens_decoder should map ids to tokens"),
        ({}, {"chat_template": [{"name": "rag", "template": ""}]}, "no 'default' among rag"),
        ({}, {"chat_template": 5}, "chat_template should be text"),
    ],
)
def test_errors_name_the_file(
    make_folder: MakeFolder, files: dict[str, str], config: dict[str, Any], match: str
) -> None:
    with pytest.raises(UserError, match=match) as caught:
        Tokenizer.from_folder(make_folder(files, **config))
    assert "\n" not in str(caught.value)


def test_an_absent_tokenizer_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"tokenizer\.json: not found; copy it"):
        Tokenizer.from_folder(tmp_path)


def test_a_folder_with_only_tiktoken_gets_a_remedy(tmp_path: Path) -> None:
    """Kimi-K2 and Moonlight have no tokenizer.json that could be copied."""
    (tmp_path / "tiktoken.model").write_text("YQ== 0")
    with pytest.raises(UserError, match=r"tokenizer\.json: not found; the folder has tiktoken\.m"):
        Tokenizer.from_folder(tmp_path)


def test_what_the_error_names_makes_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers' own function, of a vocabulary as tiktoken holds it."""
    tiktoken = pytest.importorskip("tiktoken")
    made = pytest.importorskip("transformers.integrations.tiktoken")
    # which opens files of clouds as well
    monkeypatch.setitem(sys.modules, "blobfile", SimpleNamespace(BlobFile=open))
    ranks = {bytes([byte]): byte for byte in range(256)} | {b"th": 256, b"the": 257}
    encoding = tiktoken.Encoding(
        "x", pat_str=r"\S+|\s+", mergeable_ranks=ranks, special_tokens={"[EOS]": 258}
    )
    made.convert_tiktoken_to_fast(encoding, str(tmp_path))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "[EOS]"}')
    tokenizer = Tokenizer.from_folder(tmp_path)
    text = "the other[EOS] größe"
    assert tokenizer.encode(text) == encoding.encode(text, allowed_special="all")


def test_text_that_is_not_utf8_is_refused(make_folder: MakeFolder) -> None:
    folder = make_folder()
    (folder / "tokenizer.json").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=r"tokenizer\.json: is not UTF-8"):
        Tokenizer.from_folder(folder)


def test_a_path_that_is_not_utf8(make_folder: MakeFolder) -> None:
    """Regression: reported as a broken tokenizer."""
    folder = make_folder()
    moved = folder.rename(os.fsdecode(os.fsencode(folder) + b"\xff"))
    assert Tokenizer.from_folder(moved).encode("a")


def test_other_models_are_refused(tmp_path: Path) -> None:
    tokenizers.Tokenizer(models.WordLevel({"a": 0}, "a")).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(NoTokenizer, match="model type WordLevel is not supported"):
        Tokenizer.from_folder(tmp_path)


def test_saved_files_read_back_the_same(make_folder: MakeFolder, tmp_path: Path) -> None:
    folder = make_folder(
        {"generation_config.json": '{"eos_token_id": [0, 2]}'},
        bos_token="<|im_start|>",
        add_bos_token=True,
    )
    first = Tokenizer.from_folder(folder)
    first.save(tmp_path / "saved")
    second = Tokenizer.from_folder(tmp_path / "saved")
    text = "<|im_start|>the 日本 🙂<think>\n"
    assert second.encode(text) == first.encode(text)
    assert (second.bos_id, second.eos_ids) == (first.bos_id, first.eos_ids) == (1, {0, 2})
    assert second.special_ids == first.special_ids
    assert second.chat_template == first.chat_template


def test_a_generation_config_that_is_there_is_kept(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Regression: sampling defaults of the model overwritten by a save of its tokenizer."""
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.6}')
    tokenizer.save(tmp_path)
    assert json.loads((tmp_path / "generation_config.json").read_text()) == {"temperature": 0.6}


def test_transformers_reads_saved_files(tokenizer: Tokenizer, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer.save(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "deepseek_v3"}')
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    messages = [{"role": "user", "content": "größe <b>"}]
    prompt = tokenizer.apply_chat_template(messages)
    assert (
        theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == prompt
    )
    ids = tokenizer.encode(prompt)
    assert theirs.encode(prompt) == ids
    assert theirs.decode(ids, skip_special_tokens=True) == tokenizer.decode(ids)
    assert theirs.eos_token_id == 2


def test_transformers_chooses_the_same_of_named_templates(
    make_folder: MakeFolder, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = Tokenizer.from_folder(make_folder(chat_template=NAMED))
    tokenizer.save(tmp_path / "saved")
    (tmp_path / "saved" / "config.json").write_text('{"model_type": "deepseek_v3"}')
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    messages = [{"role": "user", "content": "x"}]
    for tools in (None, [], [TOOL]):
        expected = theirs.apply_chat_template(messages, tools=tools, tokenize=False)
        assert tokenizer.apply_chat_template(messages, tools=tools) == expected
