"""transformers' models, observed module by module; their attention through its own interface.

transformers is a peer to compare with, never needed otherwise: imported when a side asks for it.
"""

import logging
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowlat.compare.gate import factors
from lowlat.compare.lowlat_side import watch_join, widths_of
from lowlat.compare.observe import Observer, Widths, find
from lowlat.compare.side import REMEDY, Side, cannot_import, told
from lowlat.compare.trace import OUTPUT, Block, Choices, Trace, Window
from lowlat.config.model import ModelConfig
from lowlat.utils.device import name_of
from lowlat.utils.errors import UserError

ATTENTION = "lowlat_compare"
"""Name under which attention is observed."""
V2_IN_PLACE = "DeepseekV2"
"""Its rotation leaves pairs where they are; all others put real parts before imaginary ones."""


class TransformersSide(Side):
    """A causal language model of transformers in eager attention, and its MTP modules."""

    unseen = ""
    takes_choices = True

    def __init__(
        self, model: nn.Module, config: ModelConfig, *, label: str, mtp: Any | None = None
    ) -> None:
        self.model = model
        self.config = config
        self.label = label
        self.mtp = mtp
        self.dtype = next(model.parameters()).dtype
        self.precision = name_of(self.dtype)

    def trace(self, window: Window, choices: Choices | None = None) -> Trace:
        try:
            return self._trace(window, choices or {})
        # Whatever a peer raises is a fault of that side.
        except Exception as error:
            raise UserError(
                f"{self.label}: transformers fails while it runs: {told(error)}; {REMEDY}"
            ) from error

    @torch.no_grad()
    def _trace(self, window: Window, choices: Choices) -> Trace:
        trace = Trace(dtype=self.dtype)
        model: Any = self.model
        decoder = model.get_decoder()
        with Observer(trace) as observer:
            observer.embedding(model.get_input_embeddings())
            for number, layer in enumerate(decoder.layers):
                self._watch(observer, Block("layer", number), layer, choices)
            hidden = decoder(
                input_ids=window.ids[None], position_ids=window.positions[None], use_cache=False
            ).last_hidden_state
            trace.keep(OUTPUT, "norm", hidden[0])
            trace.keep(OUTPUT, "logits", model.lm_head(hidden)[0])
            if self.mtp is not None:
                self._run_mtp(observer, hidden, window, choices)
        return trace

    def _watch(self, observer: Observer, block: Block, layer: nn.Module, choices: Choices) -> None:
        widths = self._widths(block, layer)
        observer.layer(block, layer, widths)
        attention: Any = find(layer, observer.names.attention)
        attention.lowlat_observed = _Observed(observer, block, widths)
        gate = find(find(layer, observer.names.mlp), observer.names.gate)
        if gate is not None and self.config.moe is not None:
            self._watch_gate(observer, block, gate, choices.get(block))

    def _widths(self, block: Block, layer: nn.Module) -> Widths:
        own = widths_of(self.config, block)
        in_place = type(layer).__name__.startswith(V2_IN_PLACE)
        attention: Any = find(layer, "self_attn")
        # A converted model's latent is wider here than in lowlat's own form.
        latent = None if own.latent is None else attention.kv_lora_rank
        return Widths(
            heads=own.heads,
            dim=own.dim,
            rope=own.rope,
            latent=latent,
            interleave=in_place and own.interleave,
        )

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
                chosen, weights = imposed, factors(scores.gather(1, imposed), moe)
            observer.routed(
                block, gate=scores, chosen=chosen, weights=weights, experts=moe.n_routed_experts
            )
            observer.trace.note(block, "gate_weight", gate.weight)
            bias = getattr(gate, "e_score_correction_bias", None)
            if bias is not None:
                observer.trace.note(block, "gate_bias", bias)
            return (logits, weights, chosen) if imposed is not None else None

        observer.watch(gate, seen)

    def _run_mtp(
        self, observer: Observer, hidden: Tensor, window: Window, choices: Choices
    ) -> None:
        mtp, trace = self.mtp, observer.trace
        assert mtp is not None
        for depth, module in enumerate(mtp.layers):
            block, ahead = Block("mtp", depth), slice(depth + 1, None)
            if len(window.ids[ahead]) == 0:
                return
            watch_join(observer, block, module)
            self._watch(observer, block, module.mtp_block, choices)
            hidden = mtp.forward_layer(
                depth,
                hidden[:, :-1],
                window.positions[None, ahead],
                None,
                input_ids=window.ids[None, ahead],
            )
            trace.keep(block, "norm", hidden[0])
            trace.keep(block, "logits", mtp._project_to_logits(hidden)[0])


class _Observed:
    """Who watches an attention module: left on it for `_attention` to find."""

    def __init__(self, observer: Observer, block: Block, widths: Widths) -> None:
        self.observer, self.block, self.widths = observer, block, widths


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor | None]:
    """The eager attention of the module's own file, with what goes in and comes out recorded."""
    eager = sys.modules[type(module).__module__].eager_attention_forward
    out, weights = eager(module, query, key, value, mask, **options)
    watcher: _Observed = module.lowlat_observed
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    watcher.observer.attended(
        watcher.block,
        watcher.widths,
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
) -> TransformersSide:
    """The model at `path`. Raises UserError without transformers, or where it cannot load that."""
    try:
        import transformers
        from transformers import AttentionInterface, AutoModelForCausalLM
        from transformers.masking_utils import AttentionMaskInterface, eager_mask
        from transformers.modeling_layers import MtpModel
    except Exception as error:
        raise cannot_import("transformers", "transformers", error, label=label) from error
    AttentionInterface.register(ATTENTION, _attention)
    AttentionMaskInterface.register(ATTENTION, eager_mask)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=dtype,
            attn_implementation=ATTENTION,
            experts_implementation="eager",
            local_files_only=True,
            trust_remote_code=False,
        ).eval()
        mtp = None
        if config.num_nextn_predict_layers:
            # Its own list knows the layer numbers of the released model alone.
            last = range(config.num_hidden_layers, config.num_cache_layers)
            patterns = [rf"model\.layers\.{layer}\." for layer in last]
            model._keys_to_ignore_on_load_unexpected = patterns
            settings = model.config.get_text_config()
            if not hasattr(settings, "num_mtp_layers"):
                # Glm4MoeLiteConfig leaves out what its MTP modules ask for.
                settings.num_mtp_layers = config.num_nextn_predict_layers
                settings.mtp_mlp_layer_types = ["sparse"] * config.num_nextn_predict_layers
            mtp = MtpModel.from_pretrained(model).eval()
    # Whatever a peer raises about a checkpoint is a fault of that side.
    except Exception as error:
        raise UserError(f"{label}: transformers cannot load it: {told(error)}") from error
    return TransformersSide(model, config, label=label, mtp=mtp)
