"""Inputs of a benchmark: the model's files and config, and the plan within its context."""

from dataclasses import dataclass
from pathlib import Path

from lowlat import api
from lowlat.bench.benchmark_plan import STORED, BenchmarkPlan
from lowlat.checkpoint.hf_folder import open_checkpoint
from lowlat.checkpoint.load import read_config
from lowlat.config.model import ModelConfig
from lowlat.plan.serving.weights import WeightBytes, stored_weights
from lowlat.utils.errors import UserError
from lowlat.utils.progress import Progress


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchmarkInputs:
    """The model of a run, and the plan for its weights and its context."""

    model: Path
    """The checkpoint folder or .gguf file."""
    config: ModelConfig
    weights: WeightBytes | None
    """Bytes of weights that are timed as stored."""
    plan: BenchmarkPlan


def read_inputs(model: str, plan: BenchmarkPlan, progress: Progress) -> BenchmarkInputs:
    """Fetch `model` and read its config. Raises UserError for what `plan` cannot measure."""
    # hub models are links, whose targets lack the suffix
    path = api.prepare(model, progress=progress).absolute()
    source = open_checkpoint(path)
    config = read_config(source)
    weights = stored_weights(source, config)
    plan = plan.within(config.max_position_embeddings).for_weights(
        _stored_dtype(config) if weights is None else STORED
    )
    if plan.context > config.max_position_embeddings:
        raise UserError(
            f"{plan.context:,} tokens exceed the model's max_position_embeddings of "
            f"{config.max_position_embeddings:,}; give smaller lengths to --prefill and --decode"
        )
    weights = weights if plan.dtype == STORED else None
    return BenchmarkInputs(model=path, config=config, weights=weights, plan=plan)


def _stored_dtype(config: ModelConfig) -> str:
    """The dtype of a checkpoint without quantized matrices; plain weights are timed in bf16."""
    return config.packing or ("bf16" if config.quantization is None else "fp8")
