"""Write results.json: command, date and machine, then the figures."""

import json
import shlex
import sys
import time
from pathlib import Path
from typing import Any

from lowlat.bench.results import describe_machine


def heading() -> dict[str, Any]:
    """Command, date and machine of this process."""
    return {
        "command": shlex.join(["python", *sys.argv]),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "machine": describe_machine(),
    }


def write(found: dict[str, Any], folder: Path) -> None:
    """Write `found` to results.json in `folder`, which is created."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(found, indent=1) + "\n")
