"""python -m tests.mutations [--part I/N] [WORD ...]: run the mutants whose names contain every
word, print a table. Part I of N is every Nth of them, from the Ith: N processes share the work.
"""

import argparse
import sys
import tempfile
from pathlib import Path

from .mutants import MUTANTS
from .runner import Outcome, prepare, run_mutants


def main(arguments: list[str]) -> int:
    """0 if a test failed for every mistake, 1 if one went unnoticed; exits with 2 if nothing was
    selected."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutations")
    parser.add_argument("--part", default="1/1", metavar="I/N")
    parser.add_argument("words", nargs="*", metavar="WORD")
    given = parser.parse_args(arguments)
    part, parts = map(int, given.part.split("/"))
    named = [m for m in MUTANTS if all(word.lower() in m.name.lower() for word in given.words)]
    chosen = named[part - 1 :: parts]
    if not chosen:
        parser.error("no mutant has these words in its name")
    with tempfile.TemporaryDirectory(prefix="lowlat-mutations-") as folder:
        workspace = Path(folder)
        prepare(workspace)
        outcomes = []
        for outcome in run_mutants(workspace, chosen):
            outcomes.append(outcome)
            print(row(outcome), flush=True)
    killed = sum(outcome.killed for outcome in outcomes)
    print(f"{killed} of {len(outcomes)} killed")
    return 0 if killed == len(outcomes) else 1


def row(outcome: Outcome) -> str:
    mutant = outcome.mutant
    verdict = "killed  " if outcome.killed else "SURVIVED"
    return f"{verdict} {outcome.seconds:4.1f} s  {mutant.name:52} {mutant.test.rpartition('/')[2]}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
