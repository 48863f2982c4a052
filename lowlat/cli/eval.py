"""`lowlat eval`: perplexity and bits per byte of a model on a text file, or pass@k on prompts."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lowlat.cli import options
from lowlat.cli.eval_prompts import PromptOptions, evaluate_prompts
from lowlat.utils.errors import UserError
from lowlat.utils.strict_json import finite

if TYPE_CHECKING:
    from lowlat.engine.scoring import Score
    from lowlat.generate.model import Model


@options.with_option_groups
def evaluate(
    *,
    text: Annotated[
        Path | None, typer.Option("--text", metavar="FILE", help="UTF-8 text file.")
    ] = None,
    model: options.Model = options.DEFAULT_MODEL,
    window: Annotated[
        int | None,
        typer.Option(
            help="Tokens per window, without overlap or shared context. By default 1024, or the "
            "model's context if that is shorter."
        ),
    ] = None,
    expert_loads: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Also write the token count of every expert, for lowlat plan serve.",
        ),
    ] = None,
    as_json: options.Json = False,
    parallel: options.Parallel = None,
    held_out: Annotated[PromptOptions, "pass@k"],
    machine: options.Machine,
) -> None:
    """Perplexity and bits per byte of a text, or pass@k on prompts.

    Each token is predicted from the previous ones in its window; the first is not counted.

    pass@k: probability that one of k sampled completions passes (unbiased estimate).
    """
    from lowlat.cli.inputs import load_model, read_text_file
    from lowlat.cli.launch import one_process_per_node
    from lowlat.utils.process_group import is_follower, quiet_followers
    from lowlat.utils.progress import make_progress

    parallel = one_process_per_node(parallel)
    with quiet_followers():
        _check(text, held_out, window, expert_loads)
    if text is None:
        return evaluate_prompts(model, held_out, as_json, parallel, machine)
    if parallel is not None and expert_loads is not None:
        with quiet_followers():
            raise UserError("--expert-loads counts in one process; leave out --parallel")
    content = "" if is_follower() else read_text_file(text)  # process 0 has the input
    loaded = load_model(model, parallel=parallel, **asdict(machine))
    started = time.perf_counter()
    with counted_loads(loaded, expert_loads):
        score = loaded.perplexity(content, window=window, progress=make_progress())
    seconds = time.perf_counter() - started
    if as_json:
        report = {"model": loaded.name, "text": str(text), **as_dict(score), "seconds": seconds}
        return print(json.dumps(report, indent=2))
    print(f"{loaded.name} on {text}, windows of {score.window} tokens")
    print(f"perplexity     {score.perplexity:.4f}")
    print(f"bits per byte  {score.bits_per_byte:.4f}")
    print(
        f"predicted      {score.tokens:,} tokens, {score.bytes:,} bytes "
        f"in {seconds:.1f} s ({score.tokens / seconds:,.0f} tokens/s)"
    )


def _check(
    text: Path | None, held_out: PromptOptions, window: int | None, expert_loads: Path | None
) -> None:
    """Raises UserError unless the options are those of a text or those of prompts."""
    if (text is None) == (held_out.prompts is None):
        raise UserError("give either --text FILE, for perplexity, or --prompts FILE, for pass@k")
    if text is not None and held_out != PromptOptions():
        raise UserError("--text measures perplexity; leave out the options of pass@k")
    if text is None and (window is not None or expert_loads is not None):
        raise UserError("--window and --expert-loads need --text; leave them out")


@contextmanager
def counted_loads(model: "Model", file: Path | None) -> Iterator[None]:
    """Count the tokens of every expert within this context and write them to `file`, if given.

    Raises UserError for a model without experts.
    """
    from lowlat.model.expert_loads import count_expert_loads
    from lowlat.utils.atomic_files import replace_file

    if file is None:
        yield
        return
    if model.config.moe is None:
        raise UserError(f"--expert-loads {file}: {model.name} has no routed experts")
    model.runner.count_expert_loads()
    with count_expert_loads(model.transformer) as loads:
        yield
    layers = {str(layer): counts.tolist() for layer, counts in loads.items()}
    if model.runner.is_batch_invariant:
        # counted by the kernels
        layers = {str(layer): list(counts) for layer, counts in model.runner.expert_loads().items()}
    text = json.dumps({"model": model.name, "loads": layers}) + "\n"
    try:
        replace_file(file, text.encode())
    except OSError as error:
        raise UserError(
            f"--expert-loads {file}: cannot be written ({error.strerror}); give another file"
        ) from error


def as_dict(score: "Score") -> dict[str, Any]:
    """The numbers of --json; null for one that is not finite."""
    return {
        "window": score.window,
        "tokens": score.tokens,
        "bytes": score.bytes,
        "perplexity": finite(score.perplexity),
        "bits_per_byte": finite(score.bits_per_byte),
    }
