"""transformers' models, observed module by module and through their attention interface.

transformers is an optional peer, imported on use.
"""

import logging
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowlat.compare.diagnosis.gate_reference import routing_weights
from lowlat.compare.implementations.base import REMEDY, Implementation, import_error, one_line
from lowlat.compare.implementations.lowlat_pytorch import attention_shape, watch_join
from lowlat.compare.observe import AttentionShape, Observer, find
from lowlat.compare.trace import NONE_IMPOSED, OUTPUT, Block, ImposedChoices, Trace, Window
from lowlat.config.model import ModelConfig
from lowlat.peers.transformers_model import load_causal_lm
from lowlat.utils.device import dtype_name
from lowlat.utils.errors import UserError

ATTENTION = "lowlat_compare"
"""Name of the observed attention in transformers' attention interface."""
V2_IN_PLACE = "DeepseekV2"
"""Prefix of the classes whose RoPE keeps pairs in place; others put real before imaginary parts."""


class TransformersModel(Implementation):
    """A causal language model of transformers with eager attention, and its MTP modules."""

    unseen = ""
    can_impose_experts = can_impose_tokens = True

    def __init__(
        self, model: nn.Module, config: ModelConfig, *, label: str, mtp: Any | None = None
    ) -> None:
        self.model = model
        self.config = config
        self.label = label
        self.mtp = mtp
        self.dtype = next(model.parameters()).dtype
        self.precision = dtype_name(self.dtype)

    def trace(self, window: Window, imposed: ImposedChoices = NONE_IMPOSED) -> Trace:
        try:
            return self._trace(window, imposed)
        # Every exception of a peer is an error of that implementation.
        except Exception as error:
            raise UserError(
                f"{self.label}: transformers fails at run time: {one_line(error)}; {REMEDY}"
            ) from error

    @torch.no_grad()
    def _trace(self, window: Window, imposed: ImposedChoices) -> Trace:
        trace = Trace(dtype=self.dtype)
        model: Any = self.model
        decoder = model.get_decoder()
        with Observer(trace) as observer:
            observer.embedding(model.get_input_embeddings())
            for number, layer in enumerate(decoder.layers):
                self._watch(observer, Block("layer", number), layer, imposed)
            hidden = decoder(
                input_ids=window.ids[None], position_ids=window.positions[None], use_cache=False
            ).last_hidden_state
            trace.record(OUTPUT, "norm", hidden[0])
            trace.record(OUTPUT, "logits", model.lm_head(hidden)[0])
            if self.mtp is not None:
                self._run_mtp(observer, hidden, window, imposed)
        return trace

    def _watch(
        self, observer: Observer, block: Block, layer: nn.Module, imposed: ImposedChoices
    ) -> None:
        widths = self._widths(block, layer)
        observer.layer(block, layer, widths)
        attention: Any = find(layer, observer.names.attention)
        attention.lowlat_observed = partial(observer.attended, block, widths)
        attention.lowlat_chose = partial(observer.chose, block)
        attention.lowlat_imposed = imposed.tokens.get(block)
        gate = find(find(layer, observer.names.mlp), observer.names.gate)
        if gate is not None and self.config.moe is not None:
            self._watch_gate(observer, block, gate, imposed.experts.get(block))

    def _widths(self, block: Block, layer: nn.Module) -> AttentionShape:
        own = attention_shape(self.config, block)
        in_place = type(layer).__name__.startswith(V2_IN_PLACE)
        attention: Any = find(layer, "self_attn")
        # A converted model's latent is wider here than in lowlat.
        latent = None if own.latent is None else attention.kv_lora_rank
        return replace(own, latent=latent, interleave=in_place and own.interleave)

    def _watch_gate(
        self, observer: Observer, block: Block, gate: Any, imposed: Tensor | None
    ) -> None:
        moe = self.config.moe
        assert moe is not None

        def seen(_: Any, out: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, ...] | None:
            logits, weights, chosen = out
            wide = logits.float()
            scores = wide.sigmoid() if moe.scoring_func == "sigmoid" else wide.softmax(dim=-1)
            if imposed is not None:
                chosen, weights = imposed, routing_weights(scores.gather(1, imposed), moe)
            observer.routed(
                block,
                scores=scores,
                chosen=chosen,
                weights=weights,
                gate_weight=gate.weight,
                gate_bias=getattr(gate, "e_score_correction_bias", None),
            )
            return (logits, weights, chosen) if imposed is not None else None

        observer.watch(gate, seen)

    def _run_mtp(
        self, observer: Observer, hidden: Tensor, window: Window, imposed: ImposedChoices
    ) -> None:
        mtp, trace = self.mtp, observer.trace
        assert mtp is not None
        for depth, module in enumerate(mtp.layers):
            block, ahead = Block("mtp", depth), slice(depth + 1, None)
            if len(window.ids[ahead]) == 0:
                return
            watch_join(observer, block, module)
            self._watch(observer, block, module.mtp_block, imposed)
            hidden = mtp.forward_layer(
                depth,
                hidden[:, :-1],
                window.positions[None, ahead],
                None,
                input_ids=window.ids[None, ahead],
            )
            trace.record(block, "norm", hidden[0])
            trace.record(block, "logits", mtp._project_to_logits(hidden)[0])


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor | None]:
    """The eager attention of the module's own file, with inputs and outputs recorded; that of
    sparse attention (DSA) masks the tokens that are not among the chosen `indices`.
    """
    eager = sys.modules[type(module).__module__].eager_attention_forward
    chosen = options.pop("indices", None)
    if chosen is not None:
        assert mask is not None
        picked = torch.zeros(mask.shape[-2:], dtype=torch.bool).scatter_(1, chosen[0].long(), True)
        module.lowlat_chose(picked.tril(), None)
        picked = picked if module.lowlat_imposed is None else module.lowlat_imposed
        mask = mask.masked_fill(~picked, torch.finfo(mask.dtype).min)
    out, weights = eager(module, query, key, value, mask, **options)
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    module.lowlat_observed(
        q=q,
        k=k,
        v=v,
        heads=out[0],
        scale=float(options["scaling"]),
        window=options.get("sliding_window"),
    )
    return out, weights


def load_transformers(
    path: Path, config: ModelConfig, *, label: str, dtype: torch.dtype
) -> TransformersModel:
    """The model at `path`, with sparse attention (DSA) without its MTP modules, which transformers
    leaves out. Raises UserError if transformers is missing or cannot load it.
    """
    try:
        from transformers import AttentionInterface
        from transformers.masking_utils import AttentionMaskInterface, eager_mask
        from transformers.modeling_layers import MtpModel
    except Exception as error:
        raise import_error("transformers", "transformers", error, label=label) from error
    AttentionInterface.register(ATTENTION, _attention)
    AttentionMaskInterface.register(ATTENTION, eager_mask)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    try:
        model = load_causal_lm(str(path), dtype, attn_implementation=ATTENTION)
        mtp = None
        if config.num_nextn_predict_layers and not config.is_sparse:
            # transformers' own list has only the layer numbers of the released model.
            last = range(config.num_hidden_layers, config.num_cache_layers)
            patterns = [rf"model\.layers\.{layer}\." for layer in last]
            model._keys_to_ignore_on_load_unexpected = patterns
            settings = model.config.get_text_config()
            if not hasattr(settings, "num_mtp_layers"):
                # Glm4MoeLiteConfig lacks fields that its MTP modules read.
                settings.num_mtp_layers = config.num_nextn_predict_layers
                settings.mtp_mlp_layer_types = ["sparse"] * config.num_nextn_predict_layers
            mtp = MtpModel.from_pretrained(model).eval()
    # Every exception of a peer is an error of that implementation.
    except Exception as error:
        raise UserError(f"{label}: transformers cannot load it: {one_line(error)}") from error
    return TransformersModel(model, config, label=label, mtp=mtp)
