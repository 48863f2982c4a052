"""The model: embedding, decoder layers, final norm, LM head, MTP modules."""

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from lowlat.attention.base import AttentionBackend
from lowlat.config.model import AttentionConfig, MLAConfig, ModelConfig
from lowlat.model.block import DecoderLayer
from lowlat.model.division import divide_layer, divide_rows, part_of
from lowlat.model.exchange import Exchange
from lowlat.model.linear import Embedding, Linear, RMSNorm
from lowlat.model.mla import MLA
from lowlat.model.moe import Experts
from lowlat.model.mtp import MTPModule
from lowlat.model.quant import store_configured
from lowlat.model.rotary import RotaryEmbeddings
from lowlat.model.share import ModelShare, RemoteModule


class Transformer(nn.Module):
    """Decoder-only transformer over packed tokens: sequences are concatenated, `attention` holds
    their boundaries. With tie_word_embeddings (weight tying) the embedding is the LM head, too.

    Parameters are unfilled (and, under `torch.device("meta")`, unallocated): `checkpoint.load` or
    `model.init` fills them. Plain parameters have `dtype`; with config.quantization the projections
    are fp8 blocks, with config.packing int8 or int4.
    """

    def __init__(self, config: ModelConfig, *, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.config = self.stored_config = config
        self.share = ModelShare.whole(config)
        """What this process has of the model; the other modules are `RemoteModule`s."""
        self.exchange: Exchange | None = None
        self.weight_files: tuple[str, ...] = ()
        """Name, bytes and modification time (ns) of each file that the weights are read from."""
        self.rotary = RotaryEmbeddings(config)
        self.embed_tokens = Embedding(
            config.vocab_size, config.hidden_size, dtype=dtype, factor=config.scale_emb
        )
        self.layers = nn.ModuleList(
            DecoderLayer(config, layer, dtype=dtype) for layer in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(
            config.hidden_size, config.rms_norm_eps, dtype=dtype, factor=config.output_scale
        )
        tied = config.tie_word_embeddings
        self.lm_head = None if tied else Linear(config.hidden_size, config.vocab_size, dtype=dtype)
        self.mtp = nn.ModuleList(
            MTPModule(config, depth, dtype=dtype)
            for depth in range(config.num_nextn_predict_layers)
        )
        if config.packing is not None:
            self.add_head()
        store_configured(self, config)

    def set_context(self, context: int) -> None:
        """Serve sequences of up to `context` tokens: longrope's factors follow from it, and sparse
        attention (DSA) is dense, without indexer and index keys, if no context exceeds its top-k.

        Call it before the model runs: KV cache entries stay as they were made.
        """
        self.config = self.stored_config.for_context(context)
        self.rotary = RotaryEmbeddings(self.config, context)
        for module in self.modules():
            attention = self.config.attention_of(module.layer) if isinstance(module, MLA) else None
            if isinstance(module, MLA) and isinstance(attention, MLAConfig):
                dims = part_of(attention, self.share)
                assert isinstance(dims, MLAConfig)
                module.dims = dims

    def add_head(self) -> None:
        """Add an unfilled head to a model with tied embeddings, so that it can be quantized."""
        if self.lm_head is None:
            weight = self.embed_tokens.weight
            rows, columns = weight.shape
            with weight.device:
                self.lm_head = Linear(columns, rows, dtype=weight.dtype)

    def keep_share(self, share: ModelShare) -> None:
        """Remove all modules that `share` does not need; names of parameters do not change. The
        embedding keeps its dtype and loses its rows.
        """
        uses_embedding = share.uses_embedding(self.config, is_head=self.lm_head is None)
        self.share = share
        for layer in range(len(self.layers)):
            if layer not in share.layers:
                self.layers[layer] = RemoteModule()
            elif share.is_divided:
                divide_layer(self._decoder_layer(self.layers[layer]), share)
        if not share.is_last:
            self.add_module("norm", RemoteModule())
            if self.lm_head is not None:
                self.add_module("lm_head", RemoteModule())
            self.mtp = nn.ModuleList()
        elif share.is_divided:
            self._divide_heads(share)
        if not uses_embedding:
            weight = self.embed_tokens.weight
            self.embed_tokens.weight = nn.Parameter(weight[:0].detach(), requires_grad=False)

    def _divide_heads(self, share: ModelShare) -> None:
        """Divide the LM head, unless it is the embedding, and the MTP modules."""
        divides_head = self.config.vocab_size % share.tensor == 0
        heads = [self.lm_head]
        for module in self.mtp:
            assert isinstance(module, MTPModule)
            divide_layer(module.block, share)
            heads.append(module.head if self.lm_head is not None else None)
        for head in heads:
            if head is not None and divides_head:
                divide_rows(head, share)

    def cached_attentions(self) -> list[AttentionConfig | None]:
        """The part of every layer's attention that this process caches; None: nothing."""
        own = self.share.cache_layers(self.config)
        return [
            part_of(self.config.attention_of(layer), self.share) if layer in own else None
            for layer in range(self.config.num_cache_layers)
        ]

    def rows_of(self, name: str, stored: Shaped[Tensor, "..."]) -> Shaped[Tensor, "..."]:
        """This process's rows of the checkpoint's parameter `name`."""
        path, _, own = name.rpartition(".")
        module = self.get_submodule(path)
        return module.rows_of(own, stored) if isinstance(module, Linear) else stored

    def use_exchange(self, exchange: Exchange) -> None:
        """Gather the parts of a divided model by `exchange`."""
        self.exchange = exchange
        for module in self.modules():
            if isinstance(module, Experts):
                module.exchange = exchange

    @staticmethod
    def _decoder_layer(module: nn.Module) -> DecoderLayer:
        assert isinstance(module, DecoderLayer)
        return module

    def forward(
        self,
        ids: Int[Tensor, "tokens"],
        positions: Int[Tensor, "tokens"],
        attention: AttentionBackend,
        *,
        dtype: torch.dtype | None = None,
        previous: Float[Tensor, "tokens hidden"] | None = None,
    ) -> Float[Tensor, "tokens hidden"]:
        """Hidden states after the final norm: input of `logits` and of the first MTP module.

        Activations have `dtype` (by default the embedding's), and weights are cast to it when they
        are used: mixed precision with fp32 master weights. A pipeline stage after the first takes
        the residual stream of the stage before as `previous`; one before the last returns its own.
        """
        x = self.embed_tokens(ids) if previous is None else previous
        x = x if dtype is None else x.to(dtype)
        tables = self.rotary(positions)
        for number in self.share.layers:
            x = self.layers[number](x, self.rotary.of(number, tables), attention)
        return self.norm(x) if self.share.is_last else x

    def logits(self, hidden: Float[Tensor, "tokens hidden"]) -> Float[Tensor, "tokens vocab"]:
        """Logits of the next token, at least fp32."""
        return self._head(hidden, self.lm_head)

    def mtp_hidden(
        self,
        depth: int,
        hidden: Float[Tensor, "tokens hidden"],
        ahead_ids: Int[Tensor, "tokens"],
        positions: Int[Tensor, "tokens"],
        attention: AttentionBackend,
    ) -> Float[Tensor, "tokens hidden"]:
        """Hidden states of MTP module `depth` (from 0).

        `hidden` comes from the previous depth (from `forward` for depth 0); ahead_ids[i] is the
        token depth + 1 places after the one at positions[i]. Row i predicts the token depth + 2
        places after it.
        """
        module = self._mtp_module(depth)
        embedding = self.embed_tokens if module.embed_tokens is None else module.embed_tokens
        embedded = embedding(ahead_ids).to(hidden.dtype)
        rope = self.rotary.of(self.config.num_hidden_layers + depth, self.rotary(positions))
        return module(hidden, embedded, rope, attention)

    def mtp_logits(
        self, depth: int, hidden: Float[Tensor, "tokens hidden"]
    ) -> Float[Tensor, "tokens vocab"]:
        """Logits of the token depth + 2 places ahead, from `mtp_hidden`."""
        module = self._mtp_module(depth)
        return self._head(hidden, self.lm_head if module.head is None else module.head)

    def head_weight(self, depth: int) -> Float[Tensor, "vocab hidden"]:
        """The LM head of the main model (depth 0) or of MTP module depth - 1, as stored."""
        own = self._mtp_module(depth - 1).head if depth else None
        head = self.lm_head if own is None else own
        return self.embed_tokens.weight if head is None else head.weight

    def _mtp_module(self, depth: int) -> MTPModule:
        module = self.mtp[depth]
        assert isinstance(module, MTPModule)
        return module

    def _head(self, hidden: Tensor, head: Linear | None) -> Tensor:
        if head is None:
            scores = hidden @ self.embed_tokens.dense_weight(hidden.dtype).T
        else:
            scores = head(hidden)
        return scores.to(torch.promote_types(scores.dtype, torch.float32))
