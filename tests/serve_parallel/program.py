"""Runs cases in one process of a torchrun launch: program.py FOLDER LAYOUT CASE...

Process 0 writes FOLDER/CASE/LAYOUT.json with the results of each case, or the error.
"""

import json
import sys
from pathlib import Path
from typing import Any

import lowlat
from lowlat.config.serving_layout import ServingLayout
from lowlat.engine.parallel_runner import ParallelRunner
from lowlat.ops import native
from tests.serve_parallel.cases import CASES, outcome, traffic


def main() -> None:
    folder, layout, *names = sys.argv[1:]
    native.use_threads(1)
    stages = ServingLayout.parse(layout).pipeline
    for name in names:
        own = Path(folder, name)
        try:
            model = lowlat.load(**CASES[name].arguments(own, stages), parallel=layout)
        except SystemExit as end:
            assert end.code == 0  # this process has followed process 0
            continue
        found: dict[str, Any] = outcome(model, CASES[name])
        found["parameters"] = sum(each.numel() for each in model.transformer.parameters())
        if isinstance(model.runner, ParallelRunner):
            found["traffic"] = traffic(model.runner, model)
        model.free()
        (own / f"{layout}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
