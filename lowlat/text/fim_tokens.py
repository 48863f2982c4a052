"""Fill-in-the-middle (FIM) tokens of known model families."""

from dataclasses import dataclass

from lowlat.text.tokenizer import Tokenizer

FIM = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")
KNOWN_FIM = (
    FIM,
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    ("<\uff5cfim\u2581begin\uff5c>", "<\uff5cfim\u2581hole\uff5c>", "<\uff5cfim\u2581end\uff5c>"),
)
"""Fill-in-the-middle tokens by family: prefix, suffix, middle."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FimTokens:
    """Ids of the fill-in-the-middle tokens: before the first part of a document, the last, and the
    part between them, which the model completes.
    """

    prefix: int
    suffix: int
    middle: int


def fim_tokens(tokenizer: Tokenizer) -> FimTokens | None:
    """Fill-in-the-middle tokens, if the tokenizer has those of a known family."""
    ids = {text: index for index, text in tokenizer.added_tokens.items()}
    for family in KNOWN_FIM:
        if set(family) <= ids.keys():
            prefix, suffix, middle = (ids[token] for token in family)
            return FimTokens(prefix=prefix, suffix=suffix, middle=middle)
    return None
