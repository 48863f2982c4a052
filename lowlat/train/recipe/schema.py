"""A training recipe: what a TOML file may say, frozen and checked. Owns no meaning of schedules
(`schedule`) and no files beyond the recipe itself.
"""

import json
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from lowlat.train.recipe.errors import explain
from lowlat.utils.errors import UserError

Count = Annotated[int, Field(ge=1, le=10**12)]
Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Rate = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]


def _check_plain(table: dict[str, Any]) -> dict[str, Any]:
    """A table as config.json may hold it. Raises ValueError naming a key that is none."""
    for key, value in table.items():
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{key} must be finite numbers, texts, lists or tables") from error
    return table


ConfigTable = Annotated[dict[str, Any], AfterValidator(_check_plain)]


MOST_ROWS = 10**9
"""Rows of a global batch: what memory holds of them is the plan's to say."""


class _Table(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True
    )


class Segment(_Table):
    """A stretch of a schedule, from where the one before ended to `to`."""

    to: Amount
    """Value at the end of the segment."""
    steps: Count | None = None
    """Optimiser steps it lasts; without, the rest of the phase (last segment only)."""
    shape: Literal["linear", "cosine", "constant"] = "linear"
    """How the value gets there; constant takes it at once."""


Schedule = Amount | Annotated[list[Segment], Field(min_length=1)]
"""A constant, or segments that start from 0."""


class DataConfig(_Table):
    """Where tokens come from and how they are packed."""

    folder: str
    """Token folder made by `lowlat data build`; relative paths start at the recipe."""
    document_masks: bool = False
    """Documents packed into one row do not see one another (V3: false in pretraining)."""
    fim_rate: Share = 0.0
    """Share of documents rearranged as prefix, suffix, middle (V3: 0.1)."""


class OptimizerConfig(_Table):
    """How gradients move weights."""

    name: Literal["adamw", "muon"] = "adamw"
    """muon: Newton-Schulz on hidden matrices, AdamW for embedding, head, gates and norms."""
    betas: tuple[Rate, Rate] = (0.9, 0.95)
    """AdamW's decay rates of first and second moment."""
    eps: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1e-8
    """AdamW's epsilon."""
    weight_decay: Amount = 0.1
    """Decoupled decay of matrices, per step and learning rate."""
    momentum: Rate = 0.95
    """Muon's momentum."""
    max_grad_norm: Amount = 1.0
    """Largest global gradient norm; 0 does not clip."""


class BalanceConfig(_Table):
    """How experts are kept equally busy."""

    sequence_weight: Amount = 1e-4
    """Alpha of the sequence-wise loss (V3 equations 17 to 20)."""


class ParallelConfig(_Table):
    """Sizes of the mesh; their product is the number of processes."""

    data: Count = 1
    """Replicas with gradients summed (DDP)."""
    fsdp: Count = 1
    """Processes a replica's weights and optimiser are divided among (FSDP2)."""
    expert: Count = 1
    """Processes the routed experts are divided among; uses the data, fsdp and context processes."""
    tensor: Count = 1
    """Processes the heads and MLP channels are divided among."""
    pipeline: Count = 1
    """Stages the layers are divided among."""
    context: Count = 1
    """Processes a sequence is divided among."""
    pipeline_schedule: Literal["1f1b", "interleaved", "zb", "zbv", "dualpipev"] = "1f1b"
    """Order of forward and backward passes of micro-batches."""

    @property
    def processes(self) -> int:
        return self.data * self.fsdp * self.tensor * self.pipeline * self.context


class CheckpointConfig(_Table):
    """When the complete state is written."""

    every_steps: Count = 200
    """Optimiser steps between saves; one is written at the end of every phase as well."""
    keep_last: Annotated[int, Field(ge=2)] = 2
    """Latest saves that stay."""
    keep_every_hours: Annotated[float, Field(gt=0, le=1e6)] | None = None
    """One save per so many hours stays for good."""


class EvaluationConfig(_Table):
    """Loss on held-out documents."""

    every_steps: Count = 200
    """Optimiser steps between evaluations; one is made at the end of every phase as well."""
    sequences: Count = 64
    """Windows of the held-out split, always the same ones."""


class LogConfig(_Table):
    """What is written down."""

    every_steps: Count = 1
    """Optimiser steps between records."""
    tensorboard: bool | None = None
    """TensorBoard files; by default where tensorboard is installed."""


class LoraConfig(_Table):
    """Low-rank updates of frozen projections (arXiv 2106.09685)."""

    rank: Count
    """Rank of an update."""
    alpha: Amount
    """The update is scaled by alpha / rank."""
    target_modules: Annotated[tuple[str, ...], Field(min_length=1)] = (
        "q_proj",
        "q_a_proj",
        "q_b_proj",
        "kv_a_proj_with_mqa",
        "kv_b_proj",
        "k_proj",
        "v_proj",
        "o_proj",
    )
    """Names of the projections that get one."""


class DistillationConfig(_Table):
    """A second model, which stays, that is learned from: forward KL between next-token
    distributions.
    """

    teacher: str
    """Checkpoint, named as in `base_model`; it must have the same vocabulary as the model."""
    cross_entropy_weight: Amount = 0.0
    """Weight of the ordinary loss beside the divergence."""


class Phase(_Table):
    """A stretch of training with one sequence length."""

    name: str
    """Shown in logs."""
    steps: Annotated[int, Field(ge=1, le=10_000_000)]
    """Optimiser steps."""
    sequence_length: Count
    """Tokens of a row."""
    batch_size: Schedule
    """Rows of a global batch, whole micro-batches of all processes; a schedule ramps it and is
    rounded to them.
    """
    micro_batch_size: Count
    """Rows of one forward and backward pass of one process."""
    learning_rate: Schedule
    """Peak or schedule."""
    mtp_weight: Schedule = 0.3
    """Lambda of the MTP loss (V3: 0.3, then 0.1)."""
    bias_update_speed: Schedule = 1e-3
    """Gamma of the routing bias (V3: 0.001, then 0)."""
    z_weight: Amount = 0.0
    """Weight of the z-loss."""
    rope_scaling: ConfigTable | None = None
    """rope_scaling from this phase on, as config.json spells it (YaRN for longer contexts)."""
    max_position_embeddings: Count | None = None
    """Context the exported config names from this phase on."""
    data: DataConfig | None = None
    """Other data for this phase."""
    match: Literal["logits", "attention", "layers"] = "logits"
    """With a teacher, what is matched: its next-token distributions, or layer by layer, each layer
    given what the teacher's got, its attention's output or all that the layer adds.
    """

    @model_validator(mode="after")
    def _segments_fit(self) -> "Phase":
        for field in ("batch_size", "learning_rate", "mtp_weight", "bias_update_speed"):
            schedule = getattr(self, field)
            if field == "batch_size":
                _check_rows(schedule)
            if not isinstance(schedule, list):
                if field == "batch_size" and (schedule < 1 or schedule % self.micro_batch_size):
                    raise ValueError(
                        f"{field}: must be a multiple of micro_batch_size "
                        f"{self.micro_batch_size}, not {schedule:g}"
                    )
                continue
            if any(segment.steps is None for segment in schedule[:-1]):
                raise ValueError(f"{field}: only the last segment may go without steps")
            if sum(segment.steps or 0 for segment in schedule) > self.steps:
                raise ValueError(f"{field}: its segments last longer than steps {self.steps}")
        return self


def _check_rows(schedule: float | list[Segment]) -> None:
    """Raises ValueError for batches beyond all memories."""
    most = max(segment.to for segment in schedule) if isinstance(schedule, list) else schedule
    if most > MOST_ROWS:
        raise ValueError(f"batch_size: must be at most {MOST_ROWS:,}, not {most:g}")


class Recipe(_Table):
    """Everything that decides what a run computes."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the run, and of its folder unless one is given."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Of weights and data order."""
    model: ConfigTable | None = None
    """The fields of config.json; vocab_size may be left to the data."""
    base_model: str | None = None
    """A checkpoint to go on from instead of `model`: folder, .gguf, preset or hub id."""
    precision: Literal["fp32", "bf16", "fp8"] = "bf16"
    """Of the products; weights that move and the optimiser are fp32 always."""
    activation_checkpointing: Literal["none", "full"] = "none"
    """Activations computed again in the backward pass: less memory, a third more work."""
    device: str = "cpu"
    """cpu or cuda."""
    data: DataConfig
    """Where tokens come from."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """How gradients move weights."""
    balance: BalanceConfig = BalanceConfig()
    """How experts are kept equally busy."""
    lora: LoraConfig | None = None
    """Train low-rank updates only."""
    distillation: DistillationConfig | None = None
    """Learn from another model."""
    trainable: Literal["all", "attention"] = "all"
    """Weights that move; attention: its matrices and their biases, while norms, MLPs, embedding and
    head stay.
    """
    parallel: ParallelConfig = ParallelConfig()
    """Division among processes."""
    phase: Annotated[list[Phase], Field(min_length=1)]
    """What is trained, in order."""
    checkpoints: CheckpointConfig = CheckpointConfig()
    """When the state is written."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """When held-out loss is measured."""
    log: LogConfig = LogConfig()
    """What is written down."""

    @model_validator(mode="after")
    def _one_origin(self) -> "Recipe":
        if (self.model is None) == (self.base_model is None):
            raise ValueError("give either [model] or base_model, not both")
        if self.lora is not None and self.base_model is None:
            raise ValueError("lora needs base_model, a checkpoint whose weights stay")
        if self.lora is not None and self.trainable != "all":
            raise ValueError("trainable: lora says what is trained, by its modules; leave one out")
        if self.distillation is None and any(phase.match != "logits" for phase in self.phase):
            raise ValueError("phase.match needs [distillation], a teacher to match")
        return self

    @model_validator(mode="after")
    def _batches_divide(self) -> "Recipe":
        """A layout must not change what a run computes: only ramps are rounded."""
        data, fsdp = self.parallel.data, self.parallel.fsdp
        for phase in self.phase:
            unit = phase.micro_batch_size * data * fsdp
            if not isinstance(phase.batch_size, list) and phase.batch_size % unit:
                raise ValueError(
                    f"phase {phase.name}: batch_size {phase.batch_size:g} is no multiple of "
                    f"{unit}, micro_batch_size {phase.micro_batch_size} x parallel.data {data} x "
                    f"parallel.fsdp {fsdp}; change one of them"
                )
        return self


def read_recipe(path: Path, changes: Sequence[str] = ()) -> Recipe:
    """The recipe in the TOML file `path`, with `changes` 'key.sub=value' (values as TOML).

    Raises UserError naming file and key for anything that is not a recipe.
    """
    return parse_recipe(read_raw(path, changes), origin=str(path))


def read_raw(path: Path, changes: Sequence[str] = ()) -> dict[str, Any]:
    """The same as TOML's values, unchecked. Raises UserError for a file that is no TOML."""
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
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
    """`raw` as a Recipe; errors name `origin` and the key."""
    if "source" in raw and "phase" not in raw:
        what = "is a recipe for text, not for a training"
        raise UserError(f"{origin}: {what}; lowlat-lab collect {origin} FOLDER")
    raw = _tuples(raw)
    try:
        return Recipe.model_validate(raw)
    except ValidationError as error:
        raise UserError(f"{origin}: {explain(error, Recipe, raw)}") from error


TUPLES = ("betas", "target_modules")
"""Keys whose values have a fixed length or order."""


def _tuples(value: Any) -> Any:
    """TOML knows no tuples; strict validation takes no lists for them."""
    if not isinstance(value, dict):
        return value
    return {
        key: tuple(item) if key in TUPLES and isinstance(item, list) else _tuples(item)
        for key, item in value.items()
    }


def _apply(raw: dict[str, Any], change: str) -> None:
    """Set one key of `raw`; numbers in the path are places in a list, as phase.0.steps."""
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
        node = _step_into(node, part, change)
    if isinstance(node, list) and last.isdecimal() and int(last) < len(node):
        node[int(last)] = value
    elif isinstance(node, dict):
        node[last] = value
    else:
        raise UserError(f"--set {change}: the recipe has no such place")


def _step_into(node: Any, part: str, change: str) -> Any:
    if isinstance(node, dict):
        return node.setdefault(part, {})
    if isinstance(node, list) and part.isdecimal() and int(part) < len(node):
        return node[int(part)]
    raise UserError(f"--set {change}: the recipe has no such place")
