"""By which arithmetic the rows of new tokens are computed: bits depend on it and on nothing else.

Owns the three paths and the choice among them. A token's row in the cache has the same bits
whatever shares its step and however its prompt is cut, as long as the path is the same; so who
plans steps chooses the path from the request alone, and rows are shared only where paths agree.
"""

from typing import Literal

from lowlat.config.attention import DECOUPLED_ROPE, ModelAttention, distinct, expansion_break_even

AttentionPath = Literal["decode", "absorbed", "expanded"]
"""stream: few tokens, products that run at the speed of reading the weights, attention in the
latent space (MLA, GLA, GTA), over factors (TPA) or as always (GQA); absorbed: products of many
tokens, attention in the latent space; expanded: products of many tokens, attention over keys and
values (all but GQA build them once per head and key)."""

DECODE_TOKENS = 32
"""Up to so many new tokens of a sequence, reading the weights is all the time a step takes."""


def choose_path(attention: ModelAttention, length: int) -> AttentionPath:
    """The quickest path for `length` new tokens of one sequence: one for all layers, be they as
    different as they like.
    """
    if length <= DECODE_TOKENS:
        return "decode"
    latent = [
        layer.latent_sizes for layer in distinct(attention) if isinstance(layer, DECOUPLED_ROPE)
    ]
    return "absorbed" if latent and length <= expansion_break_even(latent) else "expanded"
