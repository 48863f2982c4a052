"""Chat messages to prompt token ids, safe against control-token injection by message text.

Owns the separation of the chat template's text, which is trusted, from all text of a request.
`text.template` renders the template, `text.tokenizer` encodes text.

The prompt is rendered a second time with stand-ins (private-use characters) for the characters of
the request's text that could begin or end a control token. Every control token in the second
rendering comes from the template. If both renderings have the same control tokens, the ids of the
first one are right; otherwise the control tokens come from the second one, and the text between
them is encoded as ordinary text.
"""

import json
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from lowlat.text.tokenizer import Tokenizer
from lowlat.utils.errors import UserError

ROLES = frozenset({"system", "developer", "user", "assistant", "tool"})
WORDS = frozenset(
    "role content name type function functions tool tools tool_calls tool_call_id reasoning_content"
    " arguments parameters description strict id text properties required items enum const default"
    " title format object array string number integer boolean null anyOf oneOf allOf".split()
)
"""Words of the message and tool formats, on which templates branch."""
STAND_INS = (range(0xE000, 0xF900), range(0xF0000, 0xFFFFE), range(0x100000, 0x10FFFE))
"""Unicode's private-use characters: no template, normaliser or pre-tokenizer knows them."""

Convert = Callable[[str], str]


def encode_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    continues: bool = False,
    encode: Callable[..., list[int]] | None = None,
    **template_vars: Any,
) -> list[int]:
    """Token ids of the prompt for the next assistant message after `messages`.

    continues: the prompt ends with the content of the last message, which the output continues
    (assistant prefill). encode: encodes texts instead of `tokenizer.encode`, and may refuse them.

    No text in `messages` or `tools` becomes an added token (except one of blanks only): there
    "<|im_end|>" is ordinary text, also if only template and text together spell it. Without such
    text the ids are those of `apply_chat_template`, encoded. `template_vars` are trusted. Raises
    UserError if the model has no template or the template fails.
    """
    sent = {"messages": list(messages), "tools": None if tools is None else list(tools)}
    end = ""
    if continues:
        end = next(_unused(json.dumps(sent, ensure_ascii=False)))
        last = messages[-1]
        sent["messages"] = [*messages[:-1], {**last, "content": f"{last['content']}{end}"}]
        template_vars["add_generation_prompt"] = False

    def render(sent: Mapping[str, Any]) -> str:
        return _until(tokenizer.apply_chat_template(**sent, **template_vars), end)

    text = render(sent)
    encode = encode or partial(tokenizer.encode, add_special_tokens=False)
    ids = encode(text)
    control = {id: text for id, text in tokenizer.added_tokens.items() if not text.isspace()}
    marks = _Marks(sent, list(control.values()), tokenizer.template_for(tools) or "")
    if not marks.any:
        return ids
    marked = render(marks.apply(sent))
    spans = [span for span in tokenizer.control_spans(marked) if span[0] in control]
    if [id for id in ids if id in control] == [id for id, _, _ in spans]:
        return ids
    return _encode_between(encode, marked, spans, marks.restore)


def _until(text: str, end: str) -> str:
    """`text` up to `end`, which it must have once; all of it if `end` is ""."""
    if not end:
        return text
    if text.count(end) != 1:
        raise UserError("the chat template does not end with the last message; do not continue it")
    return text[: text.index(end)]


def _encode_between(
    encode: Callable[..., list[int]],
    marked: str,
    spans: Sequence[tuple[int, int, int]],
    restore: Convert,
) -> list[int]:
    """Ids of the control tokens at `spans` of `marked`, and of the rest as ordinary text."""
    ids: list[int] = []
    done = 0
    for control_id, start, end in [*spans, (None, len(marked), len(marked))]:
        between = restore(marked[done:start])
        if between:
            ids += encode(between, parse_special=False)
        if control_id is not None:
            ids.append(control_id)
        done = end
    return ids


class _Marks:
    """Stand-ins for the characters of a request's strings that could be part of a control token."""

    def __init__(self, sent: Mapping[str, Any], control: Sequence[str], template: str) -> None:
        edges = {token[0] for token in control} | {token[-1] for token in control}
        self._insides = "\0".join(_folded(token) for token in control)
        self._template = template
        strings: list[str] = []

        def collect(string: str) -> str:
            strings.append(string)
            return string

        _converted(sent, collect)
        self._edges = {char for char in set("".join(strings)) if not edges.isdisjoint(_forms(char))}
        inside = [string for string in strings if self._is_inside(string)]
        used = self._edges.union(*inside)
        self.any = bool(used)
        """Whether any character is replaced."""
        fresh = _unused("".join(strings) + template)
        self._stand_ins = dict(zip(sorted(used), fresh, strict=False))
        if len(self._stand_ins) < len(used):
            raise UserError("messages use up Unicode's private-use characters; send fewer of them")

    def _is_inside(self, string: str) -> bool:
        """Whether the template could make a control token by writing around all of `string`."""
        word = _folded(string.strip())
        quoted = f"'{string}'" in self._template or f'"{string}"' in self._template
        return bool(word) and word in self._insides and string not in WORDS and not quoted

    def _mark(self, string: str) -> str:
        chars = set(string) if self._is_inside(string) else self._edges
        return "".join(self._stand_ins[char] if char in chars else char for char in string)

    def apply(self, sent: Mapping[str, Any]) -> dict[str, Any]:
        """`sent` with stand-ins in all its strings."""
        return _converted(sent, self._mark)

    def restore(self, text: str) -> str:
        """Rendered `text` with the original characters, also where the template wrote JSON."""
        for char, stand_in in self._stand_ins.items():
            text = text.replace(stand_in, char)
            text = text.replace(json.dumps(stand_in)[1:-1], json.dumps(char)[1:-1])
        return text


def _folded(text: str) -> str:
    return text.upper().lower()


def _forms(char: str) -> str:
    """`char` and what a template's filters or a normaliser may make of it."""
    return char + char.upper() + char.lower() + unicodedata.normalize("NFKC", char)


def _converted(value: Any, convert: Convert) -> Any:
    """The JSON `value` with `convert` applied to every string but a message's known role."""
    if isinstance(value, str):
        return convert(value)
    if isinstance(value, Mapping):
        return {
            key if key in WORDS else convert(str(key)): item
            if _is_role(key, item)
            else _converted(item, convert)
            for key, item in value.items()
        }
    if isinstance(value, Sequence):
        return [_converted(item, convert) for item in value]
    return value


def _is_role(key: object, value: object) -> bool:
    """Templates write these between the marks of a control token: <|user|>."""
    return key == "role" and isinstance(value, str) and value in ROLES


def _unused(text: str) -> Iterator[str]:
    """Private-use characters that `text` does not hold, neither as such nor escaped."""
    lower = text.lower()
    for code in (code for codes in STAND_INS for code in codes):
        char = chr(code)
        if char not in text and json.dumps(char)[1:-1] not in lower:
            yield char
