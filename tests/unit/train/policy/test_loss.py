"""Losses, weights and advantages against TRL's own GRPOTrainer on the same numbers."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from lowlat.train.policy.advantages import group_advantages, has_signal, soft_overlong_punishment
from lowlat.train.policy.loss import LossOptions, sequence_weights, token_losses

LENGTHS = [5, 1, 7, 3]
MAX_LENGTH = 7
ADVANTAGES = [1.3, -0.4, -1.1, 0.9]


def numbers() -> dict[str, Tensor]:
    """Log-probabilities of padded completions, far enough apart that some are clipped."""
    generator = torch.Generator().manual_seed(11)
    shape = (len(LENGTHS), MAX_LENGTH)
    logps = -3 * torch.rand(shape, generator=generator, dtype=torch.float64)
    return {
        "logps": logps,
        "old": logps + 0.3 * torch.randn(shape, generator=generator, dtype=torch.float64),
        "ref": logps + 0.5 * torch.randn(shape, generator=generator, dtype=torch.float64),
        "sampled": logps + 0.3 * torch.randn(shape, generator=generator, dtype=torch.float64),
        "mask": (torch.arange(MAX_LENGTH) < torch.tensor(LENGTHS)[:, None]).long(),
    }


def trl_loss(options: LossOptions, counted: list[bool]) -> tuple[float, Tensor]:
    """The loss of TRL's trainer and its gradient by the log-probabilities."""
    trl = pytest.importorskip("trl.trainer.grpo_trainer")
    given = numbers()
    leaf = given["logps"].clone().requires_grad_()
    mask = given["mask"] * torch.tensor(counted)[:, None]
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (leaf, leaf.detach(), None),
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level="token",
        beta=options.beta,
        loss_type=options.loss_type,
        epsilon_low=options.epsilon,
        epsilon_high=options.epsilon_high,
        max_completion_length=options.max_completion_length,
        use_vllm=options.importance_sampling_clip_max is not None,
        vllm_importance_sampling_correction=True,
        aux_loss_enabled=False,
        _entropy_bonus_enabled=False,
        current_gradient_accumulation_steps=1,
        model=SimpleNamespace(training=True),
        args=SimpleNamespace(
            delta=options.delta,
            use_bias_correction_kl=options.use_bias_correction_kl,
            steps_per_generation=1,
        ),
        accelerator=SimpleNamespace(
            num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x
        ),
        _metrics={"train": _Lists()},
    )
    inputs = {
        "prompt_ids": torch.zeros(len(LENGTHS), 1).long(),
        "prompt_mask": torch.ones(len(LENGTHS), 1).long(),
        "completion_ids": torch.zeros_like(given["mask"]),
        "completion_mask": mask,
        "advantages": torch.tensor(ADVANTAGES, dtype=torch.float64),
        "old_per_token_logps": given["old"],
        "ref_per_token_logps": given["ref"],
        "num_items_in_batch": mask.sum(),
        "importance_sampling_ratio": _truncated_ratio(given, options),
    }
    loss = trl.GRPOTrainer._compute_loss(trainer, None, inputs)
    loss.backward()
    assert leaf.grad is not None
    return loss.item(), leaf.grad


def _truncated_ratio(given: dict[str, Tensor], options: LossOptions) -> Tensor:
    ratio = (given["old"] - given["sampled"]).exp()
    return ratio.clamp(max=options.importance_sampling_clip_max or math.inf)


class _Lists(dict[str, list[Any]]):
    def __missing__(self, key: str) -> list[Any]:
        return self.setdefault(key, [])


def our_loss(options: LossOptions, counted: list[bool]) -> tuple[float, Tensor]:
    given = numbers()
    mask = given["mask"].bool()
    leaf = given["logps"][mask].clone().requires_grad_()
    repeats = torch.tensor(LENGTHS)
    advantages = torch.tensor(ADVANTAGES, dtype=torch.float64).repeat_interleave(repeats)
    lengths = [length if own else 0 for length, own in zip(LENGTHS, counted, strict=True)]
    weights = [
        weight if own else 0.0
        for weight, own in zip(sequence_weights(lengths, options), counted, strict=True)
    ]
    spread = torch.tensor(weights, dtype=torch.float64).repeat_interleave(repeats)
    ref = given["ref"][mask] if options.beta else None
    sampled = given["sampled"][mask]
    found = token_losses(leaf, given["old"][mask], ref, advantages, options, sampled)
    loss = (found.losses * spread).sum()
    loss.backward()
    assert leaf.grad is not None
    gradient = torch.zeros_like(given["logps"])
    gradient[mask] = leaf.grad
    return loss.item(), gradient


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"epsilon_high": 0.28},
        {"delta": 1.4},
        {"beta": 0.1},
        {"beta": 0.1, "use_bias_correction_kl": False},
        {"beta": 0.1, "importance_sampling_clip_max": 1.2},
    ],
    ids=str,
)
@pytest.mark.parametrize("counted", [[True] * 4, [True, False, True, True]], ids=["all", "masked"])
def test_losses_equal_trl(loss_type: Any, changes: dict[str, Any], counted: list[bool]) -> None:
    options = LossOptions(loss_type=loss_type, max_completion_length=MAX_LENGTH, **changes)
    loss, gradient = our_loss(options, counted)
    expected, expected_gradient = trl_loss(options, counted)
    assert loss == pytest.approx(expected, rel=1e-12)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-12, atol=1e-15)
    assert (gradient != 0).any()


def test_clipping_is_counted_where_the_reward_has_no_gradient() -> None:
    given = numbers()
    mask = given["mask"].bool()
    repeats = torch.tensor(LENGTHS)
    advantages = torch.tensor(ADVANTAGES, dtype=torch.float64).repeat_interleave(repeats)
    leaf = given["logps"][mask].clone().requires_grad_()
    found = token_losses(leaf, given["old"][mask], None, advantages, LossOptions())
    found.losses.sum().backward()
    assert leaf.grad is not None
    assert torch.equal(found.is_clipped, leaf.grad == 0)
    assert 0 < found.is_clipped.sum() < found.is_clipped.numel()


REWARDS = [[1.0, 0.0, 0.5, 1.0], [0.2, 0.2, 0.2, 0.2], [0.0, 3.0, math.nan, 1.0]]


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages_equal_trl(scale: Any) -> None:
    """TRL's rule, with its own statistics of rewards that may be NaN."""
    trl = pytest.importorskip("trl.trainer.utils")
    rewards = torch.tensor(REWARDS, dtype=torch.float64)
    advantages = rewards - rewards.nanmean(dim=1, keepdim=True)
    if scale == "group":
        advantages = advantages / (trl.nanstd(rewards, dim=1)[:, None] + 1e-4)
    elif scale == "batch":
        advantages = advantages / (trl.nanstd(rewards) + 1e-4)
    found = group_advantages(rewards, scale)
    # TRL divides numbers of rewards in fp32.
    torch.testing.assert_close(found, advantages.nan_to_num(0.0), rtol=1e-7, atol=1e-15)
    assert has_signal(rewards).tolist() == [True, False, True]


def test_the_punishment_of_long_completions_equals_trl() -> None:
    trl = pytest.importorskip("trl.rewards")
    punish = trl.get_soft_overlong_punishment(max_completion_len=20, soft_punish_cache=6)
    lengths = range(1, 24)
    expected = punish([[0] * length for length in lengths])
    assert [soft_overlong_punishment(length, 20, 6) for length in lengths] == expected
