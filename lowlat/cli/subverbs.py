"""Command that is also a group: `lowlat train RECIPE` and its subcommand `lowlat train report RUN`.

If the first word names a subcommand, the subcommand runs; otherwise it is an argument.
"""

from collections.abc import Callable
from typing import Any

import typer
from typer.core import TyperGroup

_OWN = "(itself)"
"""Name of the command itself in its group; unlikely as a file name."""


class _VerbGroup(TyperGroup):
    """Dispatches to a subcommand if the first word names one, else to the command itself."""

    def make_context(
        self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any
    ) -> Any:
        own = self.commands[_OWN]
        if args and args[0] != _OWN and args[0] in self.commands:
            return super().make_context(info_name, args, parent, **extra)
        return own.make_context(info_name, args, parent, **extra)


def with_subverbs(
    verb: Callable[..., None], subverbs: dict[str, Callable[..., None]], *, epilog: str
) -> typer.Typer:
    """An app that runs `verb`, or `subverbs[NAME]` if the first word is NAME.

    To pass a file with the name of a subcommand, write ./NAME.

    Args:
        verb: the command; its help is the help of the app.
        subverbs: subcommands by name.
        epilog: printed below the help of `verb`; it lists the subcommands.
    """
    app = typer.Typer(cls=_VerbGroup, help=verb.__doc__)
    app.command(_OWN, hidden=True, epilog=epilog)(verb)
    for name, function in subverbs.items():
        app.command(name)(function)
    return app
