"""A verb that takes arguments of its own and also has verbs below it: `lowlat train RECIPE` and
`lowlat train report RUN`.

Owns how the two are told apart: the first word is a verb below, or else an argument of the verb.
"""

from collections.abc import Callable
from typing import Any

import typer
from typer.core import TyperGroup

_OWN = "(itself)"
"""The verb itself among the commands of its group: nothing that anyone would name a file."""


class _VerbGroup(TyperGroup):
    """Hands everything to the verb itself unless the first word is a verb below it."""

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
    """An app in which `verb` is called as usual, and as `NAME ...` what `subverbs` has for NAME.

    A file of the same name as a subverb is written ./NAME.

    Args:
        verb: called where no subverb is; its help is the help of both.
        subverbs: functions by name.
        epilog: stands under the help of `verb` and tells of the subverbs.
    """
    app = typer.Typer(cls=_VerbGroup, help=verb.__doc__)
    app.command(_OWN, hidden=True, epilog=epilog)(verb)
    for name, function in subverbs.items():
        app.command(name)(function)
    return app
