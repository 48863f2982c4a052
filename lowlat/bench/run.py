"""Benchmark run: check agreement, load programs, measure, time starts, build the results."""

import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lowlat.bench import agreement, results
from lowlat.bench.agreement import Agreement
from lowlat.bench.benchmark_plan import BenchmarkPlan, Program
from lowlat.bench.inputs import read_inputs
from lowlat.bench.measure import CaseResult, measure
from lowlat.bench.session import BenchmarkSession
from lowlat.peers.worker import PeerError, Worker
from lowlat.utils.errors import UserError
from lowlat.utils.progress import Progress

WARMUP_TOKENS = 256
"""Tokens of the warm-up prefill: enough to use every expert."""
START_CONTEXT = 64
START_IDS = [1, 2, 3]
LONG_START = 20.0
"""A program whose starts have taken this many seconds is not started again."""


@dataclass(kw_only=True, slots=True)
class LoadedPrograms:
    """The workers of a run, and the programs that cannot be measured."""

    workers: list[tuple[str, Worker]] = field(default_factory=list)
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    """Reason by program."""


def bench(model: str, plan: BenchmarkPlan, progress: Progress) -> dict[str, Any]:
    """Measure and return the results as a JSON object.

    Raises UserError for wrong input, and if the programs' logits disagree.
    """
    inputs = read_inputs(model, plan, progress)
    programs = [Program(name="lowlat", python=sys.executable), *inputs.plan.peers]
    with tempfile.TemporaryDirectory(prefix="lowlat-bench-") as folder:
        session = BenchmarkSession(inputs=inputs, folder=Path(folder), progress=progress)
        return _run(session, programs)


def _run(session: BenchmarkSession, programs: Sequence[Program]) -> dict[str, Any]:
    started = time.time()
    plan = session.inputs.plan
    agreed = agreement.check_agreement(session, programs)
    with ExitStack() as stack:
        loaded = _load_all(session, programs, agreed, stack)
        calibration = session.start(Program(name="calibration", python=sys.executable))
        stack.enter_context(calibration)
        calibration.ask("load")
        rows, rates = measure(
            loaded.workers, plan.cases, calibration, plan.rounds, session.progress
        )
    rows += [
        CaseResult(program=name, case=case, reason=reason)
        for name, reason in loaded.absent.items()
        for case in plan.cases
    ]
    starts = _time_starts(session, [p for p in programs if p.name not in loaded.absent])
    return results.build(
        session.inputs,
        started=started,
        programs={
            program.name: {
                "precision": program.precision(plan.dtype),
                "fp32_difference": agreed.differences.get(program.name),
                "error_against_fp32": None,
                **loaded.facts.get(program.name, {}),
            }
            for program in programs
        },
        rows=rows,
        rates=rates,
        starts=starts,
    )


def _load_all(
    session: BenchmarkSession, programs: Sequence[Program], agreed: Agreement, stack: ExitStack
) -> LoadedPrograms:
    """All programs loaded and warmed up. Raises UserError if lowlat is not among them."""
    found = LoadedPrograms()
    plan = session.inputs.plan
    context = max(plan.context, WARMUP_TOKENS)
    with session.progress.task("loading", len(programs)) as task:
        for program in programs:
            try:
                loaded = session.load(program, dtype=plan.dtype, cache=plan.cache, context=context)
                stack.enter_context(loaded.worker)
                deviation = _warm_up(program, loaded.worker, agreed, plan)
                # results do not contain the path of this interpreter
                python = "python" if program.python == sys.executable else program.python
                facts = {"error_against_fp32": deviation, "python": python, **loaded.facts}
                found.workers.append((program.name, loaded.worker))
                found.facts[program.name] = facts
            except PeerError as error:
                if program.name == "lowlat":
                    raise UserError(f"lowlat does not run this: {error}") from error
                found.absent[program.name] = str(error)
            task.advance()
    return found


def _warm_up(
    program: Program, worker: Worker, agreed: Agreement, plan: BenchmarkPlan
) -> float | None:
    """Warm a worker up and check its logits in the timed precision: their relative error against
    fp32, None for vLLM.
    """
    worker.ask("prefill", tokens=WARMUP_TOKENS)
    worker.ask("decode", context=WARMUP_TOKENS, steps=2, seconds=1.0)
    if program.name == "vllm":
        agreed.differences[program.name] = agreement.top_difference(worker, agreed)
        return None
    if program.name != "lowlat":
        return agreed.error(worker)
    error = agreed.error(worker, agreement.OWN_TOKENS)
    agreement.require_near(error, plan.dtype, plan.cache)
    return error


def _time_starts(session: BenchmarkSession, programs: Sequence[Program]) -> dict[str, list[float]]:
    """Seconds from process start to first token, interleaved, files in the page cache."""
    found: dict[str, list[float]] = {program.name: [] for program in programs}
    plan = session.inputs.plan
    with session.progress.task("starting", plan.rounds * len(programs)) as task:
        for _ in range(plan.rounds):
            for program in programs:
                if sum(found[program.name]) > LONG_START:
                    continue
                begin = time.perf_counter()
                loaded = session.load(
                    program, dtype=plan.dtype, cache=plan.cache, context=START_CONTEXT
                )
                with loaded.worker as worker:
                    worker.ask("first_token", ids=START_IDS)
                    found[program.name].append(time.perf_counter() - begin)
                task.advance()
    return found
