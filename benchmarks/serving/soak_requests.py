"""Requests of the soak test: valid ones of many kinds, aborted ones, invalid ones."""

import random
from dataclasses import dataclass
from typing import Any, Literal

CANCELLED = 0.10
INVALID = 0.05
WORDS = (
    "the tea is hot and the kettle sings while rain falls on the roof of a small house near a "
    "river that runs to the sea past fields of barley and old stone walls"
).split()
SYSTEM = "You are a helpful assistant who answers briefly and never invents facts. " * 4
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"

Manner = Literal["ordinary", "cancelled", "invalid"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """One request."""

    manner: Manner
    path: str
    body: dict[str, Any] | bytes
    """Bytes are sent as they are."""
    kind: str
    """Name in the counts."""
    abort_seconds: float | None = None
    """Seconds from sending until the client disconnects; None for calls that are not cancelled."""

    @property
    def is_stream(self) -> bool:
        return isinstance(self.body, dict) and bool(self.body.get("stream"))


class Mix:
    """Endless random calls, determined by a seed."""

    def __init__(self, model: str, *, seed: int, has_chat: bool, longest: int) -> None:
        """`longest`: maximum tokens of an answer."""
        self._stream = random.Random(seed)
        self._model = model
        self._has_chat = has_chat
        self._longest = longest

    def draw(self) -> Call:
        share = self._stream.random()
        if share < INVALID:
            return self._stream.choice(self.invalid())
        path, body, kind = self._ordinary()
        if share < INVALID + CANCELLED:
            body["stream"] = self._stream.random() < 0.7
            seconds = self._stream.choice((0.0, 0.01, 0.05, 0.2, 0.8))
            return Call(manner="cancelled", path=path, body=body, kind=kind, abort_seconds=seconds)
        return Call(manner="ordinary", path=path, body=body, kind=kind)

    def words(self, low: int, high: int) -> str:
        return " ".join(self._stream.choices(WORDS, k=self._stream.randint(low, high)))

    def _ordinary(self) -> tuple[str, dict[str, Any], str]:
        stream = self._stream
        body: dict[str, Any] = {
            "model": self._model,
            "max_tokens": stream.randint(1, self._longest),
            "stream": stream.random() < 0.5,
        }
        kind, changes = stream.choice(
            (
                ("greedy", {"temperature": 0}),
                ("sampled", {"temperature": 0.8, "top_p": 0.9, "seed": stream.randrange(99)}),
                ("several", {"temperature": 1.0, "n": 2}),
                ("stopped", {"temperature": 1.0, "stop": ["a", "e\n"]}),
                ("penalised", {"temperature": 0.7, "frequency_penalty": 0.5}),
                ("logprobs", {"temperature": 0}),
                ("schema", {"temperature": 0.5}),
            )
        )
        body |= changes
        if self._has_chat and stream.random() < 0.5:
            return CHAT, body | self._chat(kind), kind
        return COMPLETIONS, body | self._completion(kind), kind

    def _chat(self, kind: str) -> dict[str, Any]:
        messages = [{"role": "user", "content": self.words(3, 60)}]
        if self._stream.random() < 0.5:
            messages.insert(0, {"role": "system", "content": SYSTEM})
        changes: dict[str, Any] = {"messages": messages}
        if kind == "logprobs":
            changes |= {"logprobs": True, "top_logprobs": 2}
        if kind == "schema":
            schema = {"name": "person", "schema": SCHEMA, "strict": True}
            changes["response_format"] = {"type": "json_schema", "json_schema": schema}
        return changes

    def _completion(self, kind: str) -> dict[str, Any]:
        prefix = SYSTEM if self._stream.random() < 0.5 else ""
        changes: dict[str, Any] = {"prompt": prefix + self.words(3, 60)}
        if kind == "logprobs":
            changes["logprobs"] = 2
        if kind == "schema":
            forms = ({"json": SCHEMA}, {"regex": "[a-z]{1,9}( [0-9]+)?"}, {"choice": ["a", "b c"]})
            changes["structured_outputs"] = self._stream.choice(forms)
        return changes

    def invalid(self) -> list[Call]:
        """One call of every invalid kind."""
        return [
            Call(manner="invalid", path=path, body=body, kind=kind)
            for kind, path, body in self._invalid_bodies()
        ]

    def _invalid_bodies(self) -> list[tuple[str, str, dict[str, Any] | bytes]]:
        good = {"model": self._model, "prompt": self.words(1, 9), "max_tokens": 4}
        chat = {"model": self._model, "max_tokens": 4}
        return [
            ("no JSON", COMPLETIONS, b'{"model": "m", "prompt": '),
            ("deep JSON", COMPLETIONS, b"[" * 50_000),
            ("not an object", COMPLETIONS, b"[1, 2, 3]"),
            ("NaN", COMPLETIONS, b'{"model": "m", "prompt": "a", "temperature": NaN}'),
            ("no prompt", COMPLETIONS, {"model": self._model}),
            ("unknown field", COMPLETIONS, good | {"wishes": 3}),
            ("negative tokens", COMPLETIONS, good | {"max_tokens": -2}),
            ("tokens as text", COMPLETIONS, good | {"max_tokens": "4"}),
            ("boolean tokens", COMPLETIONS, good | {"max_tokens": True}),
            ("hot", COMPLETIONS, good | {"temperature": 1e9}),
            ("too many choices", COMPLETIONS, good | {"n": 10_000, "temperature": 1}),
            ("token id", COMPLETIONS, good | {"prompt": [1, 2, 1 << 40]}),
            ("other model", COMPLETIONS, good | {"model": "no-such-model"}),
            ("regex", COMPLETIONS, good | {"structured_outputs": {"regex": "(a"}}),
            ("long prompt", COMPLETIONS, good | {"prompt": "tea " * 100_000}),
            ("no messages", CHAT, chat | {"messages": []}),
            ("unknown role", CHAT, chat | {"messages": [{"role": "king", "content": "hm"}]}),
            ("no such path", "/v1/nothing", good),
        ]
