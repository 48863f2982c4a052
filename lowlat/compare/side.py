"""The interface of everything that can be compared, and the process in which other people's code
runs.
"""

import json
import os
import signal
import subprocess
import sys
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lowlat.compare.trace import Choices, Trace, Window
from lowlat.config.model import ModelConfig
from lowlat.utils.errors import UserError

TIMEOUT = 3600.0
"""Seconds for loading and one window."""
SETTINGS = {"GGML_NO_BACKTRACE": "1"}
"""llama.cpp's last words are then why it ends, not where."""
BOOT = (
    "import runpy, sys; sys.path.append(sys.argv[1]); "
    "runpy.run_module(sys.argv[2], run_name='__main__')"
)
PACKAGES = Path(__file__).parents[2]
"""Where lowlat lies."""
LONGEST = 300
"""Characters of a fault that are passed on."""
REFUSED, FAILED = 2, 3
"""Exit codes of that process: told in a UserError's words, or by an exception nobody expected."""
REMEDY = "read fewer tokens at once with --window, or try another version of it"
"""What may help where a peer fails while it runs."""


class Side(ABC):
    """A model in one implementation, loaded."""

    label: str
    """What the user called it."""
    config: ModelConfig
    """What its checkpoint says, which need not be what the implementation does."""
    precision: str
    """fp64, fp32, bf16, fp16, fp8, int8 or int4: that of its weights."""
    cache_precision: str | None = None
    """That of its cache's rows; None: as they are computed."""
    unseen: str
    """Which parts cannot be observed and why; empty if all can."""
    takes_choices: bool
    """Whether it shows the experts that it takes, and others can be imposed on it."""

    @abstractmethod
    def trace(self, window: Window, choices: Choices | None = None) -> Trace:
        """Run `window` and record what can be seen; `choices` imposes the experts of the gates
        that it names.
        """


def told(error: BaseException) -> str:
    """An exception of other people's code in one line, its type first."""
    words = " ".join([f"{type(error).__name__}:", *str(error).split()])
    return words.removesuffix(":") if len(words) <= LONGEST else f"{words[: LONGEST - 3]}..."


def cannot_import(module: str, package: str, error: Exception, *, label: str) -> UserError:
    """Why a peer's `module` could not be imported: it is not there, or not as it should be."""
    if isinstance(error, ModuleNotFoundError) and error.name == module:
        return UserError(
            f"{label} needs the package {package}, which is not installed; "
            f"install it with: pip install {package}"
        )
    return UserError(
        f"{label}: {package} cannot be imported: {told(error)}; try another version of it"
    )


def run_apart(module: str, request: dict[str, object], *, label: str) -> None:
    """Run one of lowlat's modules in a process of its own, with `request` as JSON on stdin; it
    writes the file `request["out"]`.

    Raises UserError with the last line of its stderr where it fails or takes longer than TIMEOUT.
    """
    # -P: the folder the user is in may be a model's, whose files must not be imported.
    command = [sys.executable, "-P", "-c", BOOT, str(PACKAGES), module]
    try:
        done = subprocess.run(
            command,
            input=json.dumps(request),
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            env=os.environ | SETTINGS,
            timeout=TIMEOUT,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise UserError(f"{label}: not done within {TIMEOUT:.0f} s; read fewer tokens") from error
    if done.returncode == 0 and Path(str(request["out"])).is_file():
        return
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    said = [lines[-1][-LONGEST:]] if lines else []
    if done.returncode == REFUSED and said:
        raise UserError(f"{label}: {said[0]}")
    if done.returncode < 0:
        said.insert(0, f"killed by {signal.Signals(-done.returncode).name}")
    elif done.returncode != FAILED:
        said.insert(0, f"its process ended with code {done.returncode}")
    raise UserError(f"{label}: fails while it runs: {'; '.join(said)}; {REMEDY}")


def answer(work: Callable[[Any], None]) -> None:
    """What the module that `run_apart` runs does there: `work` on the request, and what went wrong
    in the last line of stderr, a UserError in its own words.
    """
    try:
        work(json.load(sys.stdin))
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(REFUSED)
    except Exception as error:
        traceback.print_exc()
        print(told(error), file=sys.stderr)
        sys.exit(FAILED)
