"""Every division among processes trains as one process does: losses, gradients, weights, with MTP,
routing biases and the sequence-wise loss.

LOWLAT_ALL_LAYOUTS=1 runs all of them over 20 steps (about ten minutes on two cores) and prints how
closely they agree.
"""

import json
import os
from pathlib import Path

import pytest

from tests.train_parallel.layouts import (
    ALL,
    GRADIENTS,
    LOSSES,
    SHORT,
    WEIGHTS,
    Case,
    by_processes,
    difference,
    divided,
)
from tests.train_parallel.pipelines import ALL as PIPELINES
from tests.train_parallel.training import trained_alone

CASES = ALL if os.environ.get("LOWLAT_ALL_LAYOUTS") else SHORT


@pytest.mark.slow
@pytest.mark.parametrize("processes", by_processes(CASES))
def test_training_is_that_of_one_process(processes: int, tmp_path: Path) -> None:
    cases = by_processes(CASES)[processes]
    alone = trained_alone(cases)
    failed = []
    results = divided(cases, tmp_path / "results")
    for case, together in zip(cases, results, strict=True):
        found = difference(alone[json.dumps(case.training)], together)
        line = f"{case}: losses {found.losses:.1e}, gradients {found.gradients:.1e}, "
        line += f"weights {found.weights:.1e}"
        print(line)
        if found.losses > LOSSES or found.gradients > GRADIENTS or found.weights > WEIGHTS:
            failed.append(f"{line} {found.where}")
    assert not failed, "\n".join(failed)


def test_cases_are_distinguished() -> None:
    """A case that is listed twice is one that was meant to be another."""
    assert len({str(case) for case in ALL}) == len(ALL)
    assert all(isinstance(case, Case) for case in SHORT)


def test_the_document_counts_them() -> None:
    text = " ".join((Path(__file__).parents[2] / "docs" / "parallelism.md").read_text().split())
    assert f"{len(ALL)} layouts" in text and f"{len(PIPELINES)} pipelines" in text
