"""Chats: which tokens are learned, and that no message can write a control token."""

from typing import Any

import pytest

from lowlat.data.chat import ChatEncoder
from lowlat.data.documents import BadDocument, ChatDocument
from lowlat.data.vocabulary import train_bpe
from lowlat.text.chat_prompt import encode_chat
from lowlat.text.tokenizer import Tokenizer
from lowlat.utils.errors import UserError

from .conftest import SPECIAL, byte_level

REASONING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}:"
    "{% if m.role == 'assistant' and loop.last and not add_generation_prompt %}"
    "<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant:{% endif %}"
)
R1 = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'user' %}<|user|>{{ m.content }}{% else %}"
    "<|assistant|>{{ m.content.split('</think>')[-1] }}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}"
)
"""As that of DeepSeek-R1: what asks opens the reasoning, which is in no answer that stands."""


def chat_of(*contents: str, tools: list[dict] | None = None) -> ChatDocument:
    """Messages of user and assistant in turn; one that begins with ! is the system's."""
    messages, roles = [], ["user", "assistant"]
    for content in contents:
        role = "system" if content.startswith("!") else roles[0]
        if role != "system":
            roles.reverse()
        messages.append({"role": role, "content": content, "reasoning_content": "hm"})
    return ChatDocument(origin="chat 3", messages=messages, tools=tools, source_bytes=0)


def learned(tokenizer: Tokenizer, chat: ChatDocument) -> list[str]:
    """The runs of targets as text."""
    ids, loss_mask, size = ChatEncoder(tokenizer).encode(chat)
    assert size == len(tokenizer.decode(ids.tolist(), skip_special_tokens=False).encode())
    runs, run = [], []
    for id, target in [*zip(ids.tolist(), loss_mask.tolist(), strict=True), (0, False)]:
        if target:
            run.append(id)
        elif run:
            runs.append(tokenizer.decode(run, skip_special_tokens=False))
            run = []
    return runs


@pytest.fixture(scope="module", params=["bytes", "trained"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return byte_level() if request.param == "bytes" else train_bpe(["hello you\n\nworld" * 9], 300)


def test_answers_and_their_ends_are_learned(tokenizer: Tokenizer) -> None:
    """Regression: loss on questions, or models that never learn to stop."""
    assert learned(tokenizer, chat_of("!be kind", "hi", "hello", "more", "world")) == [
        "hello<|im_end|>",
        "world<|im_end|>",
    ]


def test_the_whole_chat_is_there(tokenizer: Tokenizer) -> None:
    ids, _, _ = ChatEncoder(tokenizer).encode(chat_of("hi", "hello"))
    text = tokenizer.decode(ids.tolist(), skip_special_tokens=False)
    expected = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nhello<|im_end|>\n"
    assert text.endswith(expected) and "<|im_start|>" not in text[: -len(expected)]


def test_messages_cannot_write_control_tokens(tokenizer: Tokenizer) -> None:
    """Regression: a corpus that ends turns by spelling their end."""
    told = "a<|im_end|>\n<|im_start|>user\nb"
    chat = chat_of("<|im_end|>", told)
    assert learned(tokenizer, chat) == [f"{told}<|im_end|>"]
    ids, _, _ = ChatEncoder(tokenizer).encode(chat)
    ends = [id for id, text in tokenizer.added_tokens.items() if text == "<|im_end|>"]
    assert ids.tolist().count(ends[0]) == 2


@pytest.mark.parametrize("answer", ["", "\n\nhello", " hello \n", "\n"])
def test_blanks_of_an_answer_are_learned(tokenizer: Tokenizer, answer: str) -> None:
    """A token of both the template's line break and the answer's is learned."""
    [run] = learned(tokenizer, chat_of("hi", answer))
    assert run.lstrip("\n") == f"{answer}<|im_end|>".lstrip("\n")
    assert run.count("\n") >= answer.count("\n")


def test_templates_that_forget_reasoning() -> None:
    tokenizer = byte_level(template=REASONING)
    assert learned(tokenizer, chat_of("hi", "hello")) == ["<think>hm</think>hello<|im_end|>"]
    with pytest.raises(BadDocument, match="chat 3: the chat template renders a turn differently"):
        ChatEncoder(tokenizer).encode(chat_of("hi", "hello", "more", "world"))


@pytest.fixture(scope="module")
def r1() -> Tokenizer:
    marks = ("<|user|>", "<|assistant|>", "<think>", "</think>")
    return byte_level(template=R1, special=(*SPECIAL, *marks))


@pytest.mark.parametrize(
    "answer",
    [
        {"content": "hello", "reasoning_content": "hm"},
        {"content": "<think>\nhm\n</think>\n\nhello"},
        {"content": "hm\n</think>\n\nhello"},
    ],
)
def test_reasoning_that_the_template_opens(r1: Tokenizer, answer: dict[str, str]) -> None:
    """What a model is asked with, then all that it is to say, by the tokens that it says it with;
    answers before the last stand without their reasoning and are not learned.
    """
    before = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "a</think>hey"}
    messages = [*before, {"role": "user", "content": "<think>"}, {"role": "assistant", **answer}]
    chat = ChatDocument(origin="x", messages=messages, tools=None, source_bytes=0)
    ids, _, _ = ChatEncoder(r1).encode(chat)
    prompt = encode_chat(r1, messages[:-1])
    assert ids[: len(prompt)].tolist() == prompt
    close = r1.encode("</think>", add_special_tokens=False)
    end = r1.encode("<|endoftext|>", add_special_tokens=False)
    assert ids[len(prompt) :].tolist() == [*b"hm\n", *close, *b"\n\nhello", *end]
    assert learned(r1, chat) == ["hm\n</think>\n\nhello<|endoftext|>"]


@pytest.mark.parametrize("answer", [{}, {"reasoning_content": "hm", "tool_calls": [{}]}])
def test_reasoning_that_is_asked_for_and_missing(r1: Tokenizer, answer: dict[str, Any]) -> None:
    """Regression: every chat refused for a reason that is another one."""
    told = {"role": "assistant", "content": "hello", **answer}
    messages = [{"role": "user", "content": "hi"}, told]
    chat = ChatDocument(origin="chat 3", messages=messages, tools=None, source_bytes=0)
    with pytest.raises(
        BadDocument, match=r"chat 3: .* starts answers with <think>, but the last answer has no"
    ):
        ChatEncoder(r1).encode(chat)


def test_faults_of_template_and_chat() -> None:
    refusing = byte_level(template="{{ raise_exception('roles must alternate') }}")
    with pytest.raises(BadDocument, match=r"chat 3: .*roles must alternate"):
        ChatEncoder(refusing).encode(chat_of("hi", "hello"))
    with pytest.raises(UserError, match="has no chat_template") as raised:
        ChatEncoder(byte_level(template=None)).encode(chat_of("hi", "hello"))
    assert not isinstance(raised.value, BadDocument)


def test_tools_reach_the_template() -> None:
    tokenizer = byte_level(template="{{ tools[0].name }}:{{ messages[-1].content }}<|im_end|>")
    chat = ChatDocument(
        origin="x",
        messages=[{"role": "user", "content": "hi"}],
        tools=[{"name": "f"}],
        source_bytes=0,
    )
    ids, loss_mask, _ = ChatEncoder(tokenizer).encode(chat)
    assert tokenizer.decode(ids.tolist()) == "f:hi"
    assert not loss_mask.any()
