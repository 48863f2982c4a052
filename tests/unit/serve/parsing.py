"""Answers that arrive in pieces, parsed."""

from collections.abc import Iterable

from lowlat.serve.chat.output_parser import OutputParser
from lowlat.serve.tool_parsers.state import Part, append_part


def joined_parts(parser: OutputParser, pieces: Iterable[str]) -> list[Part]:
    """The parts of an answer that arrives as `pieces`, neighbours of one kind joined."""
    parts: list[Part] = []
    for piece in pieces:
        for part in parser.push(piece):
            append_part(parts, part)
    for part in parser.finish():
        append_part(parts, part)
    return parts
