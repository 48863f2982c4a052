"""The one interface between the model's layers and attention: the model never sees pages or other
sequences.
"""

from abc import ABC, abstractmethod

from jaxtyping import Float
from torch import Tensor

from lowlat.ops.layout import EntryLayout


class AttentionBackend(ABC):
    """Attends for all tokens of one step; made per step, called once per layer.

    Tokens of several sequences lie one after the other; a token sees its own sequence up to its own
    position.
    """

    @abstractmethod
    def mla(
        self,
        layer: int,
        q_nope: Float[Tensor, "tokens heads nope_dim"],
        q_rope: Float[Tensor, "tokens heads rope_dim"],
        rows: Float[Tensor, "tokens entry_dim"],
        w_uk: Float[Tensor, "heads nope_dim latent"],
        w_uv: Float[Tensor, "heads v_dim latent"],
        scale: float,
    ) -> Float[Tensor, "tokens heads v_dim"]:
        """MLA. `rows` are the new tokens' [c_t ; k_R], normalised and rotated; w_uk and w_uv the
        up-projections.
        """

    @abstractmethod
    def gqa(
        self,
        layer: int,
        q: Float[Tensor, "tokens heads head_dim"],
        k: Float[Tensor, "tokens kv_heads head_dim"],
        v: Float[Tensor, "tokens kv_heads head_dim"],
        scale: float,
        window: int | None,
    ) -> Float[Tensor, "tokens heads head_dim"]:
        """MHA, GQA or MQA with rotated queries and keys; a token sees its `window` latest keys
        (None: all).
        """

    @abstractmethod
    def attend(
        self,
        layer: int,
        q: Float[Tensor, "tokens heads head_dim"],
        rows: Float[Tensor, "tokens entry_dim"],
        layout: EntryLayout,
        scale: float,
    ) -> Float[Tensor, "tokens heads head_dim"]:
        """Any other attention (GTA, TPA): queries over rows of which `layout` makes keys and
        values. `rows` are the new tokens' own.
        """
