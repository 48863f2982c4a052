"""By which arithmetic the rows of new tokens are computed: bits depend on it and on nothing else.

Owns the three forms and the choice among them. A token's row in the cache has the same bits
whatever shares its step and however its prompt is cut, as long as the form is the same; so who
plans steps chooses the form from the request alone, and rows are shared only where forms agree.
"""

from typing import Literal

from lowlat.config.attention import DECOUPLED
from lowlat.config.model import AttentionConfig

Form = Literal["stream", "absorbed", "expanded"]
"""stream: few tokens, products that run at the speed of reading the weights, attention in the
latent space (MLA, GLA, GTA), over factors (TPA) or as always (GQA); absorbed: products of many
tokens, attention in the latent space; expanded: products of many tokens, attention over keys and
values (all but GQA build them once per head and key)."""

STREAM_TOKENS = 32
"""Up to so many new tokens of a sequence, reading the weights is all the time a step takes."""


def form_of(attention: AttentionConfig, length: int) -> Form:
    """The quickest form for `length` new tokens of one sequence."""
    if length <= STREAM_TOKENS:
        return "stream"
    is_latent = isinstance(attention, DECOUPLED) and length <= attention.expansion_break_even
    return "absorbed" if is_latent else "expanded"
