"""Layers of sparse models (DSA) in training: MLA with an indexer whose inputs are detached, and the
decoder layer of the indexer's warm-up.

As in DeepSeek-V3.2 (section 2.1.1) the indexer learns from its KL loss only, the rest of the model
from the language model's loss only. Layers that share a choice add their KL divergence to that of
the indexer that chose: its loss is the mean over the layers that it serves (IndexShare, arXiv
2603.12201).
"""

from collections import Counter
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from lowlat.attention.base import AttentionBackend
from lowlat.config.model import ModelConfig
from lowlat.model.block import DecoderLayer
from lowlat.model.mla import MLA
from lowlat.model.replace_modules import adopt, replace_modules
from lowlat.model.transformer import Transformer
from lowlat.ops.rope import RotaryTable
from lowlat.train.layers.indexed_attention import IndexedAttention, LayerAttention

DSAStage = Literal["warmup", "sparse"]
"""Stages of DeepSeek-V3.2: dense warm-up of the indexer, and sparse training."""


class SparseTrainingMLA(MLA):
    """MLA over the tokens that the indexer of layer `source` chooses; in the warm-up over all."""

    def __init__(self, mla: MLA, stage: DSAStage, *, source: int, served: int) -> None:
        """served: layers that attend to the choice of `source`."""
        adopt(self, mla)
        self._dense = type(mla).attend
        self.source = source
        self.served = served
        self.is_dense = stage == "warmup"
        self.kl_weight: float | None = None
        """Factor of the KL divergence in the loss; None: neither loss nor statistics."""
        self.statistics = torch.zeros(3, dtype=torch.float64)
        """Sums of `ops.indexer_loss.SparseOutput` over the queries so far."""

    def forward(
        self, x: Float[Tensor, "tokens hidden"], rope: RotaryTable, attention: AttentionBackend
    ) -> Float[Tensor, "tokens hidden"]:
        assert isinstance(attention, IndexedAttention)
        q_latent = self.query_latent(x)
        q_nope, q_rope = self.head_queries(q_latent, rope)
        entries = self.latent_entries(x, rope)
        if self.indexer is not None:
            given = x.detach()
            queries = self.indexer.queries(given, q_latent.detach(), rope)
            attention.set_index(self.layer, queries, self.indexer.keys(given, rope))
        weight = None if self.kl_weight is None else self.kl_weight / self.served
        own = LayerAttention(attention, self.source, is_dense=self.is_dense, kl_weight=weight)
        out = self._dense(self, q_nope, q_rope, entries, own)
        if weight is not None and torch._C._current_graph_task_id() == -1:
            # otherwise activation checkpointing recomputes a layer that was counted
            self.statistics += own.statistics
        return self.output(out.flatten(1), x)


class WarmUpDecoderLayer(DecoderLayer):
    """Decoder layer whose weights are frozen but for its indexer. Gradients pass along the residual
    stream only, to reach the indexers of all layers.
    """

    def __init__(self, layer: DecoderLayer) -> None:
        adopt(self, layer)

    def forward(
        self, x: Float[Tensor, "tokens hidden"], rope: RotaryTable, attention: AttentionBackend
    ) -> Float[Tensor, "tokens hidden"]:
        x = x + self.attend(x.detach(), rope, attention)
        return x + self.feed_forward(x.detach())


def use_sparse_training(model: Transformer, stage: DSAStage) -> None:
    """Replace the attention of a sparse `model` by one that trains its indexers; in the warm-up
    freeze all other parameters.
    """
    sources = choosing_layers(model.config)
    served = Counter(sources.values())

    def trained(_path: str, module: torch.nn.Module) -> torch.nn.Module | None:
        if isinstance(module, MLA) and module.layer in sources:
            source = sources[module.layer]
            return SparseTrainingMLA(module, stage, source=source, served=served[source])
        if isinstance(module, DecoderLayer) and stage == "warmup":
            return WarmUpDecoderLayer(module)
        return None

    replace_modules(model, trained)
    if stage == "warmup":
        model.requires_grad_(False)
        for layer in sparse_layers(model):
            if layer.indexer is not None:
                layer.indexer.requires_grad_(True)


def sparse_layers(model: Transformer) -> list[SparseTrainingMLA]:
    """The sparse attention of `model` in order of layers."""
    return [module for module in model.modules() if isinstance(module, SparseTrainingMLA)]


def choosing_layers(config: ModelConfig) -> dict[int, int]:
    """The layer whose indexer chooses the tokens of each sparse layer, MTP modules included."""
    sources = ((layer, config.choosing_layer(layer)) for layer in range(config.num_cache_layers))
    return {layer: source for layer, source in sources if source is not None}
