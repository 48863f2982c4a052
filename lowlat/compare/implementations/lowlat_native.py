"""lowlat's native kernels: one call per step, observed by cache entries, hidden states, logits."""

from functools import cached_property

import torch
from torch import Tensor

from lowlat.attention.cache import PagedCache
from lowlat.attention.path import choose_path
from lowlat.compare.implementations.lowlat_pytorch import (
    LowlatModel,
    attention_shape,
    one_sequence,
)
from lowlat.compare.observe import canonical
from lowlat.compare.trace import NONE_IMPOSED, OUTPUT, Block, ImposedChoices, Trace, Window
from lowlat.config.model import GQAConfig
from lowlat.model.native import NativeModel


class LowlatNative(LowlatModel):
    """A Transformer on the native kernels, which must support it."""

    unseen = "a native step is one call: it shows KV cache entries, final hidden states and logits"
    can_impose_experts = can_impose_tokens = False

    @cached_property
    def _native(self) -> NativeModel:
        return NativeModel(self.model)

    @torch.inference_mode()
    def trace(self, window: Window, imposed: ImposedChoices = NONE_IMPOSED) -> Trace:
        assert imposed == NONE_IMPOSED, "choices cannot be imposed on a native step"
        trace = Trace(dtype=torch.bfloat16, cached=self.cache)
        length = len(window.ids)
        form = self.form or choose_path(self.config.attention, length)
        cache, batch = one_sequence(self.model, window, form, self.cache)
        hidden, logits = self._native.step(window.ids, batch, cache, list(range(length)))
        pages = batch.sequences[0].pages
        for layer in range(self.config.num_hidden_layers):
            self._record_entries(trace, layer, cache, pages, length)
        trace.record(OUTPUT, "norm", hidden)
        trace.record(OUTPUT, "logits", logits)
        return trace

    def _record_entries(
        self, trace: Trace, layer: int, cache: PagedCache, pages: tuple[int, ...], length: int
    ) -> None:
        """Record a layer's KV cache entries as parts."""
        block = Block("layer", layer)
        attention, widths = self.config.attention_of(layer), attention_shape(self.config, block)
        stored = cache.read(layer, pages, length, torch.float32)[:, : attention.entry_dim]

        def in_canonical_order(x: Tensor) -> Tensor:
            return canonical(x, widths.rope, widths.interleave)

        if widths.latent is not None:
            trace.record(block, "latent", stored[:, : widths.latent])
            trace.record(block, "k_rotated", in_canonical_order(stored[:, None, widths.latent :]))
        elif isinstance(attention, GQAConfig):
            groups = attention.num_key_value_heads
            k, v = stored.unflatten(1, (2, groups, -1)).unbind(1)
            trace.record(block, "k_rotated", in_canonical_order(k))
            trace.record(block, "v", v)
