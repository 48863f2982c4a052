"""One run from plan to report: check, load, measure, time the start, put it all together."""

import shlex
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lowlat import api
from lowlat.bench import check, machine, report
from lowlat.bench.measure import Row, measure
from lowlat.bench.plan import Plan
from lowlat.bench.programs import Program
from lowlat.bench.stage import Loaded, Stage
from lowlat.bench.worker import Refused, Worker
from lowlat.checkpoint.hf_folder import open_checkpoint
from lowlat.checkpoint.load import read_config
from lowlat.utils.errors import UserError
from lowlat.utils.progress import Progress

WARM_TOKENS = 256
"""Read once before the rounds: enough tokens to touch every expert."""
START_CONTEXT = 64
START_IDS = [1, 2, 3]
LONG_START = 20.0
"""Seconds of starting after which a program is not started again."""
CALIBRATION = "lowlat.bench.calibration"


@dataclass(kw_only=True, slots=True)
class Ready:
    """The workers of a run, and what is known of programs that cannot take part."""

    workers: list[tuple[str, Worker]] = field(default_factory=list)
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    """Reason by program."""
    errors: dict[str, float] = field(default_factory=dict)
    """Relative error of the timed precision's logits against fp32, by program."""


def bench(model: str, plan: Plan, progress: Progress) -> dict[str, Any]:
    """Measure and return the report, ready for JSON.

    Raises UserError for what the user can mend, among it programs that disagree.
    """
    path = api.prepare(model, progress=progress).resolve()
    if not path.is_dir():
        raise UserError(f"{model}: bench reads folders in the Hugging Face layout; give one")
    config = read_config(open_checkpoint(path))
    plan = plan.within(config.max_position_embeddings)
    if plan.context > config.max_position_embeddings:
        raise UserError(
            f"{plan.context:,} tokens exceed the model's max_position_embeddings of "
            f"{config.max_position_embeddings:,}; ask for less in --prefill and --decode"
        )
    if config.packing is not None and plan.dtype not in (config.packing, "fp32"):
        raise UserError(
            f"{model}: holds {config.packing} weights, which stay so; give --dtype {config.packing}"
        )
    programs = [Program(name="lowlat", python=sys.executable), *map(Program.of, plan.peers)]
    with tempfile.TemporaryDirectory(prefix="lowlat-bench-") as folder:
        stage = Stage(plan=plan, model=path, config=config, folder=Path(folder), progress=progress)
        return _run(stage, programs)


def _run(stage: Stage, programs: Sequence[Program]) -> dict[str, Any]:
    started = time.time()
    checked = check.check(stage, programs)
    with ExitStack() as stack:
        ready = _load_all(stage, programs, checked, stack)
        calibration = Worker(
            "calibration",
            CALIBRATION,
            python=sys.executable,
            threads=stage.plan.threads,
            folder=stage.folder,
        )
        stack.enter_context(calibration)
        calibration.ask("load", threads=stage.plan.threads)
        rows, rates = measure(
            ready.workers, stage.plan.cells, calibration, stage.plan.rounds, stage.progress
        )
    rows += [
        Row(program=name, cell=cell, reason=reason)
        for name, reason in ready.absent.items()
        for cell in stage.plan.cells
    ]
    starts = _starts(stage, [p for p in programs if p.name not in ready.absent])
    return report.build(
        command=shlex.join(["lowlat", *sys.argv[1:]]),
        started=started,
        machine=machine.describe(),
        model=stage.model,
        config=stage.config,
        plan=stage.plan,
        precisions={p.name: p.precision(stage.plan.dtype) for p in programs},
        facts=ready.facts,
        differences=checked.differences,
        errors=ready.errors,
        rows=rows,
        rates=rates,
        starts=starts,
    )


def _load_all(
    stage: Stage, programs: Sequence[Program], checked: check.Checked, stack: ExitStack
) -> Ready:
    """All programs loaded and warm. Raises UserError if lowlat is not among them."""
    ready = Ready()
    plan = stage.plan
    context = max(plan.context, WARM_TOKENS)
    with stage.progress.task("loading", len(programs)) as task:
        for program in programs:
            try:
                loaded = stage.load(program, dtype=plan.dtype, cache=plan.cache, context=context)
                stack.enter_context(loaded.worker)
                _warm(program, loaded, checked, ready, plan)
            except Refused as refused:
                if program.name == "lowlat":
                    raise UserError(f"lowlat does not run this: {refused}") from refused
                ready.absent[program.name] = str(refused)
            task.advance()
    return ready


def _warm(
    program: Program, loaded: Loaded, checked: check.Checked, ready: Ready, plan: Plan
) -> None:
    worker = loaded.worker
    worker.ask("prefill", tokens=WARM_TOKENS)
    worker.ask("decode", context=WARM_TOKENS, steps=2, seconds=1.0)
    if program.name == "vllm":
        checked.differences[program.name] = check.top_difference(worker, checked)
    else:
        is_own = program.name == "lowlat"
        error = checked.error(worker, check.OWN_TOKENS) if is_own else checked.error(worker)
        ready.errors[program.name] = error
        if is_own:
            check.require_near(error, plan.dtype, plan.cache)
    ready.workers.append((program.name, worker))
    # where this very interpreter lies is nobody's business but this machine's
    python = "python" if program.python == sys.executable else program.python
    ready.facts[program.name] = {"python": python, **loaded.facts}


def _starts(stage: Stage, programs: Sequence[Program]) -> dict[str, list[float]]:
    """Seconds from the start of a process to its first token, all files warm, in turn."""
    found: dict[str, list[float]] = {program.name: [] for program in programs}
    plan = stage.plan
    with stage.progress.task("starting", plan.rounds * len(programs)) as task:
        for _ in range(plan.rounds):
            for program in programs:
                if sum(found[program.name]) > LONG_START:
                    continue
                begin = time.perf_counter()
                loaded = stage.load(
                    program, dtype=plan.dtype, cache=plan.cache, context=START_CONTEXT
                )
                with loaded.worker as worker:
                    worker.ask("first", ids=START_IDS)
                    found[program.name].append(time.perf_counter() - begin)
                task.advance()
    return found
