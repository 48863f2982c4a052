"""The oracle: a transformers model with every weight random, saved in the released layout."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Mistral4ForCausalLM, PreTrainedModel
from transformers.modeling_layers import MtpModel

from .draw import Case

KINDS = {"attn_implementation": "eager", "experts_implementation": "eager"}
"""Plain loops: the grouped matmul of experts fails on odd sizes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Oracle:
    """A reference model, and its MTP modules where the case has some."""

    case: Case
    model: PreTrainedModel
    mtp: MtpModel | None

    @torch.no_grad()
    def logits(self, ids: Tensor, positions: Tensor) -> Tensor:
        with lowest_position_wins():
            return self.model(ids[None], position_ids=positions[None], use_cache=False).logits[0]

    @torch.no_grad()
    def mtp_logits(self, ids: Tensor, positions: Tensor) -> list[Tensor]:
        """Logits of each depth: row i from the hidden states at i and the embedding of the token
        depth + 1 ahead.
        """
        with lowest_position_wins():
            return self._mtp_logits(ids, positions)

    def _mtp_logits(self, ids: Tensor, positions: Tensor) -> list[Tensor]:
        assert self.mtp is not None
        decoder = self.model.get_decoder()
        hidden = decoder(ids[None], position_ids=positions[None], use_cache=False).last_hidden_state
        out = []
        for depth in range(self.case.mtp):
            ahead = slice(depth + 1, None)
            hidden = self.mtp.forward_layer(
                depth, hidden[:, :-1], positions[None, ahead], None, input_ids=ids[None, ahead]
            )
            out.append(self.mtp._project_to_logits(hidden)[0])
        return out


def build(case: Case) -> Oracle:
    """The models of `case`, a function of its seed."""
    if case.family == "mistral4":  # the only family whose class AutoModelForCausalLM does not know
        model = Mistral4ForCausalLM._from_config(case.config, **KINDS).float().eval()
    else:
        model = AutoModelForCausalLM.from_config(case.config, **KINDS).float().eval()
    generator = torch.Generator().manual_seed(case.seed)
    randomise(model, generator, case.bias_shift)
    if not case.mtp:
        return Oracle(case=case, model=model, mtp=None)
    mtp = _mtp_model(model, case.mtp).float().eval()
    for layer in mtp.layers:
        randomise(layer, generator, case.bias_shift)
    return Oracle(case=case, model=model, mtp=mtp)


def _mtp_model(model: PreTrainedModel, depth: int) -> MtpModel:
    """Every module has an indexer of its own; a layer of glm_moe_dsa also returns its choice."""
    types = getattr(model.config, "indexer_types", None)
    if types is None:
        return MtpModel(model, depth)
    model.config.indexer_types = ["full"] * depth
    mtp = MtpModel(model, depth)
    model.config.indexer_types = types
    for layer in mtp.layers:
        layer.mtp_block.register_forward_hook(lambda _module, _inputs, output: output[0])
    return mtp


@contextmanager
def lowest_position_wins() -> Iterator[None]:
    """torch.topk promises nothing about equal values, and index scores of exactly 0 are frequent:
    the oracle's indexers choose by a stable sort.
    """

    def topk(scores: Tensor, count: int, dim: int = -1, **_: Any) -> Any:
        values, places = scores.sort(dim=dim, descending=True, stable=True)
        return torch.return_types.topk((values[..., :count], places[..., :count]))

    with mock.patch.object(torch.Tensor, "topk", topk):
        yield


@torch.no_grad()
def randomise(module: nn.Module, generator: torch.Generator, bias_shift: float) -> None:
    """Every weight: norms around 1, biases of both signs, matrices that keep magnitudes near 1."""
    named = [*module.named_parameters(), *module.named_buffers()]
    for name, tensor in named:
        if "inv_freq" in name or "embed_scale" in name:  # constants of the config
            continue
        drawn = torch.randn(tensor.shape, generator=generator)
        if "norm" in name:
            tensor.copy_(1 + 0.3 * drawn)
        elif "e_score_correction_bias" in name:
            tensor.copy_(0.3 * drawn + bias_shift)
        elif tensor.dim() == 1:
            tensor.copy_(0.3 * drawn)
        elif "embed_tokens" in name:
            tensor.copy_(0.4 * drawn)
        else:
            tensor.copy_(drawn / tensor.shape[-1] ** 0.5)


def save(oracle: Oracle, folder: Path) -> None:
    """config.json and model.safetensors as released checkpoints have them, MTP modules included."""
    oracle.model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config["model_type"] = oracle.case.family
    for name in ("mtp_mlp_layer_types", "mtp_layer_types"):
        config.pop(name, None)
    if "num_mtp_layers" in config:
        config["num_nextn_predict_layers"] = config.pop("num_mtp_layers")
    (folder / "config.json").write_text(json.dumps(config))
    if oracle.mtp is None:
        return
    tensors = load_file(folder / "model.safetensors")
    for depth, layer in enumerate(oracle.mtp.layers):
        prefix = f"model.layers.{oracle.case.config.num_hidden_layers + depth}."
        for name, tensor in layer.state_dict().items():
            tensors |= {prefix + new: part for new, part in _released(name, tensor)}
        if oracle.case.mtp_copies:
            tensors[f"{prefix}embed_tokens.weight"] = oracle.mtp.embed_tokens.weight
            tensors[f"{prefix}shared_head.head.weight"] = oracle.mtp.shared_head.weight
    # clones: safetensors refuses tensors that share memory
    tensors = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _released(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Names and parts of an MTP layer's tensor in released checkpoints."""
    name = name.removeprefix("mtp_block.").replace("post_norm.", "shared_head.norm.")
    prefix, found, projection = name.partition("mlp.experts.")
    if not found:
        yield name, tensor
        return
    for expert, matrix in enumerate(tensor):
        if projection == "down_proj":
            yield f"{prefix}mlp.experts.{expert}.down_proj.weight", matrix
            continue
        gate, up = matrix.chunk(2)
        yield f"{prefix}mlp.experts.{expert}.gate_proj.weight", gate
        yield f"{prefix}mlp.experts.{expert}.up_proj.weight", up
