"""What the cached rows of an attention mean, where that is neither [K ; V] nor MLA's latent.

Owns the interface between attention over rows, which knows sequences and blocks of keys, and the
forms of attention, which know their rows (`gta`, `tpa`).
"""

from abc import ABC, abstractmethod

from jaxtyping import Float
from torch import Tensor


class EntryLayout(ABC):
    """How rows become keys and values."""

    @abstractmethod
    def expand(
        self, rows: Float[Tensor, "keys entry_dim"]
    ) -> tuple[Float[Tensor, "keys kv_heads head_dim"], Float[Tensor, "keys kv_heads head_dim"]]:
        """Keys and values of `rows`; consecutive query heads share one, as in GQA."""

    @abstractmethod
    def attend(
        self,
        q: Float[Tensor, "queries heads head_dim"],
        rows: Float[Tensor, "keys entry_dim"],
        *,
        start: int,
        scale: float,
    ) -> Float[Tensor, "queries heads head_dim"]:
        """Causal attention of few queries, at positions start, start + 1, ..., over `rows` from
        position 0, in whatever way is quickest for few. Equal to attention over `expand` up to
        rounding.
        """
