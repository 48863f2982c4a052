"""`lowlat chat`: talk to a model, or ask one question with --once and see what it cost.

Owns the options; what happens at the terminal is `cli.terminal`'s.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lowlat.cli import options
from lowlat.cli.options import SAMPLING
from lowlat.engine.params import SamplingOptions, make_params
from lowlat.utils.errors import UserError

if TYPE_CHECKING:
    from lowlat.cli.chat_backend import ChatBackend

_SERVER_PANEL = "Server"
MAX_TOKENS = 512
TEMPERATURE = 0.4


def chat(
    model: options.Model = options.DEFAULT_MODEL,
    url: Annotated[
        str | None,
        typer.Option(
            help="Talk to the server at this address; MODEL is then one of its models.",
            rich_help_panel=_SERVER_PANEL,
        ),
    ] = None,
    api_key_file: Annotated[
        Path | None,
        typer.Option(
            help="File with the server's API key; the default is LOWLAT_API_KEY.",
            rich_help_panel=_SERVER_PANEL,
        ),
    ] = None,
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
    from lowlat.cli.chat_terminal import answer_once, talk
    from lowlat.cli.conversation import Conversation

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
    if url is None:
        _refuse({"--api-key-file": api_key_file is not None}, "belongs to --url")
        backend = _local(model, dtype=dtype, cache=cache, device=device, threads=threads)
    else:
        chosen = {
            "--dtype": dtype != options.DEFAULT_DTYPE,
            "--cache": cache != options.DEFAULT_CACHE,
            "--device": device != options.DEFAULT_DEVICE,
            "--threads": threads is not None,
        }
        _refuse(chosen, "is the server's to choose")
        backend = _remote(url, None if model == options.DEFAULT_MODEL else model, api_key_file)
    conversation = Conversation(backend, sampling, max_tokens=max_tokens, system=system)
    if once is None:
        talk(conversation)
    else:
        answer_once(conversation, once)


def _refuse(given: dict[str, bool], why: str) -> None:
    """Raises UserError where an option was given that would do nothing."""
    for name, is_given in given.items():
        if is_given:
            raise UserError(f"{name} {why}; leave it out")


def _local(
    model: str, *, dtype: str, cache: str, device: str, threads: int | None
) -> "ChatBackend":
    from lowlat.cli.chat_backend import LocalChatBackend
    from lowlat.cli.inputs import load_model

    return LocalChatBackend(
        load_model(model, dtype=dtype, cache=cache, device=device, threads=threads)
    )


def _remote(url: str, model: str | None, api_key_file: Path | None) -> "ChatBackend":
    from lowlat.cli.chat_client import ChatClient, read_key

    return ChatClient(url, name=model, api_key=read_key(api_key_file))
