"""Inputs of GRPO phases: prompts, the tokenizer that makes them, and running reward functions."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from lowlat.text.tokenizer import Tokenizer
from lowlat.train.policy.prompts import PromptRecord, read_prompts
from lowlat.train.policy.tools import check_tool_messages
from lowlat.train.recipe.grpo import GRPOConfig
from lowlat.train.recipe.schema import Recipe
from lowlat.train.rewards.context import reward_context
from lowlat.train.rewards.reward_file import is_file
from lowlat.train.rewards.workers import RewardWorkers, ToolWorkers
from lowlat.utils.errors import UserError


@dataclass(frozen=True, kw_only=True, slots=True)
class GRPOInputs:
    """What one GRPO phase reads."""

    prompts: list[PromptRecord]
    held_out: list[PromptRecord] | None
    """Of evaluations; None without them."""
    tokenizer: Tokenizer
    rewards: RewardWorkers
    tool: ToolWorkers | None = None

    def close(self) -> None:
        """End the processes of reward functions and tool."""
        self.rewards.close()
        if self.tool is not None:
            self.tool.close()

    def notes(self, phase: str) -> Iterator[str]:
        """A line about the evaluations of `phase` if there are none, or with trained prompts."""
        if self.held_out is None:
            yield f"phase {phase}: no evaluations, evaluation.prompts names no held-out prompts"
            return
        trained = {own.ids for own in self.prompts}
        if count := sum(own.ids in trained for own in self.held_out):
            yield (
                f"phase {phase}: {count:,} of {len(self.held_out):,} prompts of evaluation.prompts "
                "are also in grpo.prompts, so they are not held out"
            )


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
        longest = phase.sequence_length - table.max_completion_length
        read_file = partial(
            read_prompts, tokenizer=tokenizer, longest=longest, reward_funcs=table.reward_funcs
        )
        prompts, held_out = read_file(base / table.prompts), None
        if recipe.evaluation.prompts is not None:
            held_out = read_file(base / recipe.evaluation.prompts, key="evaluation.prompts")
            _check_kind(held_out, prompts, f"{origin}: evaluation.prompts")
        try:
            tool = _tool(table, base, tokenizer, prompts)
            rewards = _workers(table, base, tokenizer, prompts)
        except UserError as error:
            raise UserError(f"{origin}: phase {phase.name}: grpo.{error}") from error
        found.append(
            GRPOInputs(
                prompts=prompts, held_out=held_out, tokenizer=tokenizer, rewards=rewards, tool=tool
            )
        )
    return found


def _check_kind(held_out: list[PromptRecord], prompts: list[PromptRecord], where: str) -> None:
    """Raises UserError unless both are texts or both are chats."""
    kinds = ["texts" if isinstance(own[0].prompt, str) else "chats" for own in (held_out, prompts)]
    if kinds[0] != kinds[1]:
        raise UserError(f"{where} has {kinds[0]}, grpo.prompts has {kinds[1]}; write one kind")


def _tool(
    table: GRPOConfig, base: Path, tokenizer: Tokenizer, prompts: list[PromptRecord]
) -> ToolWorkers | None:
    if table.tool is None:
        return None
    check_tool_messages(tokenizer, prompts)
    return ToolWorkers(
        str((base / table.tool).absolute()),
        seconds=table.reward_seconds,
        memory_bytes=int(table.reward_memory_gb * 2**30),
    )


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
