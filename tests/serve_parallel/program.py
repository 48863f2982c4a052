"""Runs cases in one process of a torchrun launch: program.py FOLDER LAYOUT CASE...

Process 0 writes FOLDER/CASE/LAYOUT.json with the results of each case, or the error.
"""

import json
import sys
from pathlib import Path
from typing import Any

import lowlat
from lowlat.config.serving_layout import EPLBConfig, ServingLayout
from lowlat.engine.parallel_runner import ParallelRunner
from lowlat.generate.model import Model
from lowlat.ops import native
from tests.serve_parallel.cases import CASES, outcome, stored_tokens, traffic


def main() -> None:
    folder, name_of_run, *names = sys.argv[1:]
    native.use_threads(1)
    layout, _, balanced = name_of_run.partition("+")
    sizes = ServingLayout.parse(layout)
    eplb = EPLBConfig(num_redundant_experts=2, step_interval=3) if balanced else None
    for name in names:
        case, own = CASES[name], Path(folder, name)
        arguments = case.arguments(own, sizes) | {"parallel": layout, "eplb": eplb}
        if (model := led(arguments)) is None:
            if case.is_stored:
                led(arguments)
            continue
        found: dict[str, Any] = outcome(model, case)
        found["parameters"] = sum(each.numel() for each in model.transformer.parameters())
        if isinstance(model.runner, ParallelRunner):
            found["traffic"] = traffic(model.runner, model)
            if model.runner.balancer is not None:
                found["placements"] = model.runner.balancer.num_placements
                found["moved"] = model.runner.balancer.num_moved
                found["loads"] = model.runner.expert_loads()
        if case.is_stored:
            found["stored"] = [stored_tokens(model)]
            model.close()
            model.free()
            model = led(arguments)
            assert model is not None
            found["stored"].append(stored_tokens(model))
        model.free()
        (own / f"{name_of_run}.json").write_text(json.dumps(found))


def led(arguments: dict[str, Any]) -> Model | None:
    """The model in process 0; None in the others, when process 0 has freed it."""
    try:
        return lowlat.load(**arguments)
    except SystemExit as end:
        assert end.code == 0
        return None


if __name__ == "__main__":
    main()
