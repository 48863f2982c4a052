"""The native path of a model: its weights, where they lie, put together for one call per step.

Owns which models have a native path, and one step; layers are `native_layers`'s. Arithmetic is
csrc/'s; the modules beside this file say what it computes.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lowlat.attention.cache import PagedCache
from lowlat.attention.metadata import AttentionBatch
from lowlat.config.model import TPAConfig
from lowlat.model.block import DecoderLayer
from lowlat.model.linear import Linear
from lowlat.model.moe import Gate
from lowlat.model.mtp import MTPModule
from lowlat.model.native_layers import (
    join_of,
    layer_of,
    matrix_of,
    norm_of,
    projection_of,
    weight_of,
)
from lowlat.model.transformer import Transformer
from lowlat.ops import native
from lowlat.utils.memory import is_larger_than_memory

BLOCK = (128, 128)
"""Rows and columns of the fp8 blocks the kernels know."""


def has_native_form(model: Transformer) -> bool:
    """Whether the kernels are here and can run `model`: on the CPU, with bf16 activations, every
    projection bf16, int8, int4 or fp8 in blocks of 128 without a low-rank update, and any attention
    but TPA.
    """
    if isinstance(model.config.attention, TPAConfig):  # all layers then are
        return False
    embedding = model.embed_tokens.weight
    if embedding.device.type != "cpu" or embedding.dtype != torch.bfloat16:
        return False
    if not all(_is_known(module) for module in model.modules()):
        return False
    native.warn_if_absent()
    return native.available()


def weight_bytes(model: Transformer) -> int:
    """Bytes of all parameters, mapped or not."""
    return sum(parameter.nbytes for parameter in model.parameters())


def _is_known(module: torch.nn.Module) -> bool:
    if isinstance(module, Gate):
        return module.weight.dtype == torch.bfloat16
    if not isinstance(module, Linear):
        return True
    if module.low_rank is not None:
        return False
    if module.storage == "plain":
        return module.weight.dtype == torch.bfloat16
    return module.storage != "fp8" or module.block == BLOCK


class NativeModel:
    """Runs a Transformer that `has_native_form`, and its MTP modules."""

    def __init__(self, model: Transformer) -> None:
        self.config = model.config
        self.rotary = model.rotary
        module = native.module()
        embedding = model.embed_tokens.weight.detach()
        head = matrix_of(embedding) if model.lm_head is None else weight_of(model.lm_head)
        head = module.Projection.make(head, None)
        is_larger = is_larger_than_memory(weight_bytes(model))
        self._model = module.Model(
            embedding=embedding,
            join=None,
            layers=[
                layer_of(layer, first_pair=self.rotary.first_pair(number))
                for number, layer in enumerate(model.layers)
                if isinstance(layer, DecoderLayer)
            ],
            first_layer=0,
            norm=norm_of(model.norm),
            head=head,
            is_larger_than_memory=is_larger,
        )
        self._modules = []
        for number, mtp in enumerate(model.mtp, start=self.config.num_hidden_layers):
            assert isinstance(mtp, MTPModule)
            copy, own_head = mtp.embed_tokens, mtp.head
            self._modules.append(
                module.Model(
                    embedding=embedding if copy is None else copy.weight.detach(),
                    join=join_of(mtp),
                    layers=[layer_of(mtp.block, first_pair=self.rotary.first_pair(number))],
                    first_layer=number,
                    norm=norm_of(mtp.norm),
                    head=head if own_head is None else projection_of(own_head),
                    is_larger_than_memory=is_larger,
                )
            )
        self._cache: PagedCache | None = None
        self._rows = None

    def step(
        self,
        ids: Int[Tensor, "tokens"],
        batch: AttentionBatch,
        cache: PagedCache,
        wanted: list[int],
    ) -> tuple[Float[Tensor, "tokens hidden"], Float[Tensor, "wanted vocab"]]:
        """Cache the rows of new tokens; their hidden states after the final norm (bf16), and the
        logits (fp32) of the tokens numbered in `wanted`.

        A sequence gets the same bits in any company. Streams multiply otherwise, so that a step
        that mixes them with other forms is two calls, streams last.
        """
        return self._step(self._model, None, ids, batch, cache, wanted)

    def mtp(
        self,
        depth: int,
        hidden: Float[Tensor, "tokens hidden"],
        ahead_ids: Int[Tensor, "tokens"],
        batch: AttentionBatch,
        cache: PagedCache,
        wanted: list[int],
    ) -> tuple[Float[Tensor, "tokens hidden"], Float[Tensor, "wanted vocab"]]:
        """The same of MTP module `depth`, from `hidden` (bf16) of the depth before and the ids
        depth + 1 places after the batch's positions, as `Transformer.mtp_hidden` takes them.
        """
        return self._step(self._modules[depth], hidden, ahead_ids, batch, cache, wanted)

    def _step(
        self,
        model,
        previous: Tensor | None,
        ids: Tensor,
        batch: AttentionBatch,
        cache: PagedCache,
        wanted: list[int],
    ) -> tuple[Tensor, Tensor]:
        """Of all sequences: those of one kind at a time."""
        kinds = [item.path == "decode" for item in batch.sequences]
        if len(set(kinds)) == 1:
            return self._call(model, previous, ids, batch, cache, wanted)
        hidden = torch.empty(len(ids), self.config.hidden_size, dtype=torch.bfloat16)
        logits = torch.empty(len(wanted), self.config.vocab_size)
        for kind in (False, True):
            tokens, part = _part(batch, kinds, kind)
            index = list(tokens)
            chosen = [row for row, token in enumerate(wanted) if token in tokens]
            rows = [tokens[wanted[row]] for row in chosen]
            before = None if previous is None else previous[index]
            hidden[index], logits[chosen] = self._call(model, before, ids[index], part, cache, rows)
        return hidden, logits

    def _call(
        self,
        model,
        previous: Tensor | None,
        ids: Tensor,
        batch: AttentionBatch,
        cache: PagedCache,
        wanted: list[int],
    ) -> tuple[Tensor, Tensor]:
        """Of sequences of one kind."""
        hidden = torch.empty(len(ids), self.config.hidden_size, dtype=torch.bfloat16)
        logits = torch.empty(len(wanted), self.config.vocab_size)
        cos, sin = self.rotary(batch.positions)
        sequences = [
            (item.pages, item.start, item.length, item.path == "expanded")
            for item in batch.sequences
        ]
        model.step(
            ids=ids,
            previous=previous,
            slots=batch.slots,
            cos=cos,
            sin=sin,
            sequences=sequences,
            cache=self._rows_of(cache),
            hidden=hidden,
            wanted=wanted,
            logits=logits,
            is_stream=batch.sequences[0].path == "decode",
        )
        return hidden, logits

    def _rows_of(self, cache: PagedCache):
        """`cache` as the kernels take it; kept, as there is a new one only where it has grown."""
        if self._rows is None or self._cache is not cache:
            layers = zip(cache.layers, cache.entry_dims, cache.quantized, strict=True)
            self._rows = native.module().Cache.make(list(layers))
            self._cache = cache
        return self._rows


def _part(
    batch: AttentionBatch, kinds: list[bool], kind: bool
) -> tuple[dict[int, int], AttentionBatch]:
    """The sequences of one kind: where each of their tokens of the step is in the part, and the
    part.
    """
    tokens: dict[int, int] = {}
    first = 0
    for item, own in zip(batch.sequences, kinds, strict=True):
        if own == kind:
            tokens |= {first + i: len(tokens) + i for i in range(item.length)}
        first += item.length
    index = torch.tensor(list(tokens), dtype=torch.int64)
    sequences = tuple(item for item, own in zip(batch.sequences, kinds, strict=True) if own == kind)
    part = AttentionBatch(
        sequences=sequences, positions=batch.positions[index], slots=batch.slots[index]
    )
    return tokens, part
