"""Multi-Token Prediction (MTP, DeepSeek-V3 section 2.2): a decoder layer that predicts one token
further ahead.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lowlat.attention.base import AttentionBackend
from lowlat.config.model import ModelConfig
from lowlat.model.block import DecoderLayer
from lowlat.model.linear import Embedding, Linear, RMSNorm
from lowlat.ops.rope import RotaryTable


class MTPModule(nn.Module):
    """MTP module of depth k: combines the hidden state of depth k - 1 with the embedding of the
    token k places ahead.

    In released weights eh_proj takes the embedding first (equation 21 has the other order) and the
    hidden state after the final norm of the previous depth; evidence in docs/numerics.md.
    """

    def __init__(self, config: ModelConfig, depth: int, *, dtype: torch.dtype) -> None:
        super().__init__()
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.enorm = RMSNorm(hidden, eps, dtype=dtype)
        self.hnorm = RMSNorm(hidden, eps, dtype=dtype)
        self.eh_proj = Linear(2 * hidden, hidden, dtype=dtype)
        self.block = DecoderLayer(config, config.num_hidden_layers + depth, dtype=dtype)
        self.norm = RMSNorm(hidden, eps, dtype=dtype)
        # Checkpoints may contain copies of the main model's embedding and head; then they are used.
        copies = config.mtp_copies
        self.embed_tokens = Embedding(config.vocab_size, hidden, dtype=dtype) if copies else None
        self.head = Linear(hidden, config.vocab_size, dtype=dtype) if copies else None

    def forward(
        self,
        hidden: Float[Tensor, "tokens hidden"],
        embedded: Float[Tensor, "tokens hidden"],
        rope: RotaryTable,
        attention: AttentionBackend,
    ) -> Float[Tensor, "tokens hidden"]:
        """The normalised hidden state of this depth: input of the head and of the next depth."""
        joined = torch.cat([self.enorm(embedded), self.hnorm(hidden)], dim=-1)
        return self.norm(self.block(self.eh_proj(joined), rope, attention))
