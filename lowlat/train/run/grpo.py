"""The GRPO phase of a run, with its reference model (KL penalty, beta)."""

from pathlib import Path

from lowlat.model.transformer import Transformer
from lowlat.train.inputs.run_inputs import RunInputs
from lowlat.train.policy.build import new_grpo_phase
from lowlat.train.policy.phase import GRPOPhase
from lowlat.train.recipe.schema import Recipe
from lowlat.train.run.build import load_base_model


def grpo_phase(
    model: Transformer, recipe: Recipe, index: int, inputs: RunInputs, run: Path
) -> GRPOPhase | None:
    """Phase `index` of `recipe`, which trains `model` in the run folder `run`; None if it is none
    of GRPO.
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
        tokenizer=own.tokenizer,
        rewards=own.rewards,
        run=run,
    )
