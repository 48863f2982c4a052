"""Native model: the weights of a `Transformer`, referenced without copies, run by one call per
step.

The kernels (GEMM, paged attention with split-KV decoding, MoE) are in csrc/; `native_layers`
converts the layers.
"""

import ctypes
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import BFloat16, Float, Float32, Int, Int32
from torch import Tensor

from lowlat.attention.cache import PagedCache
from lowlat.attention.metadata import AttentionBatch
from lowlat.config.attention import ModelAttention, distinct, index_key_dim, sparse_topk
from lowlat.config.model import GLAConfig, MLAConfig, ModelConfig, TPAConfig
from lowlat.model.block import DecoderLayer
from lowlat.model.exchange import TENSOR
from lowlat.model.linear import Linear
from lowlat.model.lora import LoraLinear
from lowlat.model.moe import Gate, MoE
from lowlat.model.mtp import MTPModule
from lowlat.model.native_layers import (
    embedding_of,
    layer_of,
    moe_of,
    mtp_input_of,
    norm_of,
    projection_of,
    weight_of,
)
from lowlat.model.transformer import Transformer
from lowlat.ops import native
from lowlat.utils.memory import is_larger_than_memory

BLOCK = (128, 128)
"""Rows and columns of the fp8 blocks that the kernels support."""


def supports_native(model: Transformer) -> bool:
    """Whether the native kernels are available and can run `model`: on the CPU, bf16 activations,
    every projection bf16, int8, int4, in GGUF blocks or fp8 in blocks of 128, with or without
    updates of LoRA adapters, any attention but TPA, gated attention, MLRA with adapters, and sparse
    attention with an `indexer_obstacle`.
    """
    attention = model.config.attention
    if isinstance(attention, TPAConfig) or indexer_obstacle(attention) is not None:
        return False
    if any(
        isinstance(layer, MLAConfig) and layer.attn_output_gate for layer in distinct(attention)
    ):
        return False
    if isinstance(attention, GLAConfig) and attention.sum_groups and _has_adapters(model):
        return False
    embedding = model.embed_tokens
    if embedding.weight.device.type != "cpu" or embedding.dtype != torch.bfloat16:
        return False
    if not all(_is_known(module) for module in model.modules()):
        return False
    native.warn_if_absent()
    return native.available()


def indexer_obstacle(attention: ModelAttention) -> str | None:
    """Why the native kernels cannot run the sparse attention (DSA) of a model, by the config's
    field; None if they can, or if attention is dense.
    """
    layers = distinct(attention)
    odd = next((width for width in map(index_key_dim, layers) if width % 2), None)
    if odd is not None:
        return f"index_head_dim {odd} is odd"
    are_sparse = {sparse_topk(layer) is not None for layer in layers}
    return "attention.indexer is null in some layers" if len(are_sparse) > 1 else None


def weight_bytes(model: Transformer) -> int:
    """Bytes of all parameters, memory-mapped or not, and of the updates of LoRA adapters."""
    updates = sum(each.update_bytes for each in model.modules() if isinstance(each, LoraLinear))
    return updates + sum(parameter.nbytes for parameter in model.parameters())


def _has_adapters(model: Transformer) -> bool:
    return any(isinstance(module, LoraLinear) for module in model.modules())


def _is_known(module: torch.nn.Module) -> bool:
    if isinstance(module, Gate):
        return module.weight.dtype == torch.bfloat16
    if not isinstance(module, Linear):
        return True
    if type(module) not in (Linear, LoraLinear):  # a replacement of training
        return False
    if module.storage == "plain":
        return module.weight.dtype == torch.bfloat16
    return module.storage != "fp8" or module.block == BLOCK


class KeptActivations(NamedTuple):
    """Activations of a step that a backward pass needs, with the bits of the kernels."""

    residuals: BFloat16[Tensor, "parts tokens hidden"]
    """The residual stream before every attention and every MLP, in order, and after the last."""
    experts: Int32[Tensor, "layers tokens chosen"] | None
    """Chosen experts, best first; undefined in dense layers. None without experts."""
    gates: Float32[Tensor, "layers tokens chosen"] | None
    """Factors on their outputs."""

    @staticmethod
    def empty(config: ModelConfig, tokens: int) -> "KeptActivations":
        """Uninitialised buffers for a step of `tokens` tokens of a whole model."""
        layers = config.num_hidden_layers
        residuals = torch.empty(2 * layers + 1, tokens, config.hidden_size, dtype=torch.bfloat16)
        if config.moe is None:
            return KeptActivations(residuals, None, None)
        shape = (layers, tokens, config.moe.num_experts_per_tok)
        experts = torch.zeros(shape, dtype=torch.int32)
        return KeptActivations(residuals, experts, torch.zeros(shape))

    def put(self, index: Sequence[int] | Int[Tensor, " rows"], rows: "KeptActivations") -> None:
        """Write the activations `rows` of the tokens `index`."""
        for own, given in zip(self, rows, strict=True):
            if own is not None:
                assert given is not None
                own[:, index] = given


class NativeModel:
    """Runs a `Transformer` that `supports_native`, and its MTP modules."""

    def __init__(self, model: Transformer) -> None:
        self.config = model.config
        self.rotary = model.rotary
        module = native.module()
        self.share = share = model.share
        uses_embedding = share.uses_embedding(self.config, is_head=model.lm_head is None)
        embedding = embedding_of(model.embed_tokens) if uses_embedding else None
        head = None
        if share.is_last:
            head = embedding if model.lm_head is None else weight_of(model.lm_head)
            head = module.Projection.make(head, None, updates=[])
        is_larger = is_larger_than_memory(weight_bytes(model))
        parts = model.lm_head.parts if isinstance(model.lm_head, Linear) else 1
        experts = share.experts if self.config.moe is not None else 1
        division = (share.tensor, experts, share.expert_rank, parts)
        is_whole = share.tensor == experts == 1
        self._exchange = {} if is_whole else {"exchange": partial(_exchange, model)}
        self._model = module.Model(
            embedding=embedding if share.is_first else None,
            mtp_input=None,
            layers=[
                layer_of(layer, first_pair=self.rotary.first_pair(number))
                for number, layer in enumerate(model.layers)
                if isinstance(layer, DecoderLayer)
            ],
            first_layer=share.layers.start,
            norm=norm_of(model.norm) if share.is_last else None,
            head=head,
            is_larger_than_memory=is_larger,
            division=division,
            **_scales(self.config),
        )
        self._modules = []
        for number, mtp in enumerate(model.mtp, start=self.config.num_hidden_layers):
            assert isinstance(mtp, MTPModule)
            copy, own_head = mtp.embed_tokens, mtp.head
            self._modules.append(
                module.Model(
                    embedding=embedding if copy is None else embedding_of(copy),
                    mtp_input=mtp_input_of(mtp),
                    layers=[layer_of(mtp.block, first_pair=self.rotary.first_pair(number))],
                    first_layer=number,
                    norm=norm_of(mtp.norm),
                    head=head if own_head is None else projection_of(own_head),
                    is_larger_than_memory=is_larger,
                    division=division,
                )
            )
        self._cache: PagedCache | None = None
        self._entries = None

    def count_expert_loads(self) -> None:
        """Count the tokens of every routed expert from the next step on."""
        self._model.count_expert_loads()

    def expert_loads(self) -> dict[int, Sequence[int]]:
        """Tokens that every routed expert has had in all counted steps, by decoder layer. Divided
        layers count those of all processes."""
        counts = self._model.expert_loads()
        experts = 0 if self.config.moe is None else self.config.moe.n_routed_experts
        first = self.share.layers.start
        return {first + n: row[:experts] for n, row in enumerate(counts) if any(row)}

    def place_experts(self, layer: int, mlp: MoE) -> None:
        """Use the experts that the decoder layer `layer` has now, from the next step on."""
        self._model.place_experts(layer - self.share.layers.start, moe_of(mlp))

    def step(
        self,
        ids: Int[Tensor, "tokens"],
        batch: AttentionBatch,
        cache: PagedCache,
        wanted: list[int],
        *,
        depth: int | None = None,
        previous: Float[Tensor, "tokens hidden"] | None = None,
        kept: KeptActivations | None = None,
    ) -> tuple[Float[Tensor, "tokens hidden"], Float[Tensor, "wanted vocab"]]:
        """One step over new tokens, which writes their KV cache entries: hidden states after the
        final norm (bf16), and logits (fp32) of the tokens with the indices `wanted`.

        A pipeline stage after the first takes the residual stream of the stage before as
        `previous`; one before the last returns its own, and no logits.

        With `depth`, the step of an MTP module from the hidden states `previous` (bf16) of the
        previous depth and the ids depth + 1 places after the batch's positions, as in
        `Transformer.mtp_hidden`. kept: filled with the activations of the decoder layers.

        Results are batch-invariant. Sequences on the decode path (GEMV) use other arithmetic, so a
        step that mixes attention paths is two native calls, decode last.
        """
        model = self._model if depth is None else self._modules[depth]
        decodes = [item.path == "decode" for item in batch.sequences]
        if len(set(decodes)) == 1:
            return self._call(model, previous, ids, batch, cache, wanted, kept)
        hidden = torch.empty(len(ids), self.config.hidden_size, dtype=torch.bfloat16)
        logits = torch.empty(len(wanted), self.config.vocab_size)
        for is_decode in (False, True):
            tokens, part = _part(batch, decodes, is_decode)
            index = list(tokens)
            chosen = [row for row, token in enumerate(wanted) if token in tokens]
            rows = [tokens[wanted[row]] for row in chosen]
            before = None if previous is None else previous[index]
            own = None if kept is None else KeptActivations.empty(self.config, len(index))
            hidden[index], logits[chosen] = self._call(
                model, before, ids[index], part, cache, rows, own
            )
            if kept is not None and own is not None:
                kept.put(index, own)
        return hidden, logits

    def _call(
        self,
        model,
        previous: Tensor | None,
        ids: Tensor,
        batch: AttentionBatch,
        cache: PagedCache,
        wanted: list[int],
        kept: KeptActivations | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Sequences that are all on the decode path, or all off it."""
        hidden = torch.empty(len(ids), self.config.hidden_size, dtype=torch.bfloat16)
        logits = torch.empty(len(wanted), self.config.vocab_size)
        table = self.rotary(batch.positions)
        scaling = {} if table.query_scale is None else {"query_scale": table.query_scale}
        sequences = [
            (
                item.pages,
                item.start,
                item.length,
                item.path == "expanded",
                item.lora_int_id - 1,
            )
            for item in batch.sequences
        ]
        model.step(
            ids=ids,
            previous=previous,
            slots=batch.slots,
            cos=table.cos,
            sin=table.sin,
            sequences=sequences,
            cache=self._native_cache(cache),
            hidden=hidden,
            wanted=wanted,
            logits=logits if wanted else None,
            is_decode=batch.sequences[0].path == "decode",
            **scaling,
            **self._exchange,
            **({} if kept is None else kept._asdict()),
        )
        return hidden, logits

    def _native_cache(self, cache: PagedCache):
        """`cache` as a native struct, which is reused until the cache has grown."""
        if self._entries is None or self._cache is not cache:
            layers = zip(
                cache.layers,
                cache.entry_dims,
                cache.quantized,
                cache.index_keys,
                cache.index_dims,
                strict=True,
            )
            self._entries = native.module().Cache.make(list(layers))
            self._cache = cache
        return self._entries


def _exchange(model: Transformer, group: int, own: int, size: int, out: int) -> None:
    """Exchange of `size` bytes at address `own`; those of all processes go to address `out`."""
    share = model.share
    assert model.exchange is not None
    count = size * (share.tensor if group == TENSOR else share.experts)
    model.exchange.gather(group, _memory(own, size), _memory(out, count))


def _memory(address: int, size: int) -> Tensor:
    """Memory of the native module as bytes."""
    return torch.frombuffer((ctypes.c_uint8 * size).from_address(address), dtype=torch.uint8)


def _scales(config: ModelConfig) -> dict[str, float]:
    """The constant factors of the model that are not 1."""
    scales = {"embedding_scale": config.scale_emb, "residual_scale": config.residual_scale}
    return {name: scale for name, scale in scales.items() if scale != 1.0}


def _part(
    batch: AttentionBatch, decodes: list[bool], is_decode: bool
) -> tuple[dict[int, int], AttentionBatch]:
    """The sequences on the decode path, or those off it: a map from token indices in `batch` to
    token indices in the part, and the part.
    """
    tokens: dict[int, int] = {}
    first = 0
    for item, own in zip(batch.sequences, decodes, strict=True):
        if own == is_decode:
            tokens |= {first + i: len(tokens) + i for i in range(item.length)}
        first += item.length
    index = torch.tensor(list(tokens), dtype=torch.int64)
    sequences = tuple(
        item for item, own in zip(batch.sequences, decodes, strict=True) if own == is_decode
    )
    part = AttentionBatch(
        sequences=sequences, positions=batch.positions[index], slots=batch.slots[index]
    )
    return tokens, part
