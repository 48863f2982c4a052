"""Gates that no rounding makes choose otherwise: another layout is another order of sums, and an
expert chosen otherwise is another training.

Owns the weights that make a model's gates so decided, and the measure of how decided they are.
"""

import functools

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lowlat.config.model import MoEConfig
from lowlat.model.block import DecoderLayer
from lowlat.model.expert_loads import gates
from lowlat.model.moe import Gate
from lowlat.model.mtp import MTPModule
from lowlat.model.transformer import Transformer
from lowlat.ops.routing import Routing, route

MARGIN = 0.01
"""Smallest difference of two scores that may decide; rounding changes one by less than 1e-5."""
WISHED_MARGIN = 0.3
"""The same at the start, before training comes to move it."""
LOGIT = 8.0
"""Largest logit of a gate, about."""
SIZE = 20.0
"""Of an embedding where gates look: far more than layers come to add there in a short training."""
QUIET = 0.05
"""Share left of the weights by which anything else comes to a gate."""
BIAS = 0.5
"""Largest routing bias to begin with, either way."""


class Margin:
    """The smallest difference of two scores that decided about an expert, over all that the gates
    of a model did.
    """

    def __init__(self, model: Transformer) -> None:
        self.smallest = float("inf")
        for _, gate in gates(model):
            gate.register_forward_hook(self._hook)

    @torch.no_grad()
    def _hook(self, gate: nn.Module, _inputs: object, routing: Routing) -> None:
        assert isinstance(gate, Gate) and gate.e_score_correction_bias is not None
        found = margins(routing.scores, gate.e_score_correction_bias, gate.moe)
        self.smallest = min(self.smallest, found.min().item())


def margins(
    scores: Float[Tensor, "tokens experts"], bias: Float[Tensor, "experts"], moe: MoEConfig
) -> Float[Tensor, "tokens"]:
    """How far each token is from another choice: of groups, of experts in them, and of those that
    the sequence-wise loss counts, which sees neither groups nor biases.
    """
    chosen = moe.num_experts_per_tok
    groups = (scores + bias).unflatten(-1, (moe.n_group, -1))
    found = [_gap(scores, chosen)]
    if moe.n_group > 1:
        best = groups.topk(min(2, groups.shape[-1]), dim=-1).values.sum(dim=-1)
        found.append(_gap(best, moe.topk_group))
        kept = best.topk(moe.topk_group, dim=-1).indices
        groups = groups.gather(1, kept[..., None].expand(-1, -1, groups.shape[-1]))
    found.append(_gap(groups.flatten(1), chosen))
    return torch.stack(found).amin(dim=0)


def _gap(values: Float[Tensor, "rows n"], count: int) -> Float[Tensor, "rows"]:
    """Between the last of the `count` largest and the next."""
    ordered = values.sort(dim=-1, descending=True).values
    return ordered[:, count - 1] - ordered[:, count]


@torch.no_grad()
def decide(model: Transformer) -> None:
    """Have every token bring its wish for each expert in its embedding, in as many channels as
    there are experts, where gates read it and layers add next to nothing.

    For a model of `init_weights`, whose other channels stay as they are.
    """
    config, moe = model.config, model.config.moe
    assert moe is not None
    wished = moe.n_routed_experts
    bias, logits = _wishes(config.vocab_size, moe)
    unit = logits.square().mean().sqrt()
    model.embed_tokens.weight[:, :wished] = SIZE / unit * logits
    # Of channels of one unit, where all others are next to nothing.
    normalised = (config.hidden_size / wished) ** 0.5
    for module in model.modules():
        if isinstance(module, DecoderLayer):
            for name, weight in module.named_parameters():
                if name.endswith(("o_proj.weight", "down_proj.weight")):
                    weight[:wished] *= QUIET
        elif isinstance(module, MTPModule):
            taken = torch.eye(wished, 2 * config.hidden_size)
            module.eh_proj.weight[:wished] = SIZE / normalised * taken
        elif isinstance(module, Gate) and module.e_score_correction_bias is not None:
            module.weight.mul_(QUIET)[:, :wished] += unit / normalised * torch.eye(wished)
            module.e_score_correction_bias.copy_(bias)
    if config.tie_word_embeddings:
        # Else so large an embedding would be as large a head.
        for norm in (model.norm, *(module.norm for module in model.mtp)):
            norm.weight.div_(2 * SIZE)


@functools.cache
def _wishes(
    count: int, moe: MoEConfig
) -> tuple[Float[Tensor, "experts"], Float[Tensor, "tokens experts"]]:
    """Routing biases, and logits of gates that are far from another choice, even where norms make
    them a third smaller or larger; for half of the tokens it is another one than without biases.
    """
    wished = moe.n_routed_experts
    bias = BIAS * torch.linspace(-1, 1, wished)[torch.arange(wished) * 3 % wished]
    generator = torch.Generator().manual_seed(3)
    drawn = LOGIT * (2 * torch.rand(200_000, wished, generator=generator) - 1)
    scaled = [margins((scale * drawn).sigmoid(), bias, moe) for scale in (0.7, 1.0, 1.3)]
    drawn = drawn[torch.stack(scaled).amin(dim=0) > WISHED_MARGIN]
    chosen, unbiased = (
        route(drawn, torch.eye(wished), some, moe).experts.sort().values for some in (bias, None)
    )
    is_moved = (chosen != unbiased).any(dim=-1)
    half = count // 2
    return bias, torch.cat([drawn[is_moved][:half], drawn[~is_moved][: count - half]])
