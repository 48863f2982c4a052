"""`lowlat eval --prompts`: pass@k of a model on a file of prompts, scored by a reward function."""

import json
import math
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lowlat.cli import options
from lowlat.engine.params import MAX_N
from lowlat.generate.params import SamplingParams
from lowlat.utils.errors import UserError
from lowlat.utils.strict_json import finite

if TYPE_CHECKING:
    from lowlat.generate.model import Model
    from lowlat.train.policy.prompts import PromptRecord
    from lowlat.train.policy.rollouts import Rollout
    from lowlat.train.recipe.tables import EvaluationConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptOptions:
    """Options of pass@k, with the defaults of a recipe."""

    prompts: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Prompts to evaluate by pass@k, as JSON Lines."),
    ] = None
    reward: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Reward function that scores completions, or a FILE.py with one."
        ),
    ] = None
    samples: Annotated[
        int, typer.Option(min=1, max=MAX_N, help="Completions sampled per prompt (n).")
    ] = 8
    pass_at: Annotated[
        str, typer.Option(metavar="K,...", help="Values of k, at most the number of samples.")
    ] = "1"
    pass_threshold: Annotated[
        float, typer.Option(help="Least score with which a completion passes.")
    ] = 1.0
    max_tokens: Annotated[int, typer.Option(min=1, help="Maximum tokens of a completion.")] = 512
    temperature: options.Temperature = 1.0
    top_k: options.TopK = 0
    top_p: options.TopP = 1.0
    min_p: options.MinP = 0.0
    seed: Annotated[int, typer.Option(min=0, help="Seed of sampling.")] = 0
    samples_out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Also write completions and scores, as JSON Lines."),
    ] = None

    def table(self) -> "EvaluationConfig":
        """The same as a recipe's table. Raises UserError naming the option."""
        from lowlat.train.recipe.tables import EvaluationConfig

        try:
            values = tuple(sorted({int(text) for text in self.pass_at.split(",")}))
        except ValueError as error:
            raise UserError(
                f"--pass-at '{self.pass_at}': write whole numbers, as in 1,8"
            ) from error
        if not 1 <= values[0] <= values[-1] <= self.samples:
            raise UserError(
                f"--pass-at {self.pass_at}: must be from 1 to the {self.samples} samples; raise "
                "--samples"
            )
        if not math.isfinite(self.pass_threshold):
            raise UserError("--pass-threshold: must be a finite number")
        return EvaluationConfig(
            num_generations=self.samples, pass_at=values, pass_threshold=self.pass_threshold
        )


def evaluate_prompts(
    name: str,
    own: PromptOptions,
    as_json: bool,
    parallel: str | None,
    machine: options.MachineOptions,
) -> None:
    """Evaluate the model `name` and print pass@k. Raises UserError, for options, prompts and reward
    before weights are read.
    """
    from lowlat import api
    from lowlat.cli.inputs import load_model
    from lowlat.train.policy.evaluation import evaluate_completions
    from lowlat.train.policy.generation import write_samples
    from lowlat.train.rewards.context import reward_context
    from lowlat.train.rewards.workers import RewardWorkers, check_reward_funcs
    from lowlat.utils.process_group import is_follower
    from lowlat.utils.progress import make_progress

    assert own.prompts is not None
    if own.reward is None:
        raise UserError("--prompts needs --reward NAME, a built-in reward function or a FILE.py")
    table = own.table()
    check_reward_funcs([own.reward], "--reward")
    if is_follower():  # process 0 has the input
        load_model(name, parallel=parallel, **asdict(machine))
    path = api.prepare(name, progress=make_progress())
    tokenizer = api.read_tokenizer(path)
    tokenizer.require()
    prompts = _read(path, tokenizer, own)
    params = _params(own, len(prompts))
    context = reward_context(
        tokenizer,
        max_completion_length=own.max_tokens,
        are_chats=not isinstance(prompts[0].prompt, str),
    )
    with RewardWorkers([own.reward], context=context, key="--reward") as rewards:
        model = load_model(name, parallel=parallel, tokenizer=tokenizer, **asdict(machine))
        began = time.perf_counter()
        groups = _sample(model, prompts, params)
        seconds = time.perf_counter() - began
        found = evaluate_completions(groups, rewards, tokenizer, table)
    if own.samples_out is not None:
        write_samples(own.samples_out, found.samples)
    if found.failure is not None:
        failed = f"{found.record.failed} completions have no reward and do not pass"
        print(f"{failed}, one because of {found.failure}", file=sys.stderr)
    figures = asdict(found.record) | {"seconds": seconds}
    if as_json:
        report = {"model": name, "prompts": str(own.prompts), "seed": own.seed, **figures}
        print(json.dumps(_plain(report), indent=2))
    else:
        _show(name, own, figures)


def _read(path: Path, tokenizer: Any, own: PromptOptions) -> "list[PromptRecord]":
    from lowlat.checkpoint.hf_folder import open_checkpoint
    from lowlat.checkpoint.load import read_config
    from lowlat.train.policy.prompts import read_prompts

    assert own.prompts is not None and own.reward is not None
    context = read_config(open_checkpoint(path)).max_position_embeddings
    return read_prompts(
        own.prompts,
        tokenizer,
        longest=context - own.max_tokens,
        reward_funcs=[own.reward],
        key="--prompts",
        too_long="lower --max-tokens, or shorten the prompt",
    )


def _params(own: PromptOptions, num_prompts: int) -> list[SamplingParams]:
    """Of every prompt, with the random numbers of evaluations during a training."""
    from lowlat.train.policy.rollouts import EVALUATION, draw_seed

    return [
        SamplingParams(
            max_tokens=own.max_tokens,
            temperature=own.temperature,
            top_k=own.top_k,
            top_p=own.top_p,
            min_p=own.min_p,
            seed=draw_seed(own.seed, number, purpose=EVALUATION),
            n=own.samples,
        )
        for number in range(num_prompts)
    ]


def _sample(
    model: "Model", prompts: "list[PromptRecord]", params: list[SamplingParams]
) -> "list[list[Rollout]]":
    from lowlat.train.policy.rollouts import Rollout
    from lowlat.utils.progress import make_progress

    ids = [list(prompt.ids) for prompt in prompts]
    completions = model.generate_each(ids, params, progress=make_progress())
    return [
        [
            Rollout(
                prompt=prompt,
                completion=each.token_ids,
                logprobs=(),
                is_truncated=each.finish_reason == "length",
            )
            for each in group
        ]
        for prompt, group in zip(prompts, completions, strict=True)
    ]


def _show(name: str, own: PromptOptions, figures: dict[str, Any]) -> None:
    n, count = figures["num_generations"], figures["num_prompts"]
    tokens, seconds = figures["length"] * n * count, figures["seconds"]
    print(f"{name} on {own.prompts}, {count:,} prompts, {n} completions each")
    for k, value in figures["pass_at"].items():
        print(f"{f'pass@{k}':13}  {value:.4f}, standard error {figures['stderr'][k]:.4f}")
    print(f"score          {figures['score']:.4f}")
    print(f"length         {figures['length']:.1f} tokens, {figures['truncated']:.1%} truncated")
    print(
        f"sampled        {tokens:,.0f} tokens in {seconds:.1f} s ({tokens / seconds:,.0f} tokens/s)"
    )


def _plain(value: Any) -> Any:
    """`value` with null for numbers that are not finite."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return finite(value) if isinstance(value, float) else value
