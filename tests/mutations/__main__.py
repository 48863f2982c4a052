"""python -m tests.mutations [WORD ...]: run the mutants whose names contain every word, print a
table.
"""

import sys
import tempfile
from pathlib import Path

from .mutants import MUTANTS
from .runner import Outcome, check_baseline, prepare, run_mutant


def main(words: list[str]) -> int:
    """0 if a test failed for every mistake, 1 if one went unnoticed or nothing was selected."""
    chosen = [m for m in MUTANTS if all(word.lower() in m.name.lower() for word in words)]
    with tempfile.TemporaryDirectory(prefix="lowlat-mutations-") as folder:
        workspace = Path(folder)
        prepare(workspace)
        check_baseline(workspace, chosen)
        outcomes = []
        for mutant in chosen:
            outcomes.append(run_mutant(workspace, mutant))
            print(row(outcomes[-1]), flush=True)
    killed = sum(outcome.killed for outcome in outcomes)
    print(f"{killed} of {len(outcomes)} killed")
    return 0 if outcomes and killed == len(outcomes) else 1


def row(outcome: Outcome) -> str:
    mutant = outcome.mutant
    verdict = "killed  " if outcome.killed else "SURVIVED"
    return f"{verdict} {outcome.seconds:4.1f} s  {mutant.name:52} {mutant.test.rpartition('/')[2]}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
