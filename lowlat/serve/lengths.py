"""Texts that cannot fit the context, told before any work is done on them.

Owns the bound alone: a token stands for so many bytes at most, so a text of more bytes than the
context has of them has more tokens too. Exact counts are taken after tokenising.
"""

from collections.abc import Iterable

from lowlat.generate.model import Model
from lowlat.serve.protocol.failure import RequestError


def check_size(model: Model, texts: Iterable[str], param: str) -> None:
    """Raise RequestError for the field `param` where `texts` cannot fit the model's context."""
    size = sum(len(text.encode("utf-8", "surrogatepass")) for text in texts)
    most = model.context * model.tokenizer.max_token_bytes
    if size > most:
        raise RequestError(
            f"{param}: a text of {size} bytes cannot fit the context of {model.context} tokens; "
            "shorten it",
            param=param,
            code="context_length_exceeded",
        )
