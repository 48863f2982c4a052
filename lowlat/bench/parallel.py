"""Benchmark of a model divided among processes: throughput and roofline of the layout; memory,
bytes and messages per token of each process, next to their formulas.
"""

import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from lowlat.bench import results
from lowlat.bench.benchmark_plan import BenchmarkCase, BenchmarkPlan, Program
from lowlat.bench.inputs import BenchmarkInputs, read_inputs
from lowlat.bench.lowlat_worker import Lowlat
from lowlat.bench.measure import measure, median_rates
from lowlat.bench.roofline import case_step, time_bound
from lowlat.bench.run import WARMUP_TOKENS
from lowlat.bench.session import BenchmarkSession
from lowlat.config.model import ModelConfig
from lowlat.config.serving_layout import AUTO, ServingLayout
from lowlat.engine.parallel_runner import ParallelRunner, ProcessStats
from lowlat.engine.prefill_planner import PREFILL_CHUNK
from lowlat.peers.protocol import random_token_ids, timed_handlers
from lowlat.peers.worker import TIMEOUT, PeerError, Worker
from lowlat.plan.serving.expert_load import busiest_rank
from lowlat.plan.serving.layout import stage_layers
from lowlat.plan.serving.step_cost import PhaseBound, RankShare, TimeBound
from lowlat.plan.serving.traffic import RECORD_BYTES, rank_traffic
from lowlat.utils.errors import UserError
from lowlat.utils.process_group import local_processes, quiet_followers
from lowlat.utils.progress import Progress

UNCOMPARED = {"fp32_difference": None, "error_against_fp32": None}
RECORD_HEAD = 10
"""Integers of the step record of one sequence, except tokens and pages."""


class LocalProgram:
    """lowlat in process 0, as `measure` asks for it."""

    def __init__(self, model: Lowlat) -> None:
        self._handlers = timed_handlers(model)

    def ask(self, op: str, *, timeout: float = TIMEOUT, **arguments: Any) -> dict[str, Any]:
        """The answer; there is no timeout."""
        try:
            return self._handlers[op](**arguments)
        except UserError as error:  # such as too few pages
            raise PeerError(str(error)) from error


class StageCalibration:
    """Peak rates of one process while all of its stage on this machine are at work."""

    def __init__(self, workers: Sequence[Worker]) -> None:
        self._workers = workers

    def ask(self, op: str, *, timeout: float = TIMEOUT, **arguments: Any) -> dict[str, Any]:
        """The mean of the workers' answers."""
        with ThreadPoolExecutor(len(self._workers)) as threads:
            asked = [threads.submit(each.ask, op, timeout=timeout) for each in self._workers]
            answers = [each.result() for each in asked]
        return {name: sum(each[name] for each in answers) / len(answers) for name in answers[0]}


def bench_parallel(
    model: str, plan: BenchmarkPlan, parallel: str, progress: Progress
) -> dict[str, Any]:
    """Measure the layout `parallel` in the processes that torchrun has started: a JSON object as of
    `run.bench`, with "parallel" for the processes. Returns in process 0; raises SystemExit in the
    others when it ends, and UserError for wrong input.
    """
    started = time.time()
    with quiet_followers():
        if parallel != AUTO and ServingLayout.parse(parallel).prefill:
            raise UserError("--parallel: bench times one group of processes; leave out prefill")
        inputs = read_inputs(model, plan, progress)
        plan = inputs.plan
        if plan.dtype == "fp8" and inputs.config.quantization is None:
            raise UserError("--dtype fp8: first write fp8 blocks with lowlat convert --dtype fp8")
    program = Lowlat()
    facts = program.load(
        model=str(inputs.model),
        precision=plan.dtype,
        cache=plan.cache,
        threads=plan.threads,
        context=plan.context,
        parallel=parallel,
    )
    runner = program.runner
    assert isinstance(runner, ParallelRunner)
    layout = runner.layout
    program.prefill(random_token_ids(WARMUP_TOKENS, program.vocab_size))
    with ExitStack() as stack:
        calibration = _calibration(inputs, layout, progress, stack)
        rows, rates = measure(
            [("lowlat", LocalProgram(program))], plan.cases, calibration, plan.rounds, progress
        )
    stages = {case: stage_bounds(inputs, layout, case, median_rates(rates)) for case in plan.cases}
    found = results.build(
        inputs,
        started=started,
        programs={"lowlat": {**UNCOMPARED, "precision": plan.dtype, **facts}},
        rows=rows,
        rates=rates,
        starts={},
        bounds={case: _in_sequence(own) for case, own in stages.items()},
    )
    traffic = [_traffic(program, runner, inputs.config, layout, case) for case in plan.cases]
    return {
        **found,
        "parallel": {
            "layout": str(layout),
            "processes": _processes(layout, stages, runner.process_stats()),
            "traffic": traffic,
        },
    }


def _calibration(
    inputs: BenchmarkInputs, layout: ServingLayout, progress: Progress, stack: ExitStack
) -> StageCalibration:
    """A worker for each process of a stage on this machine."""
    folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="lowlat-bench-"))
    session = BenchmarkSession(inputs=inputs, folder=Path(folder), progress=progress)
    count = min(layout.stage_size, local_processes())
    program = Program(name="calibration", python=sys.executable)
    workers = [stack.enter_context(session.start(program)) for _ in range(count)]
    for worker in workers:
        worker.ask("load")
    return StageCalibration(workers)


def stage_bounds(
    inputs: BenchmarkInputs, layout: ServingLayout, case: BenchmarkCase, rates: dict[str, float]
) -> list[TimeBound]:
    """Lower bound on the time of a case in the busiest process of each stage."""
    config, plan = inputs.config, inputs.plan
    experts: float | None = None
    choices: float | None = None
    if config.moe is not None:
        busiest = busiest_rank(config.moe, case_step(case).tokens, layout.stage_size)
        experts, choices = busiest.experts, busiest.choices
    return [
        time_bound(
            config,
            case,
            dtype=plan.dtype,
            weights=inputs.weights,
            rates=rates,
            cache=plan.cache,
            share=RankShare(
                layers=layers,
                has_head=layers.stop == config.num_hidden_layers,
                tensor=layout.tensor,
                experts=experts,
                choices=choices,
            ),
        )
        for layers in stage_layers(config, layout.pipeline)
    ]


def _in_sequence(stages: Sequence[TimeBound]) -> TimeBound:
    """The bound of one sequence, which passes one stage after another."""

    def total(phases: Sequence[PhaseBound]) -> PhaseBound:
        return PhaseBound(
            memory=sum(phase.memory for phase in phases),
            arithmetic=sum(phase.arithmetic for phase in phases),
        )

    return TimeBound(
        weights=total([stage.weights for stage in stages]),
        attention=total([stage.attention for stage in stages]),
    )


def _processes(
    layout: ServingLayout,
    stages: dict[BenchmarkCase, list[TimeBound]],
    stats: Sequence[ProcessStats],
) -> list[dict[str, Any]]:
    """Memory of each process, and the bound of its part of each case."""
    return [
        {
            "rank": rank,
            "stage": rank // layout.stage_size,
            "memory_bytes": own.memory,
            "cpus": own.cpus,
            "bound_seconds": {
                str(case): bounds[rank // layout.stage_size].overlapped
                for case, bounds in stages.items()
            },
        }
        for rank, own in enumerate(stats)
    ]


def _traffic(
    program: Lowlat,
    runner: ParallelRunner,
    config: ModelConfig,
    layout: ServingLayout,
    case: BenchmarkCase,
) -> dict[str, Any]:
    """What each process sends per token in a step of `case`, next to the formula."""
    tokens = 1
    if case.kind == "prefill":
        tokens = min(case.tokens, PREFILL_CHUNK)
        before = runner.process_stats()
        program.prefill(random_token_ids(tokens, program.vocab_size))
    else:
        program.fill_cache(case.tokens)
        before = runner.process_stats()
        program.decode_step(0, case.tokens)
    after = runner.process_stats()
    choices = 0.0
    if config.moe is not None:
        choices = busiest_rank(config.moe, tokens, layout.stage_size).choices
    integers = RECORD_HEAD + tokens + len(program.pages)
    each = []
    for rank, (first, last) in enumerate(zip(before, after, strict=True)):
        sent, messages = rank_traffic(
            config, layout, rank, tokens=tokens, choices=choices, record=integers
        )
        # the record of the first stats
        record = layout.processes - 1 if rank == 0 else 0
        each.append(
            {
                "rank": rank,
                "bytes": (last.bytes - first.bytes - record * RECORD_BYTES) / tokens,
                "formula_bytes": sent / tokens,
                "messages": (last.messages - first.messages - record) / tokens,
                "formula_messages": messages / tokens,
            }
        )
    return {"kind": case.kind, "tokens": case.tokens, "step_tokens": tokens, "processes": each}
