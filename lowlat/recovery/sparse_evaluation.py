"""Evaluation of a conversion to sparse attention (DSA) on a text: perplexity over index_topk
compared with the original, recall of attention mass, and needles (needle in a haystack).

All models and top-k run the same code in bf16: dense attention is a top-k of the whole context.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, final

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from lowlat.checkpoint.load import load_model
from lowlat.config.attention import sparse_topk
from lowlat.config.model import ModelConfig
from lowlat.data.batch import Batch
from lowlat.recovery.evaluation import EvaluationText
from lowlat.text.pieces import encode_plain
from lowlat.text.tokenizer import Tokenizer
from lowlat.train.layers.sparse_mla import sparse_layers, use_sparse_training
from lowlat.train.parallel.local_batch import local_batch
from lowlat.train.parallel.mesh import ProcessMesh
from lowlat.utils.errors import UserError
from lowlat.utils.progress import Progress, Task

CONTEXT = 8192
"""Tokens of a window, at most the model's context."""
WINDOWS = 4
"""Most windows of text to measure perplexity on."""
TOPK = (256, 512, 1024, 2048, 4096)
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Places of the needle: 0 is the start of the context, 1 the end."""
NEEDLE, DIGITS = "\nThe secret code of the vault is", 6
CODES = 3
"""Codes drawn for every depth, each in other text."""

HEAD_ROWS = 512
"""Tokens whose logits are in memory at once."""


class Needle(NamedTuple):
    """Token ids of a planted sentence and of the question for it."""

    sentence: Int[np.ndarray, " sentence"]
    question: Int[np.ndarray, " question"]
    answer: Int[np.ndarray, " answer"]


@dataclass(frozen=True, kw_only=True, slots=True)
class SparseEvaluation:
    """What is measured, of any model of the conversion."""

    text: EvaluationText
    context: int
    """Tokens of the model's context, at most CONTEXT."""
    windows: Int[np.ndarray, "windows length_and_one"]
    """Windows of text, each with the token after it."""
    topk: int
    """index_topk of the model."""
    needles: tuple[Needle, ...]

    @property
    def length(self) -> int:
        """Tokens of a window: the context, less for a short text."""
        return self.windows.shape[1] - 1

    @property
    def all_topk(self) -> list[int]:
        """Every top-k to measure: those below the length, and the model's."""
        return sorted({k for k in TOPK if k < self.length} | {self.topk})

    def planted(self, number: int, depth: float) -> Int[np.ndarray, " context"]:
        """The context with needle `number` at `depth`."""
        filler = np.roll(self.text.ids, -number * self.context)
        return plant(filler, self.needles[number], depth, self.context)


class Score(NamedTuple):
    """Measurements of a model with one top-k."""

    losses: list[float]
    """Nats per token of each window."""
    recall: list[float]
    """Recall of attention mass by layer, over all windows; 1 without a sparse query."""

    @property
    def perplexity(self) -> float:
        return math.exp(sum(self.losses) / len(self.losses))


def plan_evaluation(
    text: EvaluationText, config: ModelConfig, tokenizer: Tokenizer
) -> SparseEvaluation:
    """The evaluation on `text` of a sparse model of `config`.

    Raises UserError if the text is too short to choose from, or the context for a needle.
    """
    topk = sparse_topk(config.attention)
    assert topk is not None
    context = min(CONTEXT, config.max_position_embeddings)
    length = min(context, len(text.ids) - 1)
    if length <= topk < context:
        raise UserError(
            f"--evaluate {text.path}: {len(text.ids)} tokens are no more than index_topk {topk}; "
            "give more text"
        )
    count = min(WINDOWS, (len(text.ids) - 1) // length)
    windows = [text.ids[place * length : (place + 1) * length + 1] for place in range(count)]
    needles = draw_needles(tokenizer)
    for needle in needles:
        _room(needle, context)
    return SparseEvaluation(
        text=text, context=context, windows=np.stack(windows), topk=topk, needles=needles
    )


def evaluate_sparse(
    plan: SparseEvaluation, original: Path, converted: Path, progress: Progress
) -> dict[str, Any]:
    """Evaluate the checkpoint `converted` as it is written, over a range of index_topk, and the
    dense weights of `original`, which has indexers to run the same code.

    Raises UserError if a perplexity is not finite.
    """
    windows, depths = len(plan.windows), len(DEPTHS) * len(plan.needles)
    steps = (2 + len(plan.all_topk)) * windows + 3 * depths
    with progress.task("Evaluating sparse attention", steps, "items") as task:
        runner = _Runner(original, plan, task)
        before, needles = runner.score(None), {"original": runner.needle(None)}
        del runner  # one model in memory
        runner = _Runner(converted, plan, task)
        dense = runner.score(None)
        rows = [_row(k, runner.score(k), before) for k in plan.all_topk]
        needles |= {"dense": runner.needle(None), "sparse": runner.needle(plan.topk)}
    return {
        "text": str(plan.text.path),
        "context": plan.length,
        "windows": windows,
        "original": {"perplexity": before.perplexity},
        "dense": _compared(dense, before),
        "index_topk": rows,
        "needle_context": plan.context,
        "needles_per_depth": len(plan.needles),
        "needle": [
            {"depth": depth} | {name: found[place] for name, found in needles.items()}
            for place, depth in enumerate(DEPTHS)
        ],
    }


def _compared(score: Score, before: Score) -> dict[str, Any]:
    """Perplexity, and its ratio to the original's: over all windows, least and greatest of one."""
    ratios = [math.exp(a - b) for a, b in zip(score.losses, before.losses, strict=True)]
    return {
        "perplexity": score.perplexity,
        "ratio": score.perplexity / before.perplexity,
        "ratio_range": [min(ratios), max(ratios)],
    }


def _row(topk: int, score: Score, before: Score) -> dict[str, Any]:
    recall = {"recall": score.recall, "recall_mean": sum(score.recall) / len(score.recall)}
    return {"index_topk": topk} | _compared(score, before) | recall


def draw_needles(tokenizer: Tokenizer) -> tuple[Needle, ...]:
    """CODES drawn codes: planted sentence, question and answer, as token ids."""
    drawn, question = random.Random(0), encode_plain(tokenizer, NEEDLE)
    needles = []
    for _ in range(CODES):
        code = "".join(f" {drawn.randrange(10)}" for _ in range(DIGITS))
        whole = encode_plain(tokenizer, NEEDLE + code)
        sentence = encode_plain(tokenizer, f"{NEEDLE}{code}.\n")
        needles.append(Needle(sentence, question, whole[len(question) :]))
    return tuple(needles)


def plant(
    filler: Int[np.ndarray, " tokens"], needle: Needle, depth: float, context: int
) -> Int[np.ndarray, " context"]:
    """`context` tokens: the sentence of `needle` at `depth` of the filler, then question and
    answer.
    """
    room = _room(needle, context)
    text = np.resize(filler, room)
    first = round(depth * room)
    parts = (text[:first], needle.sentence, text[first:], needle.question, needle.answer)
    return np.concatenate(parts)


def _room(needle: Needle, context: int) -> int:
    room = context - sum(map(len, needle))
    if room < 1:
        raise UserError(
            f"--evaluate: a context of {context} tokens has no room for the needle; leave it out"
        )
    return room


@final
class _Runner:
    """A sparse model in bf16 whose attention is dense (top-k None) or over any number of tokens."""

    def __init__(self, model: Path, plan: SparseEvaluation, task: Task) -> None:
        self._path, self._plan, self._task = model, plan, task
        self._model = load_model(model, dtype="bf16").model.requires_grad_(False)
        use_sparse_training(self._model, "sparse")
        number = self._model.config.num_hidden_layers
        self._layers = [layer for layer in sparse_layers(self._model) if layer.layer < number]

    def score(self, topk: int | None) -> Score:
        """Loss of each window, and recall by layer."""
        self._reset()
        losses = [self._loss(ids, topk) for ids in self._plan.windows]
        if not all(math.isfinite(loss) and loss < math.log(1e300) for loss in losses):
            raise UserError(
                f"--evaluate {self._plan.text.path}: the perplexity of {self._path} is not finite, "
                f"its loss is {max(losses):.4g} nats per token; check its weights"
            )
        sums = [layer.statistics.tolist() for layer in self._layers]
        return Score(losses, [mass / queries if queries else 1.0 for _, mass, queries in sums])

    def needle(self, topk: int | None) -> list[dict[str, Any]]:
        """Loss (nats per token) and accuracy of the answers at every depth, means over codes, and
        the least and greatest loss.
        """
        found = []
        for depth in DEPTHS:
            results = [self._recalled(each, depth, topk) for each in range(len(self._plan.needles))]
            losses, accuracies = zip(*results, strict=True)
            found.append(
                {
                    "loss": _mean(losses),
                    "loss_range": [min(losses), max(losses)],
                    "accuracy": _mean(accuracies),
                }
            )
        return found

    def _loss(self, ids: Int[np.ndarray, " tokens"], topk: int | None) -> float:
        hidden = self._hidden(ids[:-1], topk)
        following = torch.from_numpy(ids[1:].astype(np.int64))
        parts = zip(hidden.split(HEAD_ROWS), following.split(HEAD_ROWS), strict=True)
        nll = [
            F.cross_entropy(self._model.logits(rows), targets, reduction="sum").item()
            for rows, targets in parts
        ]
        return sum(nll) / len(following)

    def _recalled(self, number: int, depth: float, topk: int | None) -> tuple[float, float]:
        ids, answer = self._plan.planted(number, depth), len(self._plan.needles[number].answer)
        hidden = self._hidden(ids[:-1], topk)[-answer:]
        log_shares = self._model.logits(hidden).log_softmax(dim=-1)
        expected = torch.from_numpy(ids[-answer:].astype(np.int64))
        nll = -log_shares.gather(1, expected[:, None]).mean()
        return float(nll), float((log_shares.argmax(dim=-1) == expected).double().mean())

    def _reset(self) -> None:
        for layer in self._layers:
            layer.statistics = torch.zeros_like(layer.statistics)

    @torch.no_grad()
    def _hidden(
        self, ids: Int[np.ndarray, " tokens"], topk: int | None
    ) -> Float[Tensor, "tokens hidden"]:
        for layer in self._layers:
            layer.kl_weight = None if topk is None else 0.0  # None measures no recall
            if layer.indexer is not None:
                layer.indexer.dims = replace(layer.indexer.dims, index_topk=topk or len(ids))
        tokens = torch.from_numpy(ids.astype(np.int64))
        batch = Batch(tokens=tokens[None], loss_mask=torch.ones(1, len(ids), dtype=torch.bool))
        local = local_batch(ProcessMesh(), batch, 0, is_sparse=True)
        self._task.advance(1)
        return self._model(tokens, local.positions, local.attention)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
