"""`lowlat generate`: one prompt, one completion (or n), as text or JSON."""

from typing import Annotated

import typer

from lowlat.cli import options
from lowlat.cli.options import SAMPLING
from lowlat.engine.params import SamplingOptions, SamplingParams, make_params
from lowlat.utils.errors import UserError

STDIN = "-"


def generate(
    prompt: Annotated[
        str,
        typer.Option(
            "-p", "--prompt", help="The prompt; '-' reads standard input.", show_default=False
        ),
    ],
    model: options.Model = options.DEFAULT_MODEL,
    raw: Annotated[
        bool,
        typer.Option(
            "--raw", help="Continue the prompt as it is, without the model's chat template."
        ),
    ] = False,
    system: Annotated[
        str | None, typer.Option(help="System message for the chat template.")
    ] = None,
    max_tokens: options.MaxTokens = SAMPLING.max_tokens,
    temperature: options.Temperature = SAMPLING.temperature,
    top_k: options.TopK = SAMPLING.top_k,
    top_p: options.TopP = SAMPLING.top_p,
    min_p: options.MinP = SAMPLING.min_p,
    repetition_penalty: options.RepetitionPenalty = SAMPLING.repetition_penalty,
    presence_penalty: options.PresencePenalty = SAMPLING.presence_penalty,
    frequency_penalty: options.FrequencyPenalty = SAMPLING.frequency_penalty,
    logit_bias: options.LogitBias = None,
    seed: options.Seed = SAMPLING.seed,
    logprobs: options.Logprobs = SAMPLING.logprobs,
    n: options.N = SAMPLING.n,
    stop: options.Stop = None,
    ignore_eos: options.IgnoreEos = SAMPLING.ignore_eos,
    device: options.Device = options.DEFAULT_DEVICE,
    dtype: options.Dtype = options.DEFAULT_DTYPE,
    cache: options.Cache = options.DEFAULT_CACHE,
    threads: options.Threads = None,
    as_json: options.Json = False,
) -> None:
    """Complete one prompt.

    A model with a chat template answers the prompt as a user's message; one without continues it.
    """
    from lowlat.cli.chat_terminal import printable
    from lowlat.cli.generate_output import as_prompt, print_json, print_numbered
    from lowlat.cli.inputs import load_model, read_stdin

    sampling: SamplingOptions = {
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "presence_penalty": presence_penalty,
        "frequency_penalty": frequency_penalty,
        "logit_bias": options.parse_logit_bias(logit_bias),
        "seed": seed,
        "logprobs": logprobs,
        "n": n,
        "stop": stop or [],
        "ignore_eos": ignore_eos,
    }
    # Checked before a model is fetched or loaded.
    params = make_params(sampling)
    _check(params, raw=raw, system=system, as_json=as_json)
    text = read_stdin() if prompt == STDIN else prompt
    loaded = load_model(model, dtype=dtype, cache=cache, device=device, threads=threads)
    start = as_prompt(loaded, text, raw=raw, system=system)
    if as_json:
        print_json(loaded, loaded.generate_many([start], **sampling)[0])
    elif n > 1:
        print_numbered(loaded.generate_many([start], **sampling)[0])
    else:
        for piece in loaded.generate(start, stream=True, **sampling):
            print(printable(piece), end="", flush=True)
        print()


def _check(params: SamplingParams, *, raw: bool, system: str | None, as_json: bool) -> None:
    if raw and system is not None:
        raise UserError("--raw uses no chat template, so leave --system out (or --raw)")
    if params.logprobs is not None and not as_json:
        raise UserError("--logprobs is shown in JSON only; add --json")
