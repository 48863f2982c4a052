"""The GRPO phase of a run, with its reference model (KL penalty, beta)."""

from collections.abc import Callable
from pathlib import Path

from lowlat.model.transformer import Transformer
from lowlat.train.inputs.run_inputs import RunInputs
from lowlat.train.metrics.record import EvalRecord
from lowlat.train.parallel.mesh import ProcessMesh
from lowlat.train.policy.build import new_grpo_phase
from lowlat.train.policy.evaluation import HeldOutEvaluation
from lowlat.train.policy.phase import GRPOPhase
from lowlat.train.recipe.schema import Phase, Recipe
from lowlat.train.run.build import load_base_model


def grpo_phase(
    model: Transformer,
    recipe: Recipe,
    index: int,
    inputs: RunInputs,
    run: Path,
    mesh: ProcessMesh,
) -> GRPOPhase | None:
    """Phase `index` of `recipe`, which trains `model` in the run folder `run` and the processes
    `mesh`; None if it is none of GRPO.
    """
    phase, own = recipe.phase[index], inputs.grpo[index]
    if phase.grpo is None or own is None:
        return None
    reference = None
    if phase.grpo.beta > 0:
        assert inputs.base_model is not None
        reference = load_base_model(inputs.base_model, inputs.configs[index], "bf16")
    return new_grpo_phase(
        model,
        recipe,
        phase,
        reference=reference,
        prompts=own.prompts,
        held_out=own.held_out,
        tokenizer=own.tokenizer,
        rewards=own.rewards,
        run=run,
        mesh=mesh,
        tool=own.tool,
    )


def begins_with_evaluation(recipe: Recipe, index: int) -> bool:
    """Whether phase `index` evaluates held-out prompts before its first step: of GRPO, and not
    after a phase that ended with the same evaluation.
    """
    phase = recipe.phase[index]
    if phase.grpo is None:
        return False
    before = recipe.phase[index - 1] if index else None
    return before is None or before.grpo is None or _sampling(before) != _sampling(phase)


def _sampling(phase: Phase) -> tuple[object, ...]:
    """What an evaluation depends on besides the weights."""
    grpo = phase.grpo
    assert grpo is not None
    filters = grpo.temperature, grpo.top_p, grpo.top_k, grpo.min_p
    return (phase.sequence_length, grpo.max_completion_length, grpo.reward_funcs[0], *filters)


def pass_at_k_record(
    evaluation: HeldOutEvaluation, step: int, tokens: int, report: Callable[[str], None]
) -> EvalRecord:
    """Evaluate on held-out prompts after `step` optimizer steps and `tokens` tokens of training.
    report: gets a line for rewards that failed.
    """
    found = evaluation.run(step)
    if found.failure is not None:
        report(
            f"step {step}: {found.record.failed} held-out completions have no reward, one because "
            f"of {found.failure}"
        )
    return EvalRecord(
        step=step,
        tokens=tokens,
        split="held_out_prompts",
        loss=None,
        bits_per_byte=None,
        mtp_losses=(),
        pass_at_k=found.record,
    )
