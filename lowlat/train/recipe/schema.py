"""Schema of training recipes: TOML tables as frozen, validated pydantic models."""

import json
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    model_validator,
)

from lowlat.train.recipe.errors import NUMBER, SEGMENTS, explain
from lowlat.train.recipe.fields import Amount, Count, Share, Table
from lowlat.train.recipe.grpo import GRPOConfig
from lowlat.train.recipe.tables import (
    BalanceConfig,
    CheckpointConfig,
    DistillationConfig,
    EvaluationConfig,
    LogConfig,
    LoraConfig,
    OptimizerConfig,
    ParallelConfig,
)
from lowlat.utils.bounded_read import read_bounded_text
from lowlat.utils.errors import UserError


def _check_plain(table: dict[str, Any]) -> dict[str, Any]:
    """`table`, if config.json can hold it; raises ValueError naming a key that JSON cannot hold."""
    for key, value in table.items():
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{key} must be finite numbers, texts, lists or tables") from error
    return table


ConfigTable = Annotated[dict[str, Any], AfterValidator(_check_plain)]
MAX_RECIPE_BYTES = 2**24
MOST_ROWS = 10**9
"""Largest global batch in sequences; the dry run checks memory."""


class Segment(Table):
    """A segment of a schedule, from the end value of the segment before (at first 0) to `to`."""

    to: Amount
    """Value at the end of the segment."""
    steps: Count | None = None
    """Length in optimizer steps; the last segment may omit it to fill the rest of the phase."""
    shape: Literal["linear", "cosine", "constant"] = "linear"
    """Interpolation to the end value; `constant` applies the end value from the first step."""


Schedule = Annotated[
    Annotated[Amount, Tag(NUMBER)] | Annotated[list[Segment], Field(min_length=1), Tag(SEGMENTS)],
    Discriminator(lambda value: SEGMENTS if isinstance(value, list) else NUMBER),
]
"""A constant, or segments that start from 0."""


class DataConfig(Table):
    """Training data and how documents are packed into sequences."""

    folder: str
    """Tokenized dataset written by `lowlat data build`, relative to the recipe."""
    document_masks: bool = False
    """Mask attention between documents packed into one sequence (V3: false in pretraining)."""
    fim_rate: Share = 0.0
    """Share of documents in fill-in-the-middle order: prefix, suffix, middle (V3: 0.1)."""


class Phase(Table):
    """A part of the training with one sequence length."""

    name: str
    """Name in logs."""
    steps: Annotated[int, Field(ge=1, le=10_000_000)]
    """Optimizer steps."""
    sequence_length: Count
    """Tokens per sequence."""
    batch_size: Schedule
    """Sequences per global batch: a multiple of micro_batch_size x data x fsdp, to which ramps are
    rounded.
    """
    micro_batch_size: Count
    """Sequences per forward and backward pass of one process."""
    learning_rate: Schedule
    """Learning rate, constant or as segments."""
    mtp_weight: Schedule = 0.3
    """Weight (lambda) of the MTP loss (V3: 0.3, then 0.1)."""
    bias_update_speed: Schedule = 1e-3
    """Update speed (gamma) of the routing bias (V3: 0.001, then 0)."""
    z_weight: Amount = 0.0
    """Weight of the z-loss."""
    rope_scaling: ConfigTable | None = None
    """RoPE scaling from this phase on, spelled as in config.json (YaRN for longer contexts)."""
    max_position_embeddings: Count | None = None
    """Context length in the exported config from this phase on."""
    data: DataConfig | None = None
    """Data of this phase, in place of the recipe's."""
    match: Literal["logits", "attention", "layers"] = "logits"
    """Distillation target: the teacher's logits, or per layer, on the teacher's input to that
    layer, the output of its attention or what the whole layer adds to the residual stream.
    """
    dsa_stage: Literal["warmup", "sparse"] | None = None
    """Training stage of sparse attention (DSA): `warmup` trains the indexers only, under dense
    attention; `sparse`, the default of sparse models, trains all weights over the chosen tokens.
    """
    dsa_indexer_loss_coeff: Amount = 1.0
    """Weight of the indexers' KL loss."""
    grpo: GRPOConfig | None = None
    """Reinforcement learning: batch_size completions per step, of up to sequence_length tokens with
    their prompts.
    """

    @property
    def is_warmup(self) -> bool:
        """Whether only the indexers of sparse attention are trained."""
        return self.dsa_stage == "warmup"

    @property
    def trains_heads(self) -> bool:
        """Whether the loss is that of the heads: not in layer-wise distillation and warm-up."""
        return self.match == "logits" and not self.is_warmup

    @model_validator(mode="after")
    def _rows_fit(self) -> "Phase":
        rows = self.batch_size
        most = max(segment.to for segment in rows) if isinstance(rows, list) else rows
        if most > MOST_ROWS:
            raise ValueError(f"batch_size: must be at most {MOST_ROWS:,}, not {most:g}")
        if not isinstance(rows, list) and (rows < 1 or rows % self.micro_batch_size):
            raise ValueError(
                f"batch_size: must be a multiple of micro_batch_size {self.micro_batch_size}, not "
                f"{rows:g}"
            )
        return self

    @model_validator(mode="after")
    def _groups_fit(self) -> "Phase":
        grpo = self.grpo
        if grpo is None:
            return self
        if self.data is not None:
            raise ValueError("data: a phase of grpo learns from grpo.prompts; remove one")
        if self.z_weight:
            raise ValueError("z_weight: grpo has no z-loss; set z_weight = 0")
        size = grpo.num_generations
        if isinstance(self.batch_size, list) or self.batch_size % size:
            raise ValueError(f"batch_size: must be a multiple of grpo.num_generations {size}")
        if grpo.max_completion_length >= self.sequence_length:
            raise ValueError(
                f"grpo.max_completion_length: {grpo.max_completion_length} leaves no token of "
                f"sequence_length {self.sequence_length} for the prompt"
            )
        return self

    @model_validator(mode="after")
    def _segments_fit(self) -> "Phase":
        for field in ("batch_size", "learning_rate", "mtp_weight", "bias_update_speed"):
            schedule = getattr(self, field)
            if not isinstance(schedule, list):
                continue
            if any(segment.steps is None for segment in schedule[:-1]):
                raise ValueError(f"{field}: only the last segment may go without steps")
            if sum(segment.steps or 0 for segment in schedule) > self.steps:
                raise ValueError(f"{field}: its segments last longer than steps {self.steps}")
        return self


class Recipe(Table):
    """All settings of a training run."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the run; its folder is runs/NAME by default."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of weight initialization and data order."""
    model: ConfigTable | None = None
    """Fields of config.json for a new model; vocab_size defaults to that of the data."""
    base_model: str | None = None
    """Checkpoint to start from instead of `model`: folder, .gguf file, preset or hub id."""
    precision: Literal["fp32", "bf16", "fp8"] = "bf16"
    """Precision of matrix products; trainable weights and optimizer state are always fp32."""
    activation_checkpointing: Literal["none", "full"] = "none"
    """`full` recomputes activations in the backward pass: less memory, a third more compute."""
    device: str = "cpu"
    """`cpu` or `cuda`."""
    data: DataConfig | None = None
    """Training data; GRPO phases need none."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """Optimizer and gradient clipping."""
    balance: BalanceConfig = BalanceConfig()
    """Load balancing of routed experts."""
    lora: LoraConfig | None = None
    """Train LoRA updates only."""
    distillation: DistillationConfig | None = None
    """Distill from a teacher model."""
    trainable: Literal["all", "attention"] = "all"
    """Trainable weights; `attention` trains attention matrices and their biases and freezes the
    rest.
    """
    parallel: ParallelConfig = ParallelConfig()
    """Parallelism."""
    phase: Annotated[list[Phase], Field(min_length=1)]
    """Training phases, in order."""
    checkpoints: CheckpointConfig = CheckpointConfig()
    """Checkpoint interval and retention."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """Evaluation on held-out documents and prompts."""
    log: LogConfig = LogConfig()
    """Logging."""

    @model_validator(mode="after")
    def _one_origin(self) -> "Recipe":
        if (self.model is None) == (self.base_model is None):
            raise ValueError("give either [model] or base_model, not both")
        if self.data is None and any(not (p.data or p.grpo) for p in self.phase):
            raise ValueError("data is missing")
        if self.base_model is None and all(p.grpo for p in self.phase):
            raise ValueError("base_model is missing; phases of grpo alone take the tokenizer of it")
        if self.data is None and self.base_model is None:
            raise ValueError("data is missing; without base_model its tokenizer is the model's")
        if self.evaluation.prompts is not None and not any(p.grpo for p in self.phase):
            raise ValueError("evaluation.prompts are those of grpo phases; remove them")
        if self.lora is not None and self.base_model is None:
            raise ValueError("lora needs base_model, a checkpoint whose weights are frozen")
        if self.lora is not None and self.trainable != "all":
            raise ValueError("trainable: lora.target_modules decides what is trained; remove one")
        if self.distillation is None and any(phase.match != "logits" for phase in self.phase):
            raise ValueError("phase.match needs [distillation], a teacher to match")
        return self

    @model_validator(mode="after")
    def _batches_divide(self) -> "Recipe":
        """Parallelism must not change what a run computes, so only ramps may be rounded."""
        data, fsdp = self.parallel.data, self.parallel.fsdp
        for phase in self.phase:
            unit = phase.micro_batch_size * data * fsdp
            if not isinstance(phase.batch_size, list) and phase.batch_size % unit:
                raise ValueError(
                    f"phase {phase.name}: batch_size {phase.batch_size:g} is not a multiple of "
                    f"{unit}, micro_batch_size {phase.micro_batch_size} x parallel.data {data} x "
                    f"parallel.fsdp {fsdp}; change one of them"
                )
        return self


def read_recipe(path: Path, changes: Sequence[str] = ()) -> Recipe:
    """Read and validate the recipe in the TOML file `path`, with `changes` of the form
    'key.sub=value' (values in TOML) applied.

    Raises UserError naming file and key.
    """
    return parse_recipe(read_raw(path, changes), origin=str(path))


def read_raw(path: Path, changes: Sequence[str] = ()) -> dict[str, Any]:
    """The same, not validated. Raises UserError if the file is not TOML."""
    try:
        raw = tomllib.loads(read_bounded_text(path, MAX_RECIPE_BYTES, str(path)))
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}); name a recipe in TOML, such as "
            "recipes/tiny.toml"
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: is not TOML ({error})") from error
    for change in changes:
        _apply(raw, change)
    return raw


def parse_recipe(raw: dict[str, Any], *, origin: str) -> Recipe:
    """Validate `raw`. Raises UserError naming `origin` and the key."""
    if "source" in raw and "phase" not in raw:
        what = "is a recipe for text, not for a training"
        raise UserError(f"{origin}: {what}; lowlat-lab collect {origin} FOLDER")
    try:
        return Recipe.model_validate(raw)
    except ValidationError as error:
        raise UserError(f"{origin}: {explain(error, Recipe)}") from error


def _apply(raw: dict[str, Any], change: str) -> None:
    """Set one key of `raw`; numbers in the path are list indices, as in phase.0.steps."""
    key, equals, text = change.partition("=")
    if not equals or not key:
        raise UserError(f"--set {change}: write key=value, such as seed=1 or phase.0.steps=50")
    try:
        value = tomllib.loads(f"x = {text}")["x"]
    except tomllib.TOMLDecodeError:
        value = text
    *parents, last = key.split(".")
    node: Any = raw
    for part in parents:
        if isinstance(node, dict):
            node.setdefault(part, {})
        node = node[_place(node, part, change)]
    node[_place(node, last, change)] = value


def _place(node: Any, part: str, change: str) -> str | int:
    """Key or index of `part` in a table or list."""
    if isinstance(node, dict):
        return part
    if isinstance(node, list) and part.isdecimal() and int(part) < len(node):
        return int(part)
    raise UserError(f"--set {change}: the recipe has no such place")
