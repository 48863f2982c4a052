"""What a run leaves: results.json, with command, date and machine before the figures."""

import json
import shlex
import sys
import time
from pathlib import Path
from typing import Any

from lowlat.bench import environment


def heading() -> dict[str, Any]:
    """How and where this process was run."""
    return {
        "command": shlex.join(["python", *sys.argv]),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "machine": environment.describe(),
    }


def write(found: dict[str, Any], folder: Path) -> None:
    """`found` as results.json in `folder`, which is made where it is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(found, indent=1) + "\n")
