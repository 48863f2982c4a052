"""Runs a command in a terminal of its own and draws what it printed as an SVG picture.

    python docs/record_terminal.py docs/demo.svg make demo

The picture in the README is made this way. Unix only (it needs a pseudo-terminal).
"""

import fcntl
import io
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

from rich.console import Console
from rich.text import Text

COLUMNS, ROWS = 96, 40


def run_in_terminal(command: list[str]) -> str:
    """Everything `command` prints when it believes it talks to a colour terminal."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": str(COLUMNS)}
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    output = b""
    while True:
        try:
            block = os.read(ours, 65536)
        except OSError:  # Linux reports the closed terminal as an input/output error
            break
        if not block:
            break
        output += block
    os.close(ours)
    if process.wait() != 0:
        sys.exit(
            f"{' '.join(command)} ended with exit code {process.returncode}:\n{output.decode()}"
        )
    return output.decode("utf-8")


def final_lines(output: str) -> str:
    """The text as it stands at the end: of a line redrawn with carriage returns, its last state."""
    lines = output.replace("\r\n", "\n").split("\n")
    return "\n".join(line.rsplit("\r", 1)[-1] for line in lines).rstrip()


def main(destination: str, command: list[str]) -> None:
    console = Console(
        record=True,
        width=COLUMNS,
        file=io.StringIO(),
        force_terminal=True,
        color_system="truecolor",
    )
    console.print(Text.assemble(("$ ", "bold green"), (" ".join(command), "bold")))
    console.print(Text.from_ansi(final_lines(run_in_terminal(command))))
    svg = console.export_svg(title="lowlat")
    # The picture stands alone: no web fonts, the viewer's monospace font takes their place.
    svg = re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL)
    Path(destination).write_text(svg, encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    main(sys.argv[1], sys.argv[2:])
