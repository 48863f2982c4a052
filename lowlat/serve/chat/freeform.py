"""Custom (freeform) tools as functions with one text argument, and a reader of that argument.

Chat templates know functions with JSON arguments only, so a custom tool is presented as a function
with the parameter `input`; FreeformReader decodes what the model writes, piece by piece.
"""

import json
import re
from typing import Literal

ARGUMENT = "input"
PARAMETERS: dict[str, object] = {
    "type": "object",
    "properties": {ARGUMENT: {"type": "string"}},
    "required": [ARGUMENT],
    "additionalProperties": False,
}
REPLACEMENT = "\ufffd"
_HEAD = re.compile(rf'\s*\{{\s*"{ARGUMENT}"\s*:\s*"')
_MAX_HEAD = 256
_PIECE = re.compile(r'[^"\\]+|\\u[0-9a-fA-F]{4}|\\[^u]', re.DOTALL)
_HIGH = re.compile(r"\\u[dD][89abAB][0-9a-fA-F]{2}")
_LOW = re.compile(r"\\u[dD][c-fC-F][0-9a-fA-F]{2}")
_SURROGATE = re.compile("[\ud800-\udfff]")
_LONGEST = len(r"\ud800\udc00")


def arguments_of(text: str) -> str:
    """The arguments of a past call with the input `text`."""
    return json.dumps({ARGUMENT: text}, ensure_ascii=False)


class FreeformReader:
    """Decodes the JSON text `{"input": "..."}` as it arrives; no part of the text is lost.

    A lone surrogate becomes U+FFFD. Arguments of another form are the input as they are.
    """

    def __init__(self) -> None:
        self._state: Literal["head", "text", "other", "tail"] = "head"
        self._unread = ""

    def push(self, text: str) -> str:
        """Add a piece; returns the text that is now certain."""
        self._unread += text
        if self._state == "head":
            self._read_head()
        return self._read_text(is_end=False) if self._state == "text" else ""

    def finish(self) -> str:
        """The rest of the text: no more pieces follow."""
        if self._state in ("head", "other"):
            return self._whole()
        rest = self._read_text(is_end=True) if self._state == "text" else ""
        if self._state == "tail" and self._unread.strip() not in ("", "}"):
            # An unescaped quote does not end the text.
            rest += '"' + self._unread
        return rest

    def _read_head(self) -> None:
        if match := _HEAD.match(self._unread):
            self._state, self._unread = "text", self._unread[match.end() :]
        elif len(self._unread) > _MAX_HEAD:
            self._state = "other"

    def _whole(self) -> str:
        """Arguments that do not begin with the text."""
        try:
            value = json.loads(self._unread)
        except (ValueError, RecursionError):
            return self._unread
        if isinstance(value, dict) and isinstance(text := value.get(ARGUMENT), str):
            return _SURROGATE.sub(REPLACEMENT, text)
        return self._unread

    def _read_text(self, *, is_end: bool) -> str:
        decoded: list[str] = []
        while self._unread:
            if self._unread[0] == '"':
                self._state, self._unread = "tail", self._unread[1:]
                break
            is_escape = self._unread[0] == "\\"
            if is_escape and len(self._unread) < _LONGEST and not is_end and self._may_grow():
                break
            match = _PIECE.match(self._unread)
            raw = self._unread[0] if match is None else match[0]
            if _HIGH.fullmatch(raw) and (low := _LOW.match(self._unread, len(raw))):
                raw += low[0]
            self._unread = self._unread[len(raw) :]
            decoded.append(_decoded(raw))
        return "".join(decoded)

    def _may_grow(self) -> bool:
        """Whether more text may change the meaning of the escape that comes next."""
        match = _PIECE.match(self._unread)
        if match is None:
            return re.fullmatch(r"\\(u[0-9a-fA-F]{0,3})?", self._unread) is not None
        if not _HIGH.fullmatch(match[0]):
            return False
        rest = self._unread[match.end() :]
        return re.fullmatch(r"(\\(u[0-9a-fA-F]{0,3})?)?", rest) is not None


def _decoded(raw: str) -> str:
    """A piece of a JSON string; invalid escapes as they are."""
    try:
        text = json.loads(f'"{raw}"', strict=False)
    except ValueError:
        return raw
    return _SURROGATE.sub(REPLACEMENT, text)
