"""MTP modules in GRPO: gradients at the policy's hidden states, and which tokens are targets."""

import pytest
import torch

from lowlat.attention.flash import FlashAttention
from lowlat.ops import native
from lowlat.train.policy.forward import PolicyForward, PolicySequence
from lowlat.train.policy.learner import PolicyBatch
from tests import configs
from tests.unit.train.policy.models import learner, masters
from tests.unit.train.policy.test_gradients import distance

if not native.available():
    pytest.skip(native.reason(), allow_module_level=True)

CONFIG = configs.byte_model_config("deepseek_v3", configs.MLA, num_nextn_predict_layers=2)
SEQUENCES = [
    PolicySequence(prompt=[(7 + 31 * i) % 256 for i in range(p)], completion=[*range(3, 3 + c)])
    for p, c in ((9, 5), (1, 4), (2, 1), (6, 7), (1, 1))
]
COUNTED = [True, True, True, False, True]
WEIGHT = 0.3


def batch() -> PolicyBatch:
    return PolicyBatch(
        sequences=SEQUENCES, advantages=[0.3, -0.4, 0.9, 1.0, -0.1], is_counted=list(COUNTED)
    )


def test_modules_have_the_gradients_of_fp64() -> None:
    """Sequence by sequence, without rows that have no target."""
    trained = masters(CONFIG)
    policy = learner(trained)
    figures = policy.accumulate(batch(), 2, WEIGHT)
    exact = masters(CONFIG).double()
    exact.load_state_dict({n: t.double() for n, t in policy.weights.tensors.items()})
    sums, counts = [torch.zeros((), dtype=torch.float64) for _ in range(2)], [0, 0]
    for own, counts_in in zip(SEQUENCES, COUNTED, strict=True):
        tokens = torch.tensor([*own.prompt, *own.completion])
        hidden = PolicyForward(policy.model).run([own]).hidden.double()
        for depth in range(2):
            hidden = hidden[: len(tokens) - depth - 2]
            if not counts_in or not len(hidden):
                break
            attention = FlashAttention([len(hidden)])
            ahead = tokens[depth + 1 : depth + 1 + len(hidden)]
            hidden = exact.mtp_hidden(depth, hidden, ahead, attention.positions(), attention)
            logps = exact.mtp_logits(depth, hidden).double().log_softmax(dim=-1)
            for row, target in enumerate(range(depth + 2, len(tokens))):
                if target >= len(own.prompt):
                    sums[depth] = sums[depth] - logps[row, tokens[target]]
                    counts[depth] += 1
    means = [total / count for total, count in zip(sums, counts, strict=True)]
    assert figures.mtp_losses == pytest.approx([mean.item() for mean in means], rel=1e-2)
    (WEIGHT * torch.stack(means).mean()).backward()
    expected = {n: p.grad for n, p in exact.named_parameters() if n.startswith("mtp.")}
    for name, parameter in trained.named_parameters():
        if name.startswith("mtp."):
            gradient = expected[name]
            assert parameter.grad is not None and gradient is not None
            assert distance(parameter.grad, gradient) < 0.1, name


def test_the_policy_has_the_gradients_of_frozen_modules() -> None:
    found = []
    for weight in (0.0, WEIGHT):
        trained = masters(CONFIG)
        learner(trained).accumulate(batch(), 2, weight)
        found.append({n: p.grad for n, p in trained.named_parameters() if p.grad is not None})
    frozen, learned = found
    assert not any(name.startswith("mtp.") for name in frozen)
    for name, gradient in frozen.items():
        assert torch.equal(gradient, learned[name]), name
