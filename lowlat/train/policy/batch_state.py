"""A batch of completions as tensors for a checkpoint, between two updates over it."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from lowlat.train.policy.forward import PolicySequence
from lowlat.train.policy.learner import PolicyBatch, masks_of


def tensors_of(batch: PolicyBatch) -> Iterator[tuple[str, Tensor]]:
    """The state of `batch` by name; lists of several lengths are one tensor and their lengths."""
    yield "updates", torch.tensor(batch.updates)
    yield "advantages", torch.tensor(batch.advantages, dtype=torch.float64)
    yield "is_counted", torch.tensor(batch.is_counted)
    for name, parts in (
        ("prompts", [torch.tensor(own.prompt) for own in batch.sequences]),
        ("completions", [torch.tensor(own.completion) for own in batch.sequences]),
        ("old_logps", batch.old_logps),
        ("ref_logps", batch.ref_logps),
        ("masks", [mask for own in batch.masks for mask in own]),
    ):
        if parts:
            yield name, torch.cat(parts)
            yield f"{name}.lengths", torch.tensor([len(part) for part in parts])


def batch_of(tensors: Mapping[str, Tensor]) -> PolicyBatch:
    """The batch whose `tensors_of` are `tensors`."""

    def parts(name: str) -> list[Tensor]:
        if name not in tensors:
            return []
        return list(tensors[name].clone().split(tensors[f"{name}.lengths"].tolist()))

    prompts, completions = parts("prompts"), parts("completions")
    return PolicyBatch(
        sequences=[
            PolicySequence(prompt=prompt.tolist(), completion=completion.tolist())
            for prompt, completion in zip(prompts, completions, strict=True)
        ],
        advantages=tensors["advantages"].tolist(),
        is_counted=tensors["is_counted"].tolist(),
        updates=int(tensors["updates"]),
        old_logps=parts("old_logps"),
        ref_logps=parts("ref_logps"),
        masks=masks_of(parts("masks"), [len(completion) for completion in completions]),
    )
