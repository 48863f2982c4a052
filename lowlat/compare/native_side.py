"""lowlat's native kernels: one call per step, of which cached rows, final hidden states and logits
can be seen.
"""

import torch
from torch import Tensor

from lowlat.attention.cache import PagedCache
from lowlat.attention.path import AttentionPath, choose_path
from lowlat.compare.lowlat_side import one_sequence, widths_of
from lowlat.compare.observe import canonical
from lowlat.compare.side import Side
from lowlat.compare.trace import OUTPUT, Block, Choices, Trace, Window
from lowlat.config.model import GQAConfig
from lowlat.model.native import NativeModel, has_native_form
from lowlat.model.transformer import Transformer
from lowlat.utils.device import name_of
from lowlat.utils.errors import UserError


class NativeSide(Side):
    """The native form of a Transformer."""

    unseen = "a native step is one call: cached rows, final hidden states and logits are seen"
    takes_choices = False

    def __init__(
        self,
        model: Transformer,
        *,
        label: str,
        precision: str,
        form: AttentionPath | None = None,
        cache: torch.dtype | None = None,
    ) -> None:
        if not has_native_form(model):
            raise UserError(
                f"{label}: the native kernels are not built here or do not run this model in "
                f"{precision}; leave native out, or choose bf16, int8 or int4"
            )
        self.model = model
        self.label = label
        self.config = model.config
        self.precision = precision
        self.cache_precision = None if cache is None else name_of(cache)
        self.form: AttentionPath | None = form
        self.cache = cache
        self._native = NativeModel(model)

    @torch.inference_mode()
    def trace(self, window: Window, choices: Choices | None = None) -> Trace:
        assert not choices, "a native step takes no choices"
        trace = Trace(dtype=torch.bfloat16, cached=self.cache)
        length = len(window.ids)
        form = self.form or choose_path(self.config.attention, length)
        cache, batch = one_sequence(self.model, window, form, self.cache)
        hidden, logits = self._native.step(window.ids, batch, cache, list(range(length)))
        pages = batch.sequences[0].pages
        for layer in range(self.config.num_hidden_layers):
            self._keep_rows(trace, layer, cache, pages, length)
        trace.keep(OUTPUT, "norm", hidden)
        trace.keep(OUTPUT, "logits", logits)
        return trace

    def _keep_rows(
        self, trace: Trace, layer: int, cache: PagedCache, pages: tuple[int, ...], length: int
    ) -> None:
        """What a layer left in the cache, as parts."""
        block = Block("layer", layer)
        attention, widths = self.config.attention_of(layer), widths_of(self.config, block)
        stored = cache.rows(layer, pages, length, torch.float32)[:, : attention.entry_dim]

        def turned(x: Tensor) -> Tensor:
            return canonical(x, widths.rope, widths.interleave)

        if widths.latent is not None:
            trace.keep(block, "latent", stored[:, : widths.latent])
            trace.keep(block, "k_rotated", turned(stored[:, None, widths.latent :]))
        elif isinstance(attention, GQAConfig):
            groups = attention.num_key_value_heads
            k, v = stored.unflatten(1, (2, groups, -1)).unbind(1)
            trace.keep(block, "k_rotated", turned(k))
            trace.keep(block, "v", v)
