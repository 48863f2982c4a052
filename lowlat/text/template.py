"""Chat template rendering: untrusted Jinja programs of a model's files, in a sandboxed process.

A template may loop forever, or allocate any amount of memory inside one operation, which no check
in this process could interrupt. So it runs in its own process (`text.template_worker`), inside
Jinja's immutable sandbox, with limits on memory and output; after `seconds` that process is killed.
One process serves all renderings of a template.
"""

import json
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lowlat.utils.errors import UserError
from lowlat.utils.worker import LineWorker

SECONDS = 10.0
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
        """source: the template's text. origin: its file or folder, for error messages."""
        self._source = source
        self._origin = origin
        self._seconds = seconds
        self._output_characters = output_characters
        self._lock = threading.Lock()
        self._worker: LineWorker | None = None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """The prompt for `messages`; `variables` are further JSON values for the template.

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
        except (TypeError, ValueError, RecursionError) as error:
            raise UserError(
                f"messages and template variables must be JSON values: {error}"
            ) from error
        return self._answer(line)

    def _answer(self, line: str) -> str:
        with self._lock:
            if self._worker is None or not self._worker.is_alive():
                self._worker = LineWorker(WORKER)
            answer = self._worker.ask(line, self._seconds)
        if answer is None:
            raise self._error(f"needed more than {self._seconds:g} s or crashed")
        reply = json.loads(answer)
        if "error" in reply:
            raise self._error(f"failed: {' '.join(reply['error'].split())[:500]}")
        return reply["text"]

    def _error(self, what: str) -> UserError:
        return UserError(
            f"{self._origin}: chat_template {what}; check the messages or the template"
        )
