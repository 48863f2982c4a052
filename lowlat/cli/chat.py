"""`lowlat chat`: chat with a model in the terminal, or answer one question with --once.

This module has the options; `cli.chat_terminal` runs the conversation.
"""

import json
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lowlat.cli import options
from lowlat.cli.options import SAMPLING
from lowlat.cli.subverbs import with_subverbs
from lowlat.generate.params import SamplingOptions, make_params
from lowlat.utils.errors import UserError

if TYPE_CHECKING:
    from lowlat.cli.chat_backend import ChatBackend
    from lowlat.cli.chat_session import ChatSession

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
    session: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Keep the conversation and its KV cache on disk under this name, and resume it.",
        ),
    ] = None,
    server: Annotated[ServerOptions, "Server"],
    sampling: Annotated[ChatSampling, "Sampling"],
    machine: options.Machine,
) -> None:
    """Chat with a model. Questions can also come from a pipe, one per line."""
    from lowlat.cli.chat_session import open_session

    settings: SamplingOptions = {**asdict(sampling)}  # pyright: ignore[reportAssignmentType]
    # Checked before a model is downloaded or loaded.
    make_params(settings)
    _check_server(server, machine)
    with nullcontext() if session is None else open_session(session) as stored:
        if stored is not None:
            model, system = _resume(stored, model, system)
        if server.url is None:
            backend = _local(model, machine, None if stored is None else stored.pages)
        else:
            backend = _remote(server, None if model == options.DEFAULT_MODEL else model)
        _run(backend, settings, once, model, system, stored)


def _run(
    backend: "ChatBackend",
    settings: SamplingOptions,
    once: str | None,
    model: str,
    system: str | None,
    stored: "ChatSession | None",
) -> None:
    """The conversation itself; `stored` is where it is kept."""
    from lowlat.cli.chat_terminal import Conversation, answer_once, talk

    if stored is None:
        conversation = Conversation(backend, settings, system)
    else:
        if stored.turns:
            message = f"resuming session '{stored.name}', {len(stored.turns)} messages"
            typer.echo(message, err=True)
        conversation = Conversation(
            backend,
            settings,
            system,
            stored.turns,
            save=lambda talked: stored.save(model, talked.system, talked.turns),
        )
    if once is None:
        talk(conversation)
    else:
        answer_once(conversation, once)


def _resume(stored: "ChatSession", model: str, system: str | None) -> tuple[str, str | None]:
    """Model and system message of a session. Raises UserError for another system message than that
    of its conversation."""
    if stored.model is not None and model == options.DEFAULT_MODEL:
        model = stored.model
    if system is None:
        system = stored.system
    elif stored.turns and system != stored.system:
        raise UserError(
            f"--system differs from the system message of session '{stored.name}'; leave it out, "
            "or choose another session"
        )
    return model, system


def sessions(as_json: options.Json = False) -> None:
    """List the sessions: names, models, messages, sizes, last use."""
    from rich.console import Console

    from lowlat.cli.chat_session import list_sessions
    from lowlat.cli.tables import number_table

    found = list_sessions()
    if as_json:
        rows = [
            {
                "name": session.name,
                "model": session.model,
                "messages": len(session.turns),
                "bytes": session.num_bytes,
                "used_at": session.used_at,
            }
            for session in found
        ]
        print(json.dumps({"sessions": rows}, indent=2))
        return
    if not found:
        print("no sessions; start one with: lowlat chat --session NAME")
        return
    table = number_table("session", "messages", "MB", "model", "last used", notes=False)
    for session in found:
        used = datetime.fromtimestamp(session.used_at).strftime("%Y-%m-%d %H:%M")
        size = f"{session.num_bytes / 1e6:,.1f}"
        table.add_row(session.name, f"{len(session.turns)}", size, session.model or "-", used)
    # names are arguments of other commands, so lines are never cut
    width = max(len(session.name) + len(session.model or "") for session in found) + 60
    Console(width=width, highlight=False, markup=False).print(table)


def delete(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the session.")],
) -> None:
    """Delete a session: the conversation and its KV cache."""
    from lowlat.cli.chat_session import delete_session

    print(f"deleted session '{name}', {delete_session(name) / 1e6:,.1f} MB")


def _check_server(server: ServerOptions, machine: options.MachineOptions) -> None:
    """Raises UserError for options that have no effect with --url, or only with it."""
    if server.url is None:
        _reject({"--api-key-file": server.api_key_file is not None}, "needs --url")
        return
    _reject(
        {
            "--dtype": machine.dtype != options.DEFAULT_DTYPE,
            "--cache": machine.cache != options.DEFAULT_CACHE,
            "--device": machine.device != options.DEFAULT_DEVICE,
            "--threads": machine.threads is not None,
        },
        "is set on the server",
    )


def _reject(given: dict[str, bool], why: str) -> None:
    """Raises UserError for a given option that has no effect."""
    for name, is_given in given.items():
        if is_given:
            raise UserError(f"{name} {why}; leave it out")


def _local(model: str, machine: options.MachineOptions, pages: Path | None) -> "ChatBackend":
    from lowlat.cli.chat_backend import LocalChatBackend
    from lowlat.cli.inputs import load_model

    disk = options.disk_cache(pages, None)
    return LocalChatBackend(load_model(model, **asdict(machine), **disk))


def _remote(server: ServerOptions, model: str | None) -> "ChatBackend":
    from lowlat.cli.chat_client import ChatClient, read_key

    assert server.url is not None
    return ChatClient(server.url, name=model, api_key=read_key(server.api_key_file))


app = with_subverbs(
    chat,
    {"sessions": sessions, "delete": delete},
    epilog="Subcommands: lowlat chat sessions, lowlat chat delete NAME.",
)
