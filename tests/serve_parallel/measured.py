"""lowlat with short measurements of `--machine here`, in one process of a torchrun launch:
measured.py ARGUMENT...

The times are not those of the machine, which may be busy: the rates of a preset stand in for those
that they give, and a divided step takes longer than a whole one by SECONDS.
"""

import time
from collections.abc import Callable
from dataclasses import replace

from lowlat.bench import here, links
from lowlat.cli.main import run
from lowlat.config.model import ModelConfig
from lowlat.engine.parallel_runner import GroupExchange
from lowlat.model.share import ModelShare
from lowlat.plan.serving.machines import MACHINES, ServingMachine

SECONDS = 0.1
divided_step = here._divided_step


def slower_step(
    config: ModelConfig, share: ModelShare | None, exchange: GroupExchange | None
) -> Callable[[], object]:
    step = divided_step(config, share, exchange)
    return step if share is None else lambda: (time.sleep(SECONDS), step())


def preset(*_: object) -> ServingMachine:
    return replace(MACHINES["epyc-9654"], name=here.HERE)


if __name__ == "__main__":
    here.SECONDS, here.LONG, links.STEPS = 0.0, 2048, 3
    here._divided_step = slower_step  # pyright: ignore[reportPrivateUsage]
    here.solve = preset
    run()
