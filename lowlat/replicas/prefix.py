"""Prompt prefixes for routing: chained block hashes of a request's prompt, like those of the prefix
cache, but of text instead of tokens.

The gateway has no tokenizer: a page is PAGE_BYTES of the prompt's JSON, about as many tokens as a
KV cache page holds.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

PAGE_BYTES = 256
MAX_PAGES = 1024
"""Pages that are hashed: prompts that agree in more than these go to the same replica."""
_BEFORE = ("tools", "system", "instructions")
"""Fields that chat templates put before the messages."""
_MESSAGES = ("messages", "input")
_TEXTS = ("prompt", "input", "content")


@dataclass(frozen=True, slots=True)
class Prefix:
    """What a request's prompt begins with."""

    pages: tuple[bytes, ...] = ()
    """Hashes of its pages, each over all pages before it."""
    home: bytes = b""
    """Hash of its opening, which stays the same while a conversation grows: what comes up to the
    first message of the user, or the first page of a plain prompt."""


def prefix_of(body: bytes, namespace: bytes = b"") -> Prefix:
    """The prefix of a request's JSON body; empty if it has no prompt. Different `namespace`s (API
    keys) share no hashes, as they share no KV cache pages."""
    try:
        fields = json.loads(body)
    except ValueError:
        return Prefix()
    if not isinstance(fields, dict):
        return Prefix()
    opening, rest = _split_prompt(fields)
    if not opening:
        return Prefix()
    root = hashlib.sha256(namespace + _json(fields.get("model"))).digest()
    home = opening if rest is not None else opening[:PAGE_BYTES]
    return Prefix(
        pages=tuple(_chain(root, opening + (rest or b""))),
        home=hashlib.sha256(root + home).digest(),
    )


def _split_prompt(fields: dict[str, Any]) -> tuple[bytes, bytes | None]:
    """The prompt's opening and what follows it; None if the prompt has no messages."""
    head = b"".join(_json(fields[name]) for name in _BEFORE if fields.get(name))
    for name in _MESSAGES:
        messages = fields.get(name)
        if isinstance(messages, list) and any(isinstance(each, dict) for each in messages):
            is_user = [isinstance(m, dict) and m.get("role") == "user" for m in messages]
            count = is_user.index(True) + 1 if any(is_user) else len(messages)
            texts = [_json(message) for message in messages]
            return head + b"".join(texts[:count]), b"".join(texts[count:])
    text = next((fields[name] for name in _TEXTS if fields.get(name)), None)
    return (head + _json(text), None) if text is not None else (b"", None)


def _chain(parent: bytes, text: bytes) -> Iterator[bytes]:
    """Hashes of the full pages of `text`."""
    for start in range(0, min(len(text), MAX_PAGES * PAGE_BYTES) - PAGE_BYTES + 1, PAGE_BYTES):
        parent = hashlib.sha256(parent + text[start : start + PAGE_BYTES]).digest()
        yield parent


def _json(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode(
        "utf-8", "surrogatepass"
    )
