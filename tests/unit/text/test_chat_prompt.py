"""Prompts from messages: the template's ids exactly, and no control token out of a message."""

from collections.abc import Sequence
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, normalizers

from lowlat.text.chat_prompt import encode_chat
from lowlat.text.parts import TokenizerParts
from lowlat.text.tokenizer import Tokenizer
from lowlat.utils.errors import UserError
from tests.unit.text.conftest import CHATML, trained

SPLITTING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ m.content.split('</think>')[-1] | trim }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
)
WRITING = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content | lower }}<|im_end|>"
    "<{{ m.name }}><|{{ m.content }}{{ m.name }}|>{{ m.content | upper }}{% endfor %}"
    "<|im_{{ messages[0].content }}"
)
TOOLS = (
    "{% for t in tools or [] %}{{ t | tojson }}{{ t | tojson(ensure_ascii=true) }}"
    "{% for k in t.function.parameters.properties %}<{{ k }}>{% endfor %}{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% for c in m.tool_calls or [] %}"
    "<think>{{ c.function.name }}{{ c.function.arguments | tojson }}</think>{% endfor %}"
    "{% endfor %}"
)
HOSTILE = (
    "<|im_end|>", "<|im_start|>", "<think>", "</think>", "think", "im_end", "im_", "end|>", "|>",
    "<|", "<", ">", "<|IM_END|>", "end", "user", "\ue000", "\\ue000", "\uf8ff", "\n", " ", "a",
    "\uff1c", "\u212a", "KELVIN", "<KELVIN", "<|end", "\U000f0000", "x", "\u0301", "[x", "y]",
)  # fmt: skip


def make(template: str, *, normalizer: normalizers.Normalizer | None = None) -> Tokenizer:
    """The trained vocabulary with tokens of all kinds: special, plain, normalised, in brackets."""
    backend = trained()
    backend.add_special_tokens([AddedToken("<|user|>", special=True), AddedToken("[x y]")])
    backend.add_tokens([AddedToken("</think>", normalized=False), AddedToken("<KELVIN>")])
    if normalizer is not None:
        backend.normalizer = normalizer
    parts = TokenizerParts(
        backend=backend, special_tokens={}, eos_ids=frozenset(), chat_template=template, origin="t"
    )
    return Tokenizer(parts)


CHATML_TOKENIZER = make(CHATML)
TOKENIZERS = [
    CHATML_TOKENIZER,
    make(SPLITTING),
    make(WRITING),
    make(TOOLS),
    make(WRITING, normalizer=normalizers.NFC()),
    make(CHATML, normalizer=normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])),
]


def plain(tokenizer: Tokenizer, messages: Sequence[dict[str, Any]], **more: Any) -> list[int]:
    """The ids that a template's text has by itself."""
    text = tokenizer.apply_chat_template(messages, **more)
    return tokenizer.encode(text, add_special_tokens=False)


def control(tokenizer: Tokenizer, ids: list[int]) -> list[int]:
    return [index for index in ids if index in tokenizer.added_tokens]


def conversation(texts: list[str]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Messages and tools that carry `texts` in all places a request can put them."""
    first, second, name, key, value = texts
    call = {"id": name, "type": "function", "function": {"name": name, "arguments": {key: value}}}
    messages = [
        {"role": "user", "content": first, "name": name},
        {"role": "assistant", "content": second, "name": key, "tool_calls": [call]},
        {"role": "tool", "content": value, "name": name},
    ]
    parameters = {"type": "object", "properties": {key: {"description": value}}}
    function = {"name": name, "description": second, "parameters": parameters}
    return messages, [{"type": "function", "function": function}]


hostile = st.lists(st.sampled_from(HOSTILE), min_size=1, max_size=4).map("".join)


@pytest.mark.slow
@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@settings(max_examples=60, deadline=None)
@given(texts=st.lists(hostile, min_size=5, max_size=5))
def test_no_text_of_a_request_becomes_a_control_token(
    tokenizer: Tokenizer, texts: list[str]
) -> None:
    """Regression: messages, names, schemas and arguments that end a turn or begin another."""
    messages, tools = conversation(texts)
    harmless, harmless_tools = conversation(["0", "1", "2", "3", "4"])
    ids = encode_chat(tokenizer, messages, tools=tools)
    expected = control(tokenizer, plain(tokenizer, harmless, tools=harmless_tools))
    assert control(tokenizer, ids) == expected


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@settings(max_examples=40, deadline=None)
@given(texts=st.lists(st.text(alphabet="ab <>|.\n[]é日\ue000", max_size=9), min_size=5, max_size=5))
def test_ids_are_those_of_the_template(tokenizer: Tokenizer, texts: list[str]) -> None:
    """Regression: other ids for "<", "> quoted" and code than the model was trained on."""
    messages, tools = conversation(texts)
    assert encode_chat(tokenizer, messages, tools=tools) == plain(tokenizer, messages, tools=tools)


@settings(max_examples=60, deadline=None)
@given(texts=st.lists(hostile, min_size=2, max_size=2))
def test_nothing_of_a_hostile_text_is_lost(texts: list[str]) -> None:
    tokenizer = CHATML_TOKENIZER
    messages = [{"role": "user", "content": text} for text in texts]
    ids = encode_chat(tokenizer, messages)
    text = tokenizer.apply_chat_template(messages)
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_hostile_text_is_encoded_as_if_the_token_did_not_exist() -> None:
    """Regression: a break inside words, as where only "<" is cut off."""
    tokenizer = CHATML_TOKENIZER
    ids = encode_chat(tokenizer, [{"role": "user", "content": "the <|im_end|> cat"}])
    start, end = tokenizer.encode("<|im_start|><|im_end|>", add_special_tokens=False)
    inner = "user\nthe <|im_end|> cat"
    assert ids[: ids.index(end)] == [start, *tokenizer.encode(inner, parse_special=False)]


def test_the_template_still_sees_what_it_looks_for() -> None:
    """Regression: old reasoning kept in the prompt because its end mark was hidden."""
    tokenizer = TOKENIZERS[1]
    messages = [{"role": "assistant", "content": "<think>\nlong\n</think>\n\nshort"}]
    assert encode_chat(tokenizer, messages) == plain(tokenizer, messages)
    assert "long" not in tokenizer.decode(encode_chat(tokenizer, messages))


def test_blank_tokens_stay_what_they_are() -> None:
    """Regression: indentation encoded by letters where the vocabulary has tokens for it."""
    backend = tokenizers.Tokenizer.from_str(trained().to_str())
    backend.add_tokens([AddedToken("    ", normalized=False)])
    parts = TokenizerParts(
        backend=backend, special_tokens={}, eos_ids=frozenset(), chat_template=CHATML, origin="t"
    )
    messages = [{"role": "user", "content": "if a < b:\n    print(x)"}]
    assert encode_chat(Tokenizer(parts), messages) == plain(Tokenizer(parts), messages)


def test_unknown_roles_are_text_too() -> None:
    tokenizer = CHATML_TOKENIZER
    ids = encode_chat(tokenizer, [{"role": "x<|im_end|>", "content": "a"}])
    assert len(control(tokenizer, ids)) == 3


def test_template_variables_and_errors_pass_through() -> None:
    tokenizer = make("{{ flag }}{{ messages[0].content }}")
    messages = [{"role": "user", "content": "<a>"}]
    assert tokenizer.decode(encode_chat(tokenizer, messages, flag=True)) == "True<a>"
    with pytest.raises(UserError, match="surrogate"):
        encode_chat(tokenizer, [{"role": "user", "content": "<\ud800"}])


def test_running_out_of_stand_ins_is_an_error() -> None:
    """Regression: stand-ins that the request's own text holds, which would be rewritten."""
    private = "".join(chr(code) for code in range(0xE000, 0xF900))
    messages = [{"role": "user", "content": f"<|im_end|>{private}"}]
    ids = encode_chat(CHATML_TOKENIZER, messages)
    assert private in CHATML_TOKENIZER.decode(ids)
    every = private + "".join(map(chr, [*range(0xF0000, 0xFFFFE), *range(0x100000, 0x10FFFE)]))
    with pytest.raises(UserError, match="messages use up"):
        encode_chat(CHATML_TOKENIZER, [{"role": "user", "content": f"<{every}"}])
