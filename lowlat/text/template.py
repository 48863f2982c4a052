"""Chat templates: Jinja programs out of a model's files, turned into prompts without trusting them.

A template may loop for ever or ask for any amount of memory inside one operation, where no check in
this process could interrupt it. So it runs in a process of its own (template_worker.py), inside
Jinja's immutable sandbox, with a limit on memory and output; after `seconds` that process is
killed. One process serves all renderings of a template.
"""

import json
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lowlat.utils.errors import UserError

SECONDS = 10.0
START_SECONDS = 60.0
OUTPUT_CHARACTERS = 1 << 24
WORKER = Path(__file__).with_name("template_worker.py")


class ChatTemplate:
    """A template and the process that renders it; safe to call from several threads."""

    def __init__(
        self,
        source: str,
        origin: str,
        *,
        seconds: float = SECONDS,
        output_characters: int = OUTPUT_CHARACTERS,
    ) -> None:
        """`source` is the template's text, `origin` where it came from, for error messages."""
        self._source = source
        self._origin = origin
        self._seconds = seconds
        self._output_characters = output_characters
        self._lock = threading.Lock()
        self._worker: _Worker | None = None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """The prompt for `messages`; `variables` are what else the template may see, as JSON.

        Raises UserError naming chat_template when the template refuses the messages, fails or
        exceeds a limit.
        """
        known = {"tools": None, "documents": None, **variables}
        known |= {"messages": list(messages), "add_generation_prompt": add_generation_prompt}
        request = {
            "template": self._source,
            "variables": known,
            "limit": self._output_characters,
        }
        try:
            line = json.dumps(request)
        except (TypeError, ValueError) as error:
            raise UserError(
                f"messages and template variables must be JSON values: {error}"
            ) from error
        return self._answer(line)

    def _answer(self, line: str) -> str:
        with self._lock:
            if self._worker is None or not self._worker.alive():
                self._worker = _Worker()
            reply = self._worker.ask(line, self._seconds)
        if reply is None:
            raise self._fault(f"needed more than {self._seconds:g} s or crashed")
        if "error" in reply:
            raise self._fault(f"failed: {' '.join(reply['error'].split())[:500]}")
        return reply["text"]

    def _fault(self, what: str) -> UserError:
        return UserError(
            f"{self._origin}: chat_template {what}; check the messages or the template"
        )


class _Worker:
    """A running template_worker.py; ends with this object or with the program."""

    def __init__(self) -> None:
        # -P keeps the folder of the script, whose modules have common names, out of the worker's
        # imports.
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            encoding="ascii",
        )
        self._owner = os.getpid()
        self._killed = False
        weakref.finalize(self, _end, self._process, self._owner)
        self._exchange("", START_SECONDS)  # its first line says that it is ready

    def alive(self) -> bool:
        """Whether it can be asked; a forked child must not use its parent's."""
        usable = self._owner == os.getpid() and not self._killed
        return usable and self._process.poll() is None

    def _kill(self) -> None:
        self._killed = True
        self._process.kill()

    def ask(self, line: str, seconds: float) -> dict[str, str] | None:
        """The answer to the request `line`, or None when the process ended or was killed first."""
        reply = self._exchange(line + "\n", seconds)
        # A kill in the middle of a long answer leaves a piece of a line.
        return json.loads(reply) if reply.endswith("\n") else None

    def _exchange(self, sent: str, seconds: float) -> str:
        """The line that comes back after `sent`; "" or a part of it when the process ends first."""
        assert self._process.stdin is not None and self._process.stdout is not None
        timer = threading.Timer(seconds, self._kill)
        timer.start()
        try:
            self._process.stdin.write(sent)
            self._process.stdin.flush()
            return self._process.stdout.readline()
        except BrokenPipeError:
            return ""
        finally:
            timer.cancel()
            timer.join()


def _end(process: subprocess.Popen, owner: int) -> None:
    if owner != os.getpid():
        return
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        assert pipe is not None
        try:
            pipe.close()
        except BrokenPipeError:  # what a killed process had not read yet
            pass
