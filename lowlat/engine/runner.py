"""Model runner: chunks of token ids in, logits and hidden states out.

Owns the model, the paged KV cache and its page allocator. Knows nothing of requests, sampling or
text. The cache starts small and at least doubles when its pages run out: memory follows use.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from lowlat.attention.cache import PAGE_SIZE, PagedCache
from lowlat.attention.cached import CachedAttention
from lowlat.attention.metadata import AttentionBatch, SequenceSlice
from lowlat.engine.page_allocator import PageAllocator
from lowlat.engine.request import Chunk
from lowlat.model.lora import SelectedAdapter
from lowlat.model.native import NativeModel, supports_native
from lowlat.model.transformer import Transformer
from lowlat.utils.errors import UserError

INITIAL_PAGES = 16


class ModelRunner:
    """One model and one KV cache. The caller owns the page lists and calls `reserve` before `run`.

    cache_dtype: dtype of the cache, also torch.int8; None: that of the activations. The cache
    starts with `num_pages` pages and grows to at most `max_pages`; pages that are never used take
    no memory.
    """

    def __init__(
        self,
        model: Transformer,
        *,
        page_size: int = PAGE_SIZE,
        cache_dtype: torch.dtype | None = None,
        num_pages: int = INITIAL_PAGES,
        max_pages: int | None = None,
        selected_adapter: SelectedAdapter | None = None,
    ) -> None:
        self._max_pages = max_pages
        self.model = model
        self._selected_adapter = selected_adapter or SelectedAdapter()
        self._native = NativeModel(model) if supports_native(model) else None
        self.allocator = PageAllocator(num_pages)
        self.device = model.embed_tokens.weight.device
        self.cache = PagedCache(
            model.config,
            num_pages=num_pages,
            page_size=page_size,
            dtype=cache_dtype or model.embed_tokens.dtype,
            device=self.device,
            attentions=model.cached_attentions(),
        )

    def end(self) -> None:
        """End the processes that compute parts of the model; the runner cannot be used then."""

    @property
    def page_bytes(self) -> int:
        """Bytes of a KV cache page in all layers of the model."""
        return self.cache.page_bytes

    def weights_digest(self, own: str) -> str:
        """Digest of all weights, given that of this process's share."""
        return own

    @property
    def is_batch_invariant(self) -> bool:
        """Whether results are bit-equal for any batch composition: true on native kernels. Rounding
        of PyTorch's matrix products depends on their shape."""
        return self._native is not None

    @property
    def balances_experts(self) -> bool:
        """Whether EPLB places the experts by their loads."""
        return False

    def refresh_weights(self) -> None:
        """Take over weights that were changed in place: the kernels have copies of norms and
        biases. KV cache entries are those of the weights before."""
        if self._native is not None:
            self._native = NativeModel(self.model)

    def count_expert_loads(self) -> None:
        """Count the tokens of every routed expert in native kernels from the next step on."""
        if self._native is not None:
            self._native.count_expert_loads()

    def expert_loads(self) -> dict[int, Sequence[int]]:
        """Tokens that every routed expert has had in all counted steps, by decoder layer."""
        return {} if self._native is None else self._native.expert_loads()

    def reserve(self, pages: list[int], num_tokens: int) -> None:
        """Extend `pages` in place until they cover `num_tokens` entries; the allocator may
        grow.

        Raises UserError if that exceeds `max_pages`.
        """
        size = self.cache.page_size
        missing = -(-num_tokens // size) - len(pages)
        if not self.allocator.make_available(missing, self._max_pages):
            total, used = size * self.allocator.num_pages, size * self.allocator.num_used
            raise UserError(
                f"{num_tokens} tokens do not fit into the cache of {total}, of which {used} are in "
                "use by running completions; end these first, or raise max_cache_bytes"
            )
        if missing > 0:
            pages += self.allocator.allocate(missing)
        self._fit_cache()

    @torch.inference_mode()
    def copy_page(self, source: int, destination: int) -> None:
        """Copy the entries of a page to another, in every layer."""
        self._fit_cache()
        self.cache.copy_page(source, destination)

    @torch.inference_mode()
    def export_page(self, page: int, out: UInt8[Tensor, " page_bytes"]) -> None:
        """Copy a page's entries in all layers to `out` in CPU memory."""
        self._fit_cache()
        self.cache.export_page(page, out)

    @torch.inference_mode()
    def import_page(self, page: int, stored: UInt8[Tensor, " page_bytes"]) -> None:
        """Fill a page with what `export_page` wrote."""
        self._fit_cache()
        self.cache.import_page(page, stored)

    def release(self, pages: list[int]) -> None:
        """Release `pages` and empty the list."""
        self.allocator.release(pages)
        pages.clear()

    def free(self) -> None:
        """Free the memory of weights and cache; the runner cannot be used afterwards.

        One tensor at a time, so that other threads run in between: unmapping one takes milliseconds
        under the interpreter's lock.
        """
        self._native = None
        for tensors in (self.cache.layers, self.cache.index_keys):
            while tensors:
                tensors.pop()
        for module in self.model.modules():
            for name, _ in [*module.named_parameters(recurse=False)]:
                setattr(module, name, None)

    def run(self, chunks: Sequence[Chunk]) -> Float[Tensor, "rows vocab"]:
        """Compute the chunks and cache their entries; returns the logits of `step`."""
        return self.step(chunks)[0]

    @torch.inference_mode()
    def step(
        self, chunks: Sequence[Chunk]
    ) -> tuple[Float[Tensor, "rows vocab"], Float[Tensor, "tokens hidden"]]:
        """Compute the chunks and cache their entries; returns the logits of each chunk's last
        num_logits tokens, in order, at least fp32, and the final hidden state of every token."""
        return self._compute(chunks)

    def _compute(
        self, chunks: Sequence[Chunk], previous: Float[Tensor, "tokens hidden"] | None = None
    ) -> tuple[Float[Tensor, "rows vocab"], Float[Tensor, "tokens hidden"]]:
        """`step` over the layers of this process. A pipeline stage after the first takes the
        residual stream of the stage before as `previous`; one before the last returns its own, and
        no logits.

        PyTorch computes the chunks of each LoRA adapter by themselves; the kernels all at once."""
        if self._native is None and len({chunk.lora_int_id for chunk in chunks}) > 1:
            return self._compute_by_adapter(chunks, previous)
        is_last = self.model.share.is_last
        wanted = _wanted(chunks) if is_last else []
        batch = self._batch(chunks)
        ids = self._ids([token for chunk in chunks for token in chunk.tokens])
        if self._native is not None:
            hidden, logits = self._native.step(ids, batch, self.cache, wanted, previous=previous)
            return logits, hidden
        self._selected_adapter.lora_int_id = chunks[0].lora_int_id
        attention = CachedAttention(self.cache, batch)
        hidden = self.model(ids, batch.positions, attention, previous=previous)
        if not is_last:
            return hidden.new_empty(0, self.model.config.vocab_size), hidden
        chosen = hidden
        if len(wanted) < len(ids):
            chosen = hidden[torch.tensor(wanted, dtype=torch.int64, device=self.device)]
        return self.model.logits(chosen), hidden

    def _compute_by_adapter(
        self, chunks: Sequence[Chunk], previous: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """A step for the chunks of each adapter; results in the order of `chunks`."""
        logits: dict[int, Tensor] = {}
        hidden: dict[int, Tensor] = {}
        lengths = [len(chunk.tokens) for chunk in chunks]
        before = None if previous is None else previous.split(lengths)
        for number in {chunk.lora_int_id for chunk in chunks}:
            places = [i for i, chunk in enumerate(chunks) if chunk.lora_int_id == number]
            own = [chunks[i] for i in places]
            given = None if before is None else torch.cat([before[i] for i in places])
            own_logits, own_hidden = self._compute(own, given)
            counts = [chunk.num_logits if self.model.share.is_last else 0 for chunk in own]
            states = own_hidden.split([lengths[i] for i in places])
            logits.update(zip(places, own_logits.split(counts), strict=True))
            hidden.update(zip(places, states, strict=True))
        order = range(len(chunks))
        return torch.cat([logits[i] for i in order]), torch.cat([hidden[i] for i in order])

    @torch.inference_mode()
    def mtp(
        self, depth: int, hidden: Float[Tensor, "tokens hidden"], chunks: Sequence[Chunk]
    ) -> tuple[Float[Tensor, "tokens hidden"], Float[Tensor, "rows vocab"]]:
        """Run MTP module `depth` over `chunks`, whose tokens are those depth + 1 places after the
        positions they start at, and cache its entries.

        hidden: output of depth - 1 (of `step` for depth 0). Returns the module's hidden states and
        logits as `step` does.
        """
        batch = self._batch(chunks)
        ids = self._ids([token for chunk in chunks for token in chunk.tokens])
        wanted = _wanted(chunks)
        if self._native is not None:
            return self._native.step(ids, batch, self.cache, wanted, depth=depth, previous=hidden)
        attention = CachedAttention(self.cache, batch)
        hidden = self.model.mtp_hidden(depth, hidden, ids, batch.positions, attention)
        return hidden, self.model.mtp_logits(depth, hidden[wanted])

    def _fit_cache(self) -> None:
        """Grow the cache to the pages of the allocator."""
        old = self.cache
        if old.num_pages == self.allocator.num_pages:
            return
        self.cache = PagedCache(
            self.model.config,
            num_pages=self.allocator.num_pages,
            page_size=old.page_size,
            dtype=old.dtype,
            device=self.device,
            attentions=self.model.cached_attentions(),
        )
        self.cache.copy_from(old)

    def _batch(self, chunks: Sequence[Chunk]) -> AttentionBatch:
        self._fit_cache()
        slices = [
            SequenceSlice(
                pages=chunk.pages,
                start=chunk.start,
                length=len(chunk.tokens),
                path=chunk.path,
                lora_int_id=chunk.lora_int_id,
            )
            for chunk in chunks
        ]
        return AttentionBatch.build(slices, page_size=self.cache.page_size, device=self.device)

    def _ids(self, ids: Sequence[int]) -> Int[Tensor, " tokens"]:
        return torch.tensor(ids, dtype=torch.int64, device=self.device)


def _wanted(chunks: Sequence[Chunk]) -> list[int]:
    """Indices of the tokens of a step whose logits are needed."""
    wanted: list[int] = []
    end = 0
    for chunk in chunks:
        end += len(chunk.tokens)
        wanted.extend(range(end - chunk.num_logits, end))
    return wanted
