"""A process that trains when told to, each time in a fork of itself, which can be killed.

Forking after the imports makes a run begin in a moment. Standard input names a recipe and a run's
folder per line; the answer is the process id of the run and, when it has ended, its exit status.
The process itself never computes, so that a fork inherits no threads.
"""

import os
import sys
from pathlib import Path

import torch

from lowlat.plan import rate
from lowlat.train.checkpoints.run_folder import RunFolder
from lowlat.train.metrics.metrics_log import FolderMetricsLog, SilentMetricsLog
from lowlat.train.recipe.schema import read_recipe
from lowlat.train.run.trainer import Trainer


def train(recipe_path: Path, folder: Path) -> None:
    """As `lowlat train RECIPE --out FOLDER` does."""
    torch.set_num_threads(1)
    recipe = read_recipe(recipe_path)
    with RunFolder(folder) as run:
        log = FolderMetricsLog(
            run, view=SilentMetricsLog(), tensorboard_wanted=recipe.log.tensorboard
        )
        try:
            Trainer(recipe, run, log, base=recipe_path.parent).run()
        finally:
            log.close()


def main() -> None:
    rate.SIDES["cpu"] = 64  # the machine's speed is of no interest here
    for line in sys.stdin:
        recipe, folder = map(Path, line.rstrip("\n").split("\t"))
        child = os.fork()
        if child == 0:
            status = 1
            try:
                train(recipe, folder)
                status = 0
            except BaseException as error:
                sys.stderr.write(f"{type(error).__name__}: {error}\n")
                raise
            finally:
                sys.stderr.flush()
                os._exit(status)
        print(child, flush=True)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main()
