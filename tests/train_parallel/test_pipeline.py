"""Every pipeline trains as one process does: losses, gradients, weights, with MTP, routing biases
and the sequence-wise loss, tied and untied embeddings.

LOWLAT_ALL_LAYOUTS=1 runs all of them over 20 steps and prints how closely they agree.
"""

import json
import os
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.train_parallel.layouts import difference
from tests.train_parallel.pipelines import ALL, LOSSES, NORM, NORMS, SHORT, TENSORS, Pipeline
from tests.train_parallel.processes import run
from tests.train_parallel.training import trained_alone

CASES = ALL if os.environ.get("LOWLAT_ALL_LAYOUTS") else SHORT


@pytest.mark.slow
@pytest.mark.parametrize("processes", sorted({case.processes for case in CASES}))
def test_a_pipeline_trains_as_one_process(processes: int, tmp_path: Path) -> None:
    cases = [case for case in CASES if case.processes == processes]
    alone = trained_alone(cases)
    specs = tmp_path / "specs.json"
    specs.write_text(json.dumps([case.spec for case in cases]))
    program = ["-m", "tests.train_parallel.training", str(specs), str(tmp_path)]
    run(processes, program, timeout=60 + 120 * len(cases))
    failed = []
    for index, case in enumerate(cases):
        together = load_file(tmp_path / f"{index}.safetensors")
        expected = alone[json.dumps(case.training)]
        error = (together["losses"] - expected["losses"]).abs()
        error /= expected["losses"].abs().clamp(min=1e-3)
        norms, losses = error[:, NORM].max().item(), error[:, :NORM].max().item()
        found = difference(expected, together)
        line = f"{case}: losses {losses:.1e}, gradient norms {norms:.1e}, gradients "
        line += f"{found.gradients:.1e}, weights {found.weights:.1e}"
        print(line)
        is_close = losses <= LOSSES and norms <= NORMS and not error[:, NORM + 1 :].any()
        if not is_close or max(found.gradients, found.weights) > TENSORS:
            failed.append(f"{line} {found.where}")
    assert not failed, "\n".join(failed)


def test_cases_are_distinguished() -> None:
    """A case that is listed twice is one that was meant to be another."""
    assert len({str(case) for case in ALL}) == len(ALL)
    assert all(isinstance(case, Pipeline) for case in SHORT)
