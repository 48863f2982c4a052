"""Trainer forward pass by Hugging Face transformers, for the ablation of the mismatch between
sampling and training, and the measurement of that mismatch.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor

from lowlat.model.native import KeptActivations
from lowlat.train.policy.forward import PolicyForward, PolicyPass, PolicySequence, predicting
from lowlat.train.policy.learner import PolicyLearner

EVERY = 4
"""Passes between two comparisons with the engine's."""


@dataclass(kw_only=True, slots=True)
class Mismatch:
    """Sums over tokens of completions, of transformers compared with the engine's kernels."""

    tokens: int = 0
    difference: float = 0.0
    """Of the log-probability of the sampled token, absolute."""
    divergence: float = 0.0
    """KL divergence of transformers' distribution from the engine's, nats."""
    routers: int = 0
    """Gates of MoE layers, of prompts, too."""
    rerouted: int = 0
    """Those that choose other experts."""

    def add(self, engine: Tensor, trainer: Tensor, targets: Tensor) -> None:
        """Compare logits of the same tokens."""
        ours, theirs = (each.double().log_softmax(dim=-1) for each in (engine, trainer))
        change = (ours - theirs).gather(1, targets[:, None])
        self.tokens += len(targets)
        self.difference += change.abs().sum().item()
        self.divergence += (ours.exp() * (ours - theirs)).sum().item()

    def add_experts(self, engine: Tensor, trainer: Tensor) -> None:
        """Compare chosen experts, [layers, tokens, chosen] in any order."""
        ours, theirs = (each.sort(dim=-1).values for each in (engine, trainer))
        self.routers += ours[..., 0].numel()
        self.rerouted += int((ours != theirs).any(dim=-1).sum())

    def means(self) -> dict[str, float | None]:
        """Per token, and the share of rerouted gates (None: no experts)."""
        tokens = max(1, self.tokens)
        return {
            "difference": self.difference / tokens,
            "divergence": self.divergence / tokens,
            "rerouted": self.rerouted / self.routers if self.routers else None,
        }


@final
class TransformersForward:
    """Replaces `PolicyLearner.forward`: log-probabilities, residual stream and experts of
    transformers' model in bf16, over the same weight tensors.
    """

    def __init__(self, folder: Path, learner: PolicyLearner) -> None:
        """folder: the base model, whose config.json transformers reads."""
        self._policy = learner.model
        self._model = _shared_model(folder, learner)
        self._passes = 0
        self.mismatch = Mismatch()
        """Compared in every EVERY-th pass."""

    def refresh(self) -> None:
        """Nothing to do: the weights are the learner's tensors."""

    @torch.no_grad()
    def run(self, sequences: Sequence[PolicySequence], *, keeps: bool = True) -> PolicyPass:
        """As PolicyForward.run."""
        inputs = [torch.tensor(own.inputs) for own in sequences]
        ids = torch.nn.utils.rnn.pad_sequence(inputs, batch_first=True)
        lengths = torch.tensor(list(map(len, inputs)))
        mask = torch.arange(ids.shape[1]) < lengths[:, None]
        with _observed(self._model.model) as seen:
            out = self._model.model(input_ids=ids, attention_mask=mask, use_cache=False)
        flat = mask.flatten()
        rows, targets = predicting(sequences)
        result = PolicyPass(
            ids=ids[mask],
            lengths=lengths.tolist(),
            kept=self._kept(seen, flat),
            hidden=out.last_hidden_state.flatten(0, 1)[flat],
            rows=rows,
            targets=targets,
            is_decode=torch.ones(len(rows), dtype=torch.bool),
        )
        if self._passes % EVERY == 0:
            self._compare(sequences, result)
        self._passes += 1
        return result

    @torch.no_grad()
    def logits(self, run: PolicyPass, part: slice) -> Float[Tensor, "rows vocab"]:
        """As PolicyForward.logits."""
        return self._model.lm_head(run.hidden[run.rows[part]]).float()

    def _kept(self, seen: "_Seen", flat: Tensor) -> KeptActivations:
        config = self._policy.config
        kept = KeptActivations.empty(config, int(flat.sum()))
        for own, found in zip(kept.residuals, seen.residuals, strict=True):
            own.copy_(found.flatten(0, 1)[flat])
        for layer, (gates, experts) in seen.routing.items():
            assert kept.experts is not None and kept.gates is not None
            kept.experts[layer], kept.gates[layer] = experts[flat].int(), gates[flat]
        return kept

    def _compare(self, sequences: Sequence[PolicySequence], run: PolicyPass) -> None:
        forward, every = PolicyForward(self._policy), slice(None)
        engine = forward.run(sequences)
        self.mismatch.add(forward.logits(engine, every), self.logits(run, every), run.targets)
        assert engine.kept is not None and run.kept is not None
        if engine.kept.experts is not None and run.kept.experts is not None:
            config = self._policy.config
            moe = [n for n in range(config.num_hidden_layers) if config.is_moe_layer(n)]
            self.mismatch.add_experts(engine.kept.experts[moe], run.kept.experts[moe])


def _shared_model(folder: Path, learner: PolicyLearner) -> Any:
    """transformers' model over the learner's tensors, without its MTP modules."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    model = transformers.AutoModelForCausalLM.from_config(
        config, dtype=torch.bfloat16, experts_implementation="eager"
    ).eval()
    tensors = learner.weights.tensors
    own = {f"model.{name}": t for name, t in tensors.items() if not name.startswith("mtp.")}
    if "model.lm_head.weight" in own:
        own["lm_head.weight"] = own.pop("model.lm_head.weight")
    found = model.load_state_dict(own, assign=True, strict=False)
    assert not found.unexpected_keys and set(found.missing_keys) <= {"lm_head.weight"}, found
    model.tie_weights()
    return model.requires_grad_(False)


@dataclass(kw_only=True, slots=True)
class _Seen:
    residuals: list[Tensor] = field(default_factory=list)
    """Before every attention, every MLP, and after the last."""
    routing: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Factors and experts by layer."""


@contextmanager
def _observed(decoder: Any) -> Iterator[_Seen]:
    """Records residual stream and routing of a forward pass of transformers' decoder."""
    seen = _Seen()

    def residual(_module: Any, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        seen.residuals.append(args[0] if args else kwargs["hidden_states"])

    def routing(layer: int) -> Callable[[Any, Any, tuple[Tensor, Tensor, Tensor]], None]:
        def record(_module: Any, _args: Any, out: tuple[Tensor, Tensor, Tensor]) -> None:
            seen.routing[layer] = out[1], out[2]

        return record

    handles = [decoder.norm.register_forward_pre_hook(residual, with_kwargs=True)]
    for number, layer in enumerate(decoder.layers):
        for module in (layer.input_layernorm, layer.post_attention_layernorm):
            handles.append(module.register_forward_pre_hook(residual, with_kwargs=True))
        if hasattr(layer.mlp, "gate"):
            handles.append(layer.mlp.gate.register_forward_hook(routing(number)))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
