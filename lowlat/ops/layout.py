"""Interface of KV cache entries that are neither [K ; V] nor MLA's latent (`gta`, `tpa`): how keys
and values come from entries.
"""

from abc import ABC, abstractmethod

from jaxtyping import Float
from torch import Tensor


class EntryLayout(ABC):
    """Meaning of the KV cache entries of an attention variant."""

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
        position 0: the decode path. Equal to attention over `expand` up to rounding.
        """
