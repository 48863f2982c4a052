"""KL losses of the indexers of sparse attention (DSA): their weight in a step, and their values and
recall by layer over the global batch.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from lowlat.model.transformer import Transformer
from lowlat.train.layers.sparse_mla import SparseTrainingMLA, sparse_layers
from lowlat.train.metrics.record import IndexerRecord
from lowlat.train.parallel.mesh import TOKEN_AXES, ProcessMesh
from lowlat.train.parallel.pipeline_gather import gather_along_pipeline


class IndexerLosses:
    """The indexers of the layers of `model` that this process has; None has none."""

    def __init__(
        self, model: Transformer | None = None, *, mesh: ProcessMesh | None = None
    ) -> None:
        self._mesh = mesh or ProcessMesh()
        self._is_sparse = model is not None and model.config.is_sparse
        layers = [] if model is None else sparse_layers(model)
        if not any(map(_is_trained, layers)):
            layers = []
        self._layers = {layer.layer: layer for layer in layers}
        self._queries = 0

    @contextmanager
    def observe(self, *, queries: int, coeff: float) -> Iterator[None]:
        """Train the indexers on a global batch of `queries` tokens, with the loss of a layer that
        chooses, its mean KL divergence, weighted by `coeff`; passes outside are not counted.
        """
        self._queries = queries
        for layer in self._layers.values():
            layer.statistics = torch.zeros_like(layer.statistics)
            layer.kl_weight = coeff / queries
        try:
            yield
        finally:
            for layer in self._layers.values():
                layer.kl_weight = None

    def records(self) -> tuple[IndexerRecord, ...]:
        """Losses and recall of every layer over the batch; collective."""
        if not self._is_sparse:
            return ()
        own = (
            (str(number), self._mesh.sum(layer.statistics, TOKEN_AXES))
            for number, layer in self._layers.items()
        )
        found = []
        for number, sums in gather_along_pipeline(self._mesh, own):
            kl, recall, queries = sums.tolist()
            found.append(
                IndexerRecord(
                    layer=int(number),
                    kl=kl / self._queries,
                    recall=recall / queries if queries else 1.0,
                )
            )
        return tuple(sorted(found, key=lambda record: record.layer))


def _is_trained(layer: SparseTrainingMLA) -> bool:
    """Whether the layer has an indexer that is not frozen (LoRA freezes all)."""
    return layer.indexer is not None and layer.indexer.wk.weight.requires_grad
