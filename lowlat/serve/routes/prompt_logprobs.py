"""Log-probabilities of prompt tokens in responses: `echo` with `logprobs`, and vLLM's
`prompt_logprobs`.

The engine computes them (`engine.sampler`). A prompt may have many tokens, so responses with them
are built off the event loop.
"""

from collections.abc import Iterable, Iterator, Sequence

from lowlat.engine.prompt_logprobs import PromptLogprob
from lowlat.serve.protocol import limits
from lowlat.serve.protocol.base import WireModel
from lowlat.serve.protocol.errors import RequestError
from lowlat.text.tokenizer import Tokenizer


class PromptTokenLogprob(WireModel):
    """One token at a position of the prompt, in vLLM's format."""

    logprob: float
    rank: int
    """1 for the likeliest token."""
    decoded_token: str
    """Its text, with U+FFFD for incomplete characters."""


PromptLogprobs = Iterable[dict[int, PromptTokenLogprob] | None]
"""For each prompt token the logprobs of it and of the likeliest tokens, by id; the first is null.
Built while it is serialized, entry by entry: whole, a quarter of a million objects would hold the
interpreter's lock for most of a second.
"""


def check_size(prompts: Sequence[Sequence[int]], top: int, *, n: int, param: str) -> None:
    """Raise RequestError if the prompts have too many log-probabilities together."""
    count = sum(map(len, prompts)) * (top + 1) * n
    if count > limits.MAX_PROMPT_LOGPROBS:
        raise RequestError(
            f"{param}: prompt tokens times ({param} + 1) are {count}, at most "
            f"{limits.MAX_PROMPT_LOGPROBS} are allowed; send fewer prompts",
            param=param,
        )


def prompt_logprobs(
    tokenizer: Tokenizer, entries: Sequence[PromptLogprob], *, top: int
) -> Iterator[dict[int, PromptTokenLogprob] | None]:
    """`entries` in vLLM's format, with `top` of the likeliest tokens."""
    yield None
    for entry in entries:
        shown = {
            token: _shown(tokenizer, token, logprob, rank)
            for rank, (token, logprob) in enumerate(entry.top[:top], 1)
        }
        shown.setdefault(entry.token, _shown(tokenizer, entry.token, entry.logprob, entry.rank))
        yield shown


def _shown(tokenizer: Tokenizer, token: int, logprob: float, rank: int) -> PromptTokenLogprob:
    text = tokenizer.id_to_bytes(token).decode("utf-8", "replace")
    return PromptTokenLogprob(logprob=logprob, rank=rank, decoded_token=text)


def text_offsets(tokenizer: Tokenizer, prompt: Sequence[int], text: str) -> list[int]:
    """Number of characters of `text`, that of `prompt`, before each token."""
    offsets, count = [], 0
    for token in prompt:
        offsets.append(min(count, len(text)))
        if token not in tokenizer.special_ids:
            # Bytes of the form 10xxxxxx continue a character.
            count += sum(byte & 0xC0 != 0x80 for byte in tokenizer.id_to_bytes(token))
    return offsets
