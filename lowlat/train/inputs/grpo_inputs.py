"""Inputs of GRPO phases: prompts, the tokenizer that makes them, and running reward functions."""

from dataclasses import dataclass
from pathlib import Path

from lowlat.text.tokenizer import Tokenizer
from lowlat.train.policy.prompts import PromptRecord, read_prompts
from lowlat.train.recipe.grpo import GRPOConfig
from lowlat.train.recipe.schema import Recipe
from lowlat.train.rewards.context import reward_context
from lowlat.train.rewards.reward_file import is_file
from lowlat.train.rewards.workers import RewardWorkers
from lowlat.utils.errors import UserError


@dataclass(frozen=True, kw_only=True, slots=True)
class GRPOInputs:
    """What one GRPO phase reads."""

    prompts: list[PromptRecord]
    tokenizer: Tokenizer
    rewards: RewardWorkers


def open_grpo_inputs(
    recipe: Recipe, base: Path, tokenizer_source: Path, origin: str
) -> list[GRPOInputs | None]:
    """Read the prompts of each GRPO phase and start its reward functions; None for other phases.

    base: folder that relative paths of the recipe start from. Raises UserError naming phase and key
    or line.
    """
    if all(phase.grpo is None for phase in recipe.phase):
        return [None] * len(recipe.phase)
    is_folder = tokenizer_source.is_dir()
    read = Tokenizer.from_folder if is_folder else Tokenizer.from_gguf
    tokenizer = read(tokenizer_source)
    found: list[GRPOInputs | None] = []
    for phase in recipe.phase:
        table = phase.grpo
        if table is None:
            found.append(None)
            continue
        prompts = read_prompts(
            base / table.prompts,
            tokenizer,
            longest=phase.sequence_length - table.max_completion_length,
            reward_funcs=table.reward_funcs,
        )
        try:
            rewards = _workers(table, base, tokenizer, prompts)
        except UserError as error:
            raise UserError(f"{origin}: phase {phase.name}: grpo.{error}") from error
        found.append(GRPOInputs(prompts=prompts, tokenizer=tokenizer, rewards=rewards))
    return found


def _workers(
    table: GRPOConfig, base: Path, tokenizer: Tokenizer, prompts: list[PromptRecord]
) -> RewardWorkers:
    context = reward_context(
        tokenizer,
        max_completion_length=table.max_completion_length,
        are_chats=not isinstance(prompts[0].prompt, str),
    )
    return RewardWorkers(
        [str((base / name).absolute()) if is_file(name) else name for name in table.reward_funcs],
        context=context,
        seconds=table.reward_seconds,
        memory_bytes=int(table.reward_memory_gb * 2**30),
    )
