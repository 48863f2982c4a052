"""`lowlat chat`: talk to a model, or ask one question with --once and see what it cost.

Owns the options; what happens at the terminal is `cli.terminal`'s.
"""

from typing import Annotated

import typer

from lowlat.cli import options
from lowlat.cli.options import SAMPLING
from lowlat.engine.params import SamplingOptions, make_params

MAX_TOKENS = 512
TEMPERATURE = 0.4


def chat(
    model: options.Model = options.DEFAULT_MODEL,
    once: Annotated[
        str | None,
        typer.Option(
            metavar="QUESTION",
            help="Answer this, print a short report and leave.",
            show_default=False,
        ),
    ] = None,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    max_tokens: Annotated[
        int, typer.Option(help="Most tokens per answer.", rich_help_panel="Sampling")
    ] = MAX_TOKENS,
    temperature: options.Temperature = TEMPERATURE,
    top_k: options.TopK = SAMPLING.top_k,
    top_p: options.TopP = SAMPLING.top_p,
    min_p: options.MinP = SAMPLING.min_p,
    repetition_penalty: options.RepetitionPenalty = SAMPLING.repetition_penalty,
    seed: options.Seed = SAMPLING.seed,
    device: options.Device = options.DEFAULT_DEVICE,
    dtype: options.Dtype = options.DEFAULT_DTYPE,
    cache: options.Cache = options.DEFAULT_CACHE,
    threads: options.Threads = None,
) -> None:
    """Talk to a model. Lines may also come from a pipe, one question each."""
    from lowlat.cli.conversation import Conversation
    from lowlat.cli.inputs import load_model
    from lowlat.cli.terminal import answer_once, talk

    sampling: SamplingOptions = {
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "seed": seed,
    }
    # Checked before a model is fetched or loaded.
    make_params(sampling)
    loaded = load_model(model, dtype=dtype, cache=cache, device=device, threads=threads)
    conversation = Conversation(loaded, sampling, max_tokens=max_tokens, system=system)
    if once is None:
        talk(conversation)
    else:
        answer_once(conversation, once)
