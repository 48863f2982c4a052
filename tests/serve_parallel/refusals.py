"""Loads a model whose processes differ, in one process of a torchrun launch: refusals.py MODEL

For each fact, process 1 has another value; every process must refuse, and one must say why.
"""

import os
import sys

from lowlat import api
from lowlat.utils.errors import UserError

NAMES = ("version", "PyTorch version", "kernel level", "options", "weights", "LoRA adapters")


def main() -> None:
    facts = api._facts
    for name in NAMES:

        def changed(*arguments: object, name: str = name) -> dict[str, str]:
            own = facts(*arguments)  # pyright: ignore[reportArgumentType]
            return own | {name: "another"} if os.environ["RANK"] == "1" else own

        api._facts = changed  # pyright: ignore[reportAttributeAccessIssue]
        try:
            api.load(sys.argv[1], parallel="pipeline=2")
        except UserError as error:
            print(f"refused: {error}", flush=True)
        except SystemExit as end:
            assert end.code == 2  # the other process says why
        else:
            raise AssertionError(f"{name} may differ")


if __name__ == "__main__":
    main()
