"""`lowlat chat`: chat with a model in the terminal, or answer one question with --once.

This module has the options; `cli.chat_terminal` runs the conversation.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lowlat.cli import options
from lowlat.cli.options import SAMPLING
from lowlat.generate.params import SamplingOptions, make_params
from lowlat.utils.errors import UserError

if TYPE_CHECKING:
    from lowlat.cli.chat_backend import ChatBackend

MAX_TOKENS = 512
TEMPERATURE = 0.4


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerOptions:
    """A server to chat with, instead of a local model."""

    url: Annotated[
        str | None,
        typer.Option(help="Chat with a server at this address; MODEL is then one of its models."),
    ] = None
    api_key_file: Annotated[
        Path | None,
        typer.Option(help="File with the server's API key; without it LOWLAT_API_KEY is used."),
    ] = None


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatSampling:
    max_tokens: Annotated[int, typer.Option(help="Maximum number of tokens per answer.")] = (
        MAX_TOKENS
    )
    temperature: options.Temperature = TEMPERATURE
    top_k: options.TopK = SAMPLING.top_k
    top_p: options.TopP = SAMPLING.top_p
    min_p: options.MinP = SAMPLING.min_p
    repetition_penalty: options.RepetitionPenalty = SAMPLING.repetition_penalty
    seed: options.Seed = SAMPLING.seed


@options.with_option_groups
def chat(
    *,
    model: options.Model = options.DEFAULT_MODEL,
    once: Annotated[
        str | None,
        typer.Option(
            metavar="QUESTION", help="Answer one question, print a short report and exit."
        ),
    ] = None,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    server: Annotated[ServerOptions, "Server"],
    sampling: Annotated[ChatSampling, "Sampling"],
    machine: options.Machine,
) -> None:
    """Chat with a model. Questions can also come from a pipe, one per line."""
    from lowlat.cli.chat_terminal import Conversation, answer_once, talk

    settings: SamplingOptions = {**asdict(sampling)}  # pyright: ignore[reportAssignmentType]
    # Checked before a model is downloaded or loaded.
    make_params(settings)
    if server.url is None:
        _reject({"--api-key-file": server.api_key_file is not None}, "needs --url")
        backend = _local(model, machine)
    else:
        _reject(
            {
                "--dtype": machine.dtype != options.DEFAULT_DTYPE,
                "--cache": machine.cache != options.DEFAULT_CACHE,
                "--device": machine.device != options.DEFAULT_DEVICE,
                "--threads": machine.threads is not None,
            },
            "is set on the server",
        )
        backend = _remote(server, None if model == options.DEFAULT_MODEL else model)
    conversation = Conversation(backend, settings, system)
    if once is None:
        talk(conversation)
    else:
        answer_once(conversation, once)


def _reject(given: dict[str, bool], why: str) -> None:
    """Raises UserError for a given option that has no effect."""
    for name, is_given in given.items():
        if is_given:
            raise UserError(f"{name} {why}; leave it out")


def _local(model: str, machine: options.MachineOptions) -> "ChatBackend":
    from lowlat.cli.chat_backend import LocalChatBackend
    from lowlat.cli.inputs import load_model

    return LocalChatBackend(load_model(model, **asdict(machine)))


def _remote(server: ServerOptions, model: str | None) -> "ChatBackend":
    from lowlat.cli.chat_client import ChatClient, read_key

    assert server.url is not None
    return ChatClient(server.url, name=model, api_key=read_key(server.api_key_file))
