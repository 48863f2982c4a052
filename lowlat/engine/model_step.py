"""One model step over the scheduled chunks; a failure ends only the sequences that cause it."""

import logging
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import torch
from torch import Tensor

from lowlat.engine.request import Chunk, Sequence
from lowlat.engine.runner import ModelRunner
from lowlat.engine.scheduler import ScheduledChunk

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class StepOutput:
    """Model output of the chunks that succeeded."""

    chunks: list[ScheduledChunk]
    logits: Tensor
    """[rows, vocab]: the rows that each chunk needs, in order of the chunks."""
    hidden: Tensor
    """[tokens, hidden]: final hidden states of all tokens of the chunks."""


def run_step(
    runner: ModelRunner, chunks: list[ScheduledChunk]
) -> tuple[StepOutput | None, list[tuple[Sequence, str]]]:
    """Run the model over `chunks` in one step. Returns its output (None if every chunk failed), and
    (sequence, error) of each chunk that failed.

    If the joint step fails, each chunk runs alone, and those that succeed keep these results.
    """
    try:
        logits, hidden = runner.step([_model_input(chunk) for chunk in chunks])
        return StepOutput(chunks, logits, hidden), []
    except Exception as error:
        logger.exception("a step of %d sequences failed", len(chunks))
        if len(chunks) == 1:
            return None, [(chunks[0].sequence, _message(error))]
    passed: list[ScheduledChunk] = []
    outputs: list[tuple[Tensor, Tensor]] = []
    failed: list[tuple[Sequence, str]] = []
    for chunk in chunks:
        try:
            # Entries that are written again get the same values.
            outputs.append(runner.step([_model_input(chunk)]))
            passed.append(chunk)
        except Exception as error:
            failed.append((chunk.sequence, _message(error)))
    if not passed:
        return None, failed
    # The results of the separate runs are final: a second joint run could fail again.
    logits, hidden = zip(*outputs, strict=True)
    return StepOutput(passed, torch.cat(logits), torch.cat(hidden)), failed


def _model_input(scheduled: ScheduledChunk) -> Chunk:
    """Runner input of a scheduled chunk: tokens, draft tokens and pages."""
    sequence = scheduled.sequence
    start, end = scheduled.start, scheduled.start + scheduled.length
    known = len(sequence.tokens)
    tokens: SequenceOf[int] = sequence.tokens[start:end]
    if end > known:
        tokens = [*tokens, *sequence.draft_tokens[: end - known]]
    return Chunk(
        tokens=tokens,
        start=start,
        pages=tuple(sequence.pages),
        num_logits=num_logits(scheduled),
        path=scheduled.path,
        lora_int_id=sequence.request.options.lora_int_id,
    )


def num_logits(chunk: ScheduledChunk) -> int:
    """Rows of logits that a chunk needs: one for its last known token and one per draft token; none
    while its prompt continues in a later step, and none of an embedding's prompt; all of a prompt
    whose tokens are scored."""
    request = chunk.sequence.request
    if request.options.pooling is not None:
        return 0
    return chunk.length if request.needs_prompt_logprobs else num_sampled(chunk)


def num_sampled(chunk: ScheduledChunk) -> int:
    """Rows of logits, the last ones of a chunk, from which tokens are sampled."""
    return max(0, chunk.start + chunk.length - len(chunk.sequence.tokens) + 1)


def one_line(error: Exception) -> str:
    """The message of `error` in one line of at most 300 characters."""
    return " ".join(f"{error}".split())[:300] or type(error).__name__


def _message(error: Exception) -> str:
    return f"the model failed: {one_line(error)}"
