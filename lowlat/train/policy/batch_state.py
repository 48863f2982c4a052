"""A batch of completions as tensors for a checkpoint, between two updates over it."""

from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from lowlat.train.parallel.mesh import ProcessMesh
from lowlat.train.policy.forward import PolicySequence
from lowlat.train.policy.learner import PolicyBatch, masks_of


def gathered(batch: PolicyBatch, mesh: ProcessMesh) -> PolicyBatch:
    """`batch` with what the first update made in every process of `mesh`; collective."""
    merged = replace(batch, old_logps={}, ref_logps={}, masks={})
    for old, ref, masks in mesh.gather((batch.old_logps, batch.ref_logps, batch.masks), "data"):
        merged.old_logps |= old
        merged.ref_logps |= ref
        merged.masks |= masks
    return merged


def tensors_of(batch: PolicyBatch) -> Iterator[tuple[str, Tensor]]:
    """The state of `batch` by name; lists of several lengths are one tensor and their lengths."""
    yield "updates", torch.tensor(batch.updates)
    yield "advantages", torch.tensor(batch.advantages, dtype=torch.float64)
    yield "is_counted", torch.tensor(batch.is_counted)
    yield "completions", torch.tensor(batch.completions, dtype=torch.int64)
    for name, parts in (
        ("prompts", [torch.tensor(own.prompt) for own in batch.sequences]),
        ("sampled", [torch.tensor(own.completion) for own in batch.sequences]),
        ("old_logps", [own for _, own in sorted(batch.old_logps.items())]),
        ("ref_logps", [own for _, own in sorted(batch.ref_logps.items())]),
        ("masks", [mask for _, own in sorted(batch.masks.items()) for mask in own]),
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

    prompts, sampled, masks = parts("prompts"), parts("sampled"), parts("masks")
    lengths = [len(completion) for completion in sampled]
    return PolicyBatch(
        sequences=[
            PolicySequence(prompt=prompt.tolist(), completion=completion.tolist())
            for prompt, completion in zip(prompts, sampled, strict=True)
        ],
        advantages=tensors["advantages"].tolist(),
        is_counted=tensors["is_counted"].tolist(),
        completions=tensors["completions"].tolist(),
        updates=int(tensors["updates"]),
        old_logps=dict(enumerate(parts("old_logps"))),
        ref_logps=dict(enumerate(parts("ref_logps"))),
        masks=dict(enumerate(masks_of(masks, lengths))) if masks else {},
    )
