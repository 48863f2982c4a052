"""Gradients at the engine's activations, against fp64 and against PyTorch's own forward pass."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from lowlat.attention.flash import FlashAttention
from lowlat.config.model import ModelConfig
from lowlat.model.moe import Gate
from lowlat.model.replace_modules import adopt, replace_modules
from lowlat.ops import native
from lowlat.ops.routing import Routing, route
from lowlat.train.layers.fused import use_fused_layers
from lowlat.train.policy.distribution import SamplingDistribution
from lowlat.train.policy.forward import PolicyForward, PolicySequence
from lowlat.train.policy.learner import PolicyBatch
from lowlat.train.policy.loss import LossOptions, sequence_weights, token_losses
from tests.parameters import slow_except
from tests.unit.train.policy.models import CONFIGS, learner, masters

if not native.available():
    pytest.skip(native.reason(), allow_module_level=True)

SEQUENCES = [
    PolicySequence(
        prompt=[(i * 37 + k) % 256 for i in range(3 + 17 * k)],
        completion=[3 + (i * 29 + 5 * k) % 240 for i in range(1 + 11 * k)],
    )
    for k in range(4)
]
ADVANTAGES = [0.7, -1.2, 0.4, 1.5]
SAMPLING = SamplingDistribution(temperature=0.8, top_k=200)
OPTIONS = LossOptions(loss_type="grpo", epsilon=0.1, epsilon_high=0.1, beta=0.3)


class GivenExperts(Gate):
    """A gate whose experts are given; factors and gradients are its own."""

    def __init__(self, gate: Gate, experts: Tensor) -> None:
        adopt(self, gate)
        self.experts = experts

    def forward(self, x: Tensor) -> Routing:
        return route(x, self.weight, None, self.moe, self.experts.long())


def batch() -> PolicyBatch:
    """In its second update: old log-probabilities and those of the reference are others."""
    generator = torch.Generator().manual_seed(3)
    old, ref = (
        [
            -5 + 2 * torch.rand(len(own.completion), generator=generator, dtype=torch.float64)
            for own in SEQUENCES
        ]
        for _ in range(2)
    )
    return PolicyBatch(
        sequences=SEQUENCES,
        advantages=ADVANTAGES,
        is_counted=[True, True, False, True],
        updates=1,
        old_logps=dict(enumerate(old)),
        ref_logps=dict(enumerate(ref)),
        masks={
            number: [torch.arange(3, 250)] * len(own.completion)
            for number, own in enumerate(SEQUENCES)
        },
    )


def loss_by_autograd(logits: Tensor, own: PolicyBatch, targets: Tensor) -> Tensor:
    """The loss of all sequences, from the logits of their completions' tokens."""
    weights = sequence_weights(own.lengths, OPTIONS)
    total = logits.new_zeros((), dtype=torch.float64)
    lengths = [len(each.completion) for each in own.sequences]
    parts = zip(logits.double().split(lengths), targets.split(lengths), strict=True)
    for number, (rows, ids) in enumerate(parts):
        scores = torch.full_like(rows, -torch.inf)
        scores[:, 3:250] = rows[:, 3:250] / SAMPLING.temperature
        logps = scores.log_softmax(dim=-1).gather(1, ids[:, None])[:, 0]
        if not own.is_counted[number]:
            continue
        advantages = torch.full_like(logps, own.advantages[number])
        found = token_losses(
            logps, own.old_logps[number], own.ref_logps[number], advantages, OPTIONS
        )
        total = total + found.losses.sum() * weights[number]
    return total


def pytorch_gradients(
    config: ModelConfig, weights: dict[str, Tensor], experts: Tensor | None, dtype: torch.dtype
) -> dict[str, Tensor]:
    """By autograd through the whole model with activations of `dtype`."""
    model = masters(config)
    model.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
    if dtype == torch.float64:
        model = model.double()
    use_fused_layers(model)

    def given(path: str, module: nn.Module) -> nn.Module | None:
        if isinstance(module, Gate) and path.startswith("layers."):
            assert experts is not None
            return GivenExperts(module, experts[int(path.split(".")[1])])
        return None

    replace_modules(model, given)
    ids = torch.tensor([token for own in SEQUENCES for token in own.inputs])
    attention = FlashAttention([len(own.inputs) for own in SEQUENCES])
    hidden = model(ids, attention.positions(), attention, dtype=dtype)
    rows, targets = predicting(SEQUENCES)
    loss_by_autograd(model.logits(hidden)[rows], batch(), targets).backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def predicting(sequences: Sequence[PolicySequence]) -> tuple[Tensor, Tensor]:
    rows: list[int] = []
    first = 0
    for own in sequences:
        last = first + len(own.prompt) - 1
        rows += range(last, last + len(own.completion))
        first += len(own.inputs)
    return torch.tensor(rows), torch.tensor([t for own in sequences for t in own.completion])


def distance(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("name", slow_except(("mla-moe-mtp", "gqa"), CONFIGS))
def test_gradients_are_as_near_to_fp64_as_those_of_pytorch(name: str) -> None:
    config = CONFIGS[name]
    trained = masters(config)
    policy = learner(trained, SAMPLING, OPTIONS)
    figures = policy.accumulate(batch(), 3)
    ours = {n: p.grad for n, p in trained.named_parameters() if p.grad is not None}
    kept = PolicyForward(policy.model).run(SEQUENCES).kept
    assert kept is not None
    weights = policy.weights.tensors
    exact = pytorch_gradients(config, weights, kept.experts, torch.float64)
    plain = pytorch_gradients(config, weights, kept.experts, torch.bfloat16)
    assert figures.tokens == sum(batch().lengths)
    without_mtp = {n for n in exact if not n.startswith("mtp.")}
    assert ours.keys() == without_mtp
    for parameter in without_mtp:
        own, reference = distance(ours[parameter], exact[parameter]), exact[parameter]
        assert own < 3 * distance(plain[parameter], reference) + 0.01, parameter
        assert own < 0.1, parameter


def test_the_first_update_has_a_ratio_of_1() -> None:
    trained = masters(CONFIGS["mla-moe-mtp"])
    policy = learner(trained, options=LossOptions(epsilon=0.0, epsilon_high=0.0))
    own = PolicyBatch(sequences=SEQUENCES, advantages=ADVANTAGES, is_counted=[True] * 4)
    figures = policy.accumulate(own, 2)
    assert figures.clipped == 0  # with an epsilon of 0 only ratios of exactly 1 are not clipped
    lengths = [len(each.completion) for each in SEQUENCES]
    total = sum(a * n for a, n in zip(ADVANTAGES, lengths, strict=True))
    assert figures.loss == pytest.approx(-total / sum(lengths), rel=1e-15)
