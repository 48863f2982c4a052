"""Twenty steps of a tiny model on one process of a mesh; what they were is written down whole.
Its gates choose by far, at every step, so that the choice of experts is no matter of rounding.

Run as a program by `processes`; the single process of a comparison calls `train` itself.
"""

import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from lowlat.config.model import IndexerConfig, ModelConfig
from lowlat.data.batch import Batch
from lowlat.model.init import init_weights
from lowlat.model.transformer import Transformer
from lowlat.train.layers.fused import checkpoint_activations, use_fused_layers
from lowlat.train.layers.sparse_mla import sparse_layers, use_sparse_training
from lowlat.train.layers.stacked_experts import stack_experts
from lowlat.train.parallel.launch import process_mesh
from lowlat.train.parallel.mesh import ProcessMesh
from lowlat.train.recipe.schedule import StepPlan, TrainingSchedule
from lowlat.train.recipe.schema import OptimizerConfig, ParallelConfig, parse_recipe
from lowlat.train.run.build import new_passes
from lowlat.train.step.balance import LoadBalancer
from lowlat.train.step.indexers import IndexerLosses
from lowlat.train.step.optim import Optimizer
from lowlat.train.step.step import train_step
from tests.configs import MOE
from tests.fakes import gqa_config, mla_config
from tests.lowlat_configs import GLA, GTA, TPA, lowlat_config
from tests.train_parallel.choices import MARGIN, Margin, decide
from tests.train_parallel.layouts import Case
from tests.train_parallel.pipelines import Pipeline

LENGTH = 16
ROWS = 8
MTP = 1
SPARSE = ("dsa", "dsa-sharing", "dsa-warmup")
"""Sparse attention; the last trains its indexers only."""
INDEXER = IndexerConfig(index_n_heads=3, index_head_dim=7, index_topk=3)
EPS = 1e-5
"""So large that no update follows the rounding of a gradient that is zero but for it."""


def model_config(attention: str, layers: int = 2) -> ModelConfig:
    """Prime sizes but where four processes divide: heads, channels, experts."""
    base = {
        "mla": mla_config(),
        "layers": mla_config(model_type="lowlat"),
        "gqa": gqa_config(model_type="qwen3_moe"),
        "gla": lowlat_config(GLA),
        "gta": lowlat_config(GTA),
        "tpa": lowlat_config(TPA),
        **dict.fromkeys(SPARSE, mla_config(model_type="lowlat")),
    }[attention]
    sizes: dict[str, Any] = {}
    if attention in ("mla", "gqa", "layers", *SPARSE):
        sizes["num_attention_heads"] = 4
    if attention == "gqa":
        sizes |= {"num_key_value_heads": 4, "qk_norm": True}
    own: Any = replace(base.attention, **sizes)
    if attention == "layers":
        own = replace(own, qk_nope_head_dim=3)
        own = tuple(
            replace(own, kv_lora_rank=29 - layer, qk_rope_head_dim=2 + 2 * layer)
            for layer in range(layers)
        )
    if attention in SPARSE:
        shares = [layer % 2 > 0 and "sharing" in attention for layer in range(layers)]
        own = tuple(replace(own, indexer=replace(INDEXER, is_shared=one)) for one in shares)
    return replace(
        base,
        num_hidden_layers=layers,
        attention=own,
        intermediate_size=28,
        initializer_range=0.2,
        tie_word_embeddings=attention == "gqa",
        num_nextn_predict_layers=MTP,
        moe=replace(
            MOE,
            n_routed_experts=8,
            n_shared_experts=1,
            moe_intermediate_size=12,
            routed_scaling_factor=1.7,
            n_group=4,
            topk_group=3,
        ),
    )


def timetable(steps: int, ranks: int, **phase: Any) -> TrainingSchedule:
    """Two micro-batches of a process where four divide the rows."""
    raw = {
        "name": "t",
        "model": {},
        "data": {"folder": "none"},
        "phase": [
            {
                "name": "p",
                "steps": steps,
                "sequence_length": LENGTH,
                "batch_size": ROWS,
                "micro_batch_size": 1,
                "learning_rate": 0.002,
                "bias_update_speed": 0.002,
                "z_weight": 0.001,
            }
            | phase
        ],
    }
    return TrainingSchedule(parse_recipe(raw, origin="test"), ranks=ranks)


def windows(first: int, count: int, vocab: int, *, masks: bool) -> Batch:
    """Rows first .. first + count - 1 of an endless text; with `masks`, of short documents."""
    rows, loss_mask, documents = [], [], []
    for row in range(first, first + count):
        generator = torch.Generator().manual_seed(row)
        rows.append(torch.randint(vocab // 4, (LENGTH + 1 + MTP,), generator=generator))
        loss_mask.append(torch.rand(LENGTH + 1 + MTP, generator=generator) < 0.9)
        documents.append((3, 5, LENGTH - 8) if row % 2 else (7, LENGTH - 7))
    return Batch(
        tokens=torch.stack(rows),
        loss_mask=torch.stack(loss_mask),
        documents=tuple(documents) if masks else None,
    )


class Training:
    """A model, its optimiser and what they did."""

    def __init__(self, spec: Mapping[str, Any], mesh: ProcessMesh) -> None:
        self.spec, self.mesh = spec, mesh
        changes = dict(spec.get("changes", {}))
        config = model_config(spec["attention"], changes.pop("num_hidden_layers", 2))
        config = replace(config, **changes)
        self.model = Transformer(config)
        init_weights(self.model, seed=3)
        decide(self.model)
        stack_experts(self.model)
        use_fused_layers(self.model)
        stage = "warmup" if "warmup" in spec["attention"] else "sparse"
        if config.is_sparse:
            use_sparse_training(self.model, stage)
            for layer in sparse_layers(self.model):
                if layer.indexer is not None:  # else the bias is little more than rounding
                    layer.indexer.k_norm.bias.data.fill_(0.3)
        if spec["recompute"]:
            checkpoint_activations(self.model)
        self.passes, self.sharded = new_passes(
            self.model, mesh, device="cpu", dtype=self.dtype, sequence_length=LENGTH
        )
        table = OptimizerConfig(name=spec["optimizer"], eps=EPS)
        self.optimizer = Optimizer(self.model, table, self.sharded)
        self.balancer = LoadBalancer(self.model, sequence_weight=0.01, mesh=mesh)
        self.margin = Margin(self.model)
        self.indexers = IndexerLosses(self.model, mesh=mesh)
        self.timetable = timetable(spec["steps"], mesh.data_parallel_size, dsa_stage=stage)
        self.losses: list[list[float]] = []

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.spec["bf16"] else torch.float32

    def step(self, plan: StepPlan) -> None:
        first, rows = self.mesh.batch_shard(plan.first_row, plan.rows)
        vocab = self.model.config.vocab_size
        batch = windows(first, rows, vocab, masks=self.spec["masks"])
        result = train_step(
            self.passes,
            self.optimizer,
            self.balancer,
            batch,
            plan,
            num_ahead=1 + MTP,
            indexers=self.indexers,
            mesh=self.mesh,
        )
        kl = sum(layer.kl for layer in result.indexers)
        recall = sum(layer.recall for layer in result.indexers)
        losses = result.losses or (0.0,) * (1 + MTP)  # none in the warm-up of indexers
        self.losses.append(
            [*losses, result.z, result.sequence_loss, kl, recall, result.grad_norm]
            + [load.max_violation for load in result.loads]
        )

    def first_gradients(self) -> dict[str, Tensor]:
        """Whole gradients of the first step, read off AdamW's or Muon's moments, which scale them
        alike in every layout.
        """
        return {
            name: tensor.clone()
            for name, tensor in self.optimizer.tensors()
            if name.startswith(("exp_avg.", "momentum."))
        }


def train(spec: Mapping[str, Any], mesh: ProcessMesh) -> dict[str, Tensor]:
    """Losses of every step, gradients of the first, weights after the last."""
    training = Training(spec, mesh)
    gradients: dict[str, Tensor] = {}
    for step in range(spec["steps"]):
        training.step(training.timetable.at(step))
        if step == 0:
            gradients = training.first_gradients()
    assert training.margin.smallest > MARGIN, "rounding might decide about experts"
    weights = {name: t.clone() for name, t in training.sharded.full_parameters()}
    return {
        "losses": torch.tensor(training.losses, dtype=torch.float64),
        **{f"gradient.{name}": tensor for name, tensor in gradients.items()},
        **{f"weight.{name}": tensor for name, tensor in weights.items()},
    }


def trained_alone(cases: Iterable[Case | Pipeline]) -> dict[str, dict[str, Tensor]]:
    """What one process trains in each case, by the JSON of its `training`."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    alone: dict[str, dict[str, Tensor]] = {}
    for case in cases:
        key = json.dumps(case.training)
        alone[key] = alone.get(key) or train(case.training, ProcessMesh())
    torch.set_num_threads(threads)
    return alone


def main() -> None:
    """Arguments: a JSON list of specs, and the folder for 0.safetensors, 1.safetensors, ..."""
    specs = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(1)
    with process_mesh(ParallelConfig.model_validate(specs[0]["parallel"])):
        for index, spec in enumerate(specs):
            mesh = ProcessMesh(ParallelConfig.model_validate(spec["parallel"]))
            result = train(spec, mesh)
            if mesh.is_main_process:
                save_file(
                    {name: t.contiguous() for name, t in result.items()},
                    Path(sys.argv[2]) / f"{index}.safetensors",
                )


if __name__ == "__main__":
    main()
