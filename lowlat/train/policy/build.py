"""Construction of a GRPO phase from a recipe."""

from collections.abc import Sequence
from pathlib import Path

from lowlat.model.native import supports_native
from lowlat.model.transformer import Transformer
from lowlat.text.tokenizer import Tokenizer
from lowlat.train.parallel.mesh import ProcessMesh
from lowlat.train.policy.evaluation import HeldOutEvaluation
from lowlat.train.policy.generation import Generator, distribution_of
from lowlat.train.policy.learner import PolicyLearner
from lowlat.train.policy.loss import LossOptions
from lowlat.train.policy.phase import GRPOPhase
from lowlat.train.policy.prompts import PromptRecord
from lowlat.train.policy.rollouts import RolloutEngine
from lowlat.train.policy.tools import RolloutTool
from lowlat.train.policy.weights import PolicyWeights
from lowlat.train.recipe.grpo import GRPOConfig
from lowlat.train.recipe.schema import Phase, Recipe
from lowlat.train.rewards.workers import RewardWorkers, ToolWorkers
from lowlat.utils.errors import UserError

SAMPLES = "samples"
"""Folder in a run folder with the completions of every batch."""


def new_grpo_phase(
    model: Transformer,
    recipe: Recipe,
    phase: Phase,
    *,
    reference: Transformer | None,
    prompts: Sequence[PromptRecord],
    held_out: Sequence[PromptRecord] | None,
    tokenizer: Tokenizer,
    rewards: RewardWorkers,
    run: Path,
    mesh: ProcessMesh,
    tool: ToolWorkers | None = None,
) -> GRPOPhase:
    """The GRPO `phase` that trains `model`, fp32 master weights.

    reference: base_model in bf16 with stacked experts, if beta is above 0; held_out: prompts of
    evaluations; mesh: divides batches along `data`. Raises UserError if native kernels are missing.
    """
    table = phase.grpo
    assert table is not None
    learner = _new_learner(model, recipe, table, reference, mesh)
    engine = RolloutEngine(
        learner.model,
        context=phase.sequence_length,
        eos_ids=frozenset(tokenizer.eos_ids) | frozenset(model.config.eos_token_ids),
        seed=recipe.seed,
        tool=_rollout_tool(tool, tokenizer, table),
    )
    generator = Generator(
        engine,
        table,
        prompts=prompts,
        tokenizer=tokenizer,
        rewards=rewards,
        seed=recipe.seed,
        samples=run / SAMPLES,
        mesh=mesh,
    )
    evaluation = None
    if held_out is not None:
        evaluation = HeldOutEvaluation(
            engine,
            recipe.evaluation,
            prompts=held_out,
            max_tokens=table.max_completion_length,
            distribution=distribution_of(table),
            tokenizer=tokenizer,
            rewards=rewards,
            samples=run / SAMPLES,
            mesh=mesh,
        )
    return GRPOPhase(
        learner,
        engine,
        generator,
        iterations=table.num_iterations,
        evaluation=evaluation,
        mesh=mesh,
    )


def _rollout_tool(
    workers: ToolWorkers | None, tokenizer: Tokenizer, table: GRPOConfig
) -> RolloutTool | None:
    if workers is None:
        return None
    most = table.max_tool_calling_iterations
    return RolloutTool(workers=workers, tokenizer=tokenizer, max_iterations=most)


def _new_learner(
    model: Transformer,
    recipe: Recipe,
    table: GRPOConfig,
    reference: Transformer | None,
    mesh: ProcessMesh,
) -> PolicyLearner:
    learner = PolicyLearner(
        model,
        recipe.lora,
        distribution=distribution_of(table),
        options=_loss_options(table),
        reference=None if reference is None else PolicyWeights(reference).new_model(),
        sequence_weight=recipe.balance.sequence_weight,
        mesh=mesh,
    )
    if not supports_native(learner.model):
        raise UserError("grpo needs lowlat's native kernels; install them (docs/native.md)")
    return learner


def _loss_options(table: GRPOConfig) -> LossOptions:
    return LossOptions(
        loss_type=table.loss_type,
        epsilon=table.epsilon,
        epsilon_high=table.epsilon if table.epsilon_high is None else table.epsilon_high,
        delta=table.delta,
        beta=table.beta,
        use_bias_correction_kl=table.use_bias_correction_kl,
        max_completion_length=table.max_completion_length,
    )
