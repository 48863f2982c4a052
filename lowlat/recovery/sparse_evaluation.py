"""Evaluation of a conversion to sparse attention (DSA) on a text: recall of attention mass,
perplexity over index_topk, and a needle planted at several depths of the context.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, final

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from lowlat.checkpoint.load import load_model
from lowlat.config.attention import sparse_topk
from lowlat.data.batch import Batch
from lowlat.ops.cross_entropy import linear_cross_entropy
from lowlat.recovery.evaluation import EvaluationText
from lowlat.text.pieces import encode_plain
from lowlat.text.tokenizer import Tokenizer
from lowlat.train.layers.sparse_mla import SparseTrainingMLA, sparse_layers, use_sparse_training
from lowlat.train.parallel.local_batch import local_batch
from lowlat.train.parallel.mesh import ProcessMesh
from lowlat.utils.errors import UserError
from lowlat.utils.progress import Progress

CONTEXT = 8192
"""Tokens of a window, at most the model's context."""
TOPK = (256, 512, 1024, 2048, 4096)
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Places of the needle: 0 is the start of the context, 1 the end."""
NEEDLE, ANSWER = "\nThe secret code of the vault is", " 7 3 9 1 4 2"


class Needle(NamedTuple):
    """Token ids of a planted sentence and of the question for it."""

    sentence: Int[np.ndarray, " sentence"]
    question: Int[np.ndarray, " question"]
    answer: Int[np.ndarray, " answer"]


def evaluate_sparse(model: Path, text: EvaluationText, progress: Progress) -> dict[str, Any]:
    """Evaluate the sparse checkpoint `model` on the first window of `text`, in bf16: with dense
    attention, and over a range of index_topk.

    Raises UserError if the text is too short to choose from.
    """
    runner = _Runner(model)
    context = min(CONTEXT, runner.context)
    ids = text.ids[: context + 1]
    topk = sorted({k for k in (*TOPK, runner.topk) if k < min(context, len(ids) - 1)})
    if not topk:
        raise UserError(
            f"--evaluate {text.path}: {len(ids)} tokens are no more than index_topk {runner.topk}; "
            "give more text"
        )
    steps = 1 + len(topk) + 2 * len(DEPTHS)
    with progress.task("Evaluating sparse attention", steps, "items") as task:
        dense = runner.perplexity(ids, None)[0]
        task.advance(1)
        rows = []
        for k in topk:
            perplexity, recall = runner.perplexity(ids, k)
            rows.append(
                {
                    "index_topk": k,
                    "perplexity": perplexity,
                    "ratio": perplexity / dense,
                    "recall": recall,
                    "recall_mean": sum(recall) / len(recall),
                }
            )
            task.advance(1)
        needle = plan_needle(runner.tokenizer)
        depths = []
        for depth in DEPTHS:
            planted = plant(text.ids, needle, depth, context)
            found: dict[str, Any] = {"depth": depth}
            for name, k in (("dense", None), ("sparse", runner.topk)):
                found[name] = runner.recalled(planted, len(needle.answer), k)
                task.advance(1)
            depths.append(found)
    return {
        "text": str(text.path),
        "context": len(ids) - 1,
        "perplexity": dense,
        "index_topk": rows,
        "needle": depths,
    }


def plan_needle(tokenizer: Tokenizer) -> Needle:
    """The planted sentence and the question, as token ids."""
    question = encode_plain(tokenizer, NEEDLE)
    whole = encode_plain(tokenizer, NEEDLE + ANSWER)
    return Needle(encode_plain(tokenizer, f"{NEEDLE}{ANSWER}.\n"), question, whole[len(question) :])


def plant(
    filler: Int[np.ndarray, " tokens"], needle: Needle, depth: float, context: int
) -> Int[np.ndarray, " context"]:
    """`context` tokens: the sentence of `needle` at `depth` of the filler, then question and
    answer.
    """
    room = context - sum(map(len, needle))
    if room < 1:
        raise UserError(f"--evaluate: a context of {context} tokens has no room for the needle")
    text = np.resize(filler, room)
    first = round(depth * room)
    parts = (text[:first], needle.sentence, text[first:], needle.question, needle.answer)
    return np.concatenate(parts)


@final
class _Runner:
    """A sparse model in bf16 whose attention is dense or over any number of tokens."""

    def __init__(self, model: Path) -> None:
        self._model = load_model(model, dtype="bf16").model.requires_grad_(False)
        config = self._model.config
        self.context = config.max_position_embeddings
        self.tokenizer = Tokenizer.from_folder(model)
        use_sparse_training(self._model, "sparse")
        self._layers = [layer for layer in sparse_layers(self._model) if _is_main(layer, config)]
        topk = sparse_topk(config.attention)
        assert topk is not None
        self.topk = topk

    def perplexity(
        self, ids: Int[np.ndarray, " tokens"], topk: int | None
    ) -> tuple[float, list[float]]:
        """Perplexity, and recall of attention mass by layer; topk None: dense attention."""
        hidden = self._hidden(ids[:-1], topk)
        following = torch.from_numpy(ids[1:].astype(np.int64))
        counts = torch.ones_like(following, dtype=torch.bool)
        head = self._model.head_weight(0)
        loss = linear_cross_entropy(hidden, head, following, counts, z_weight=0.0)
        sums = [layer.statistics.tolist() for layer in self._layers]
        recall = [mass / queries if queries else 1.0 for _, mass, queries in sums]
        return math.exp(float(loss.nll) / len(following)), recall

    def recalled(
        self, ids: Int[np.ndarray, " tokens"], answer: int, topk: int | None
    ) -> dict[str, float]:
        """Loss (nats per token) and accuracy of the last `answer` tokens of `ids`."""
        hidden = self._hidden(ids[:-1], topk)[-answer:]
        log_shares = self._model.logits(hidden).log_softmax(dim=-1)
        expected = torch.from_numpy(ids[-answer:].astype(np.int64))
        nll = -log_shares.gather(1, expected[:, None]).mean()
        accuracy = (log_shares.argmax(dim=-1) == expected).double().mean()
        return {"loss": float(nll), "accuracy": float(accuracy)}

    @torch.no_grad()
    def _hidden(
        self, ids: Int[np.ndarray, " tokens"], topk: int | None
    ) -> Float[Tensor, "tokens hidden"]:
        for layer in self._layers:
            layer.is_dense = topk is None
            layer.kl_weight = None if topk is None else 0.0
            layer.statistics = torch.zeros_like(layer.statistics)
            if layer.indexer is not None and topk is not None:
                layer.indexer.dims = replace(layer.indexer.dims, index_topk=topk)
        tokens = torch.from_numpy(ids.astype(np.int64))
        batch = Batch(tokens=tokens[None], loss_mask=torch.ones(1, len(ids), dtype=torch.bool))
        local = local_batch(ProcessMesh(), batch, 0, is_sparse=True)
        return self._model(tokens, local.positions, local.attention)


def _is_main(layer: SparseTrainingMLA, config: Any) -> bool:
    """Whether `layer` is no MTP module."""
    return layer.layer < config.num_hidden_layers


def mean_loss(depths: Sequence[dict[str, Any]], name: str) -> float:
    """Mean loss of the needle's answer over depths, `dense` or `sparse`."""
    return sum(found[name]["loss"] for found in depths) / len(depths)
