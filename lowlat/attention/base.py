"""Attention backend interface: layers see neither KV cache pages nor other sequences."""

from abc import ABC, abstractmethod

from jaxtyping import Float
from torch import Tensor

from lowlat.ops.layout import EntryLayout
from lowlat.ops.sparse_attention import IndexQueries


class AttentionBackend(ABC):
    """Causal attention for all tokens of one step; made per step, called once per layer.

    The tokens of several sequences are concatenated; a token attends to its own sequence up to its
    own position.
    """

    @abstractmethod
    def mla(
        self,
        layer: int,
        q_nope: Float[Tensor, "tokens heads nope_dim"],
        q_rope: Float[Tensor, "tokens heads rope_dim"],
        entries: Float[Tensor, "tokens entry_dim"],
        w_uk: Float[Tensor, "heads nope_dim latent"],
        w_uv: Float[Tensor, "heads v_dim latent"],
        scale: float,
    ) -> Float[Tensor, "tokens heads v_dim"]:
        """Multi-head Latent Attention (DeepSeek-V2 section 2.1). entries: [c_t ; k_R] of the new
        tokens, normalised and rotated. w_uk, w_uv: the up-projections of keys and values.
        """

    @abstractmethod
    def sparse_mla(
        self,
        layer: int,
        q_nope: Float[Tensor, "tokens heads nope_dim"],
        q_rope: Float[Tensor, "tokens heads rope_dim"],
        entries: Float[Tensor, "tokens entry_dim"],
        w_uk: Float[Tensor, "heads nope_dim latent"],
        w_uv: Float[Tensor, "heads v_dim latent"],
        scale: float,
        index: IndexQueries | None,
    ) -> Float[Tensor, "tokens heads v_dim"]:
        """As `mla`, each query over the tokens that its index scores choose (DSA). entries:
        [k_I ; c_t ; k_R]. index None: entries have no k_I, and queries attend to the tokens chosen
        in the last layer that had one.
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
        """MHA, GQA or MQA with rotated queries and keys; a token attends to its `window` latest
        keys (None: all).
        """

    @abstractmethod
    def attend(
        self,
        layer: int,
        q: Float[Tensor, "tokens heads head_dim"],
        entries: Float[Tensor, "tokens entry_dim"],
        layout: EntryLayout,
        scale: float,
    ) -> Float[Tensor, "tokens heads head_dim"]:
        """Any other attention (GTA, TPA): `layout` makes keys and values of KV cache entries.
        entries: those of the new tokens.
        """
