"""Worker: run the user's copy of DeepSeek's inference/model.py on the CPU and record a trace."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from lowlat.checkpoint.dequantized_source import dequantized_source
from lowlat.checkpoint.hf_folder import open_checkpoint
from lowlat.checkpoint.load import read_config
from lowlat.compare.diagnosis.gate_reference import gate_scores, routing_weights
from lowlat.compare.implementations.lowlat_pytorch import attention_shape
from lowlat.compare.observe import ModuleNames, Observer
from lowlat.compare.trace import OUTPUT, Block, Trace, Window, save_trace
from lowlat.config.model import ModelConfig
from lowlat.peers.deepseek_model import build, import_script, load_weights
from lowlat.peers.protocol import serve_requests
from lowlat.utils.device import parse_dtype

OFFICIAL = ModuleNames(
    input_norm="attn_norm",
    attention="attn",
    post_norm="ffn_norm",
    mlp="ffn",
    queries=("wq_b", "wq"),
    keys=(),
    latent="wkv_a",
    latent_norm="kv_norm",
)


@torch.no_grad()
def run(**request: Any) -> dict[str, Any]:
    """Load the model, run one window, write the trace to the file `out`.

    Other fields: script, path (of the checkpoint), dtype, ids, start, choices (a safetensors file
    of imposed experts by layer).
    """
    module = import_script(Path(request["script"]))
    dtype = parse_dtype(request["dtype"])
    source = open_checkpoint(Path(request["path"]))
    source, config = dequantized_source(source, read_config(source), dtype)
    window = Window(torch.tensor(request["ids"]), request["start"])
    model = build(module, config, window.start + len(window.ids), dtype)
    load_weights(model, source, config)
    imposed = {int(key): value for key, value in load_file(request["choices"]).items()}
    save_trace(observe(module, model, config, window, imposed, dtype), Path(request["out"]))
    return {}


def observe(
    module: Any,
    model: Any,
    config: ModelConfig,
    window: Window,
    imposed: dict[int, Tensor],
    dtype: torch.dtype,
) -> Trace:
    """The trace of one window."""
    trace = Trace(dtype=dtype)
    turned: list[Tensor] = []
    original: Callable[..., Tensor] = module.apply_rotary_emb

    def rotate(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        # In fp32 model.py views a slice as complex numbers, which fails for an odd stride.
        turned.append(original(x.contiguous(), *args, **kwargs))
        return turned[-1]

    module.apply_rotary_emb = rotate
    with Observer(trace, OFFICIAL) as observer:
        observer.embedding(model.embed)
        for number, layer in enumerate(model.layers):
            block = Block("layer", number)
            observer.layer(block, layer, attention_shape(config, block))
            _watch_attention(observer, block, layer.attn, config, turned)
            if hasattr(layer.ffn, "gate"):
                _watch_mixture(observer, block, layer.ffn, config, imposed.get(number))
        # model.py returns only the last token's logits, so the head runs on all hidden states here.
        observer.output(OUTPUT, "norm", model.norm)
        model.freqs_cis = model.freqs_cis[window.start :]
        model(window.ids[None], 0)
        normed = trace.get(OUTPUT, "norm")
        assert normed is not None
        trace.record(OUTPUT, "logits", model.head(normed.to(dtype)))
    return trace


def _watch_attention(
    observer: Observer, block: Block, attn: Any, config: ModelConfig, turned: list[Tensor]
) -> None:
    widths, seen = attention_shape(config, block), {}

    def inside(inputs: tuple[Tensor, ...], _: object) -> None:
        seen["heads"] = inputs[0].reshape(-1, widths.heads, attn.v_head_dim)

    def finish(*_: object) -> None:
        q = observer.trace.get(block, "q")
        latent = observer.trace.get(block, "latent")
        q_turned, k_turned = turned[-2:]
        turned.clear()
        assert q is not None and latent is not None
        kv = latent @ attn.wkv_b.weight.to(latent.dtype).T
        k_nope, v = kv.unflatten(-1, (widths.heads, -1)).split(
            [attn.qk_nope_head_dim, attn.v_head_dim], dim=-1
        )
        q_turned = q_turned.reshape(-1, widths.heads, widths.rope).to(q.dtype)
        k_turned = k_turned.reshape(-1, 1, widths.rope).to(q.dtype)
        observer.attended(
            block,
            widths,
            q=torch.cat([q[..., : -widths.rope], q_turned], dim=-1),
            k=torch.cat([k_nope, k_turned.expand(-1, widths.heads, -1)], dim=-1),
            v=v,
            heads=seen["heads"],
            scale=float(attn.softmax_scale),
        )

    observer.watch(attn.wo, inside)
    observer.watch(attn, finish)


def _watch_mixture(
    observer: Observer, block: Block, ffn: Any, config: ModelConfig, imposed: Tensor | None
) -> None:
    moe, trace = config.moe, observer.trace
    assert moe is not None

    def chosen(inputs: tuple[Tensor, ...], out: tuple[Tensor, Tensor]) -> Any:
        weights, experts = out
        if imposed is not None:
            # It does not return its scores: these are recomputed in fp32 from the input. Tokens
            # with the same experts keep the factors of the file, so that its mistakes show.
            scores = gate_scores(inputs[0].float(), ffn.gate.weight.float(), moe)
            given = routing_weights(scores.gather(1, imposed), moe).to(weights.dtype)
            alike = experts.sort(dim=-1).values == imposed.sort(dim=-1).values
            alike = alike.all(dim=-1, keepdim=True)
            weights = torch.where(alike, weights, given)
            experts = torch.where(alike, experts, imposed)
        observer.routed(
            block,
            scores=None,
            chosen=experts,
            weights=weights,
            gate_weight=ffn.gate.weight,
            gate_bias=ffn.gate.bias,
        )
        return (weights, experts) if imposed is not None else None

    def routed(*_: object) -> None:
        total, shared = trace.get(block, "mlp"), trace.get(block, "shared")
        if total is not None:
            trace.record(block, "routed", total if shared is None else total - shared)

    observer.watch(ffn.gate, chosen)
    observer.watch(ffn, routed)


if __name__ == "__main__":
    serve_requests({"trace": run})
