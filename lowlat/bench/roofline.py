"""Roofline: lower bound on the time of benchmark cases at this machine's peak rates; the
bytes and FLOPs are those of `plan.serving.step_cost`.
"""

from lowlat.bench.benchmark_plan import STORED, BenchmarkCase
from lowlat.config.model import ModelConfig
from lowlat.plan.serving.step_cost import (
    WHOLE,
    KernelRates,
    RankShare,
    Step,
    StepCost,
    TimeBound,
    step_cost,
    step_seconds,
)
from lowlat.plan.serving.weights import WeightBytes, dtype_weights

RATES = {
    "fp32": "gemm_fp32",
    "bf16": "gemm_bf16",
    "fp8": "gemm_bf16",
    STORED: "gemm_bf16",
    "int8": "gemm_int8",
    "int4": "gemm_int8",
}
"""The measured rate that bounds products with weights of a dtype."""


def case_step(case: BenchmarkCase) -> Step:
    """The step of one case: the whole prompt, or one decode step."""
    if case.kind == "prefill":
        return Step(queries=case.tokens)
    return Step(context=case.tokens)


def case_cost(
    config: ModelConfig,
    case: BenchmarkCase,
    *,
    dtype: str,
    weights: WeightBytes | None = None,
    cache: str = "bf16",
    share: RankShare = WHOLE,
) -> StepCost:
    """The cost of one case. weights: those that stay quantized as stored; None for weights of
    `dtype`. cache: data type of the KV cache. share: the part of a process.
    """
    weights = dtype_weights(config, dtype) if weights is None else weights
    return step_cost(config, case_step(case), weights, cache=cache, share=share)


def plain_rate(dtype: str) -> str:
    """The measured rate that bounds attention in a model with weights of `dtype`."""
    return "gemm_fp32" if dtype == "fp32" else "gemm_bf16"


def peak_rates(dtype: str, rates: dict[str, float]) -> KernelRates:
    """Measured peaks as bounds of kernels. rates: bandwidth in bytes/s; gemm_fp32, gemm_bf16 and
    gemm_int8 in FLOP/s.
    """
    plain = rates["gemm_fp32"]
    if dtype != "fp32":  # without bf16 instructions, kernels multiply bf16 values in fp32
        plain = max(plain, rates["gemm_bf16"])
    return KernelRates(
        bandwidth=rates["bandwidth"],
        # If the measured int8 GEMM is slower than bf16, bf16 is the bound.
        products=max(plain, rates[RATES[dtype]]),
        scores=plain,
        int8_scores=max(plain, rates["gemm_int8"]),
    )


def time_bound(
    config: ModelConfig,
    case: BenchmarkCase,
    *,
    dtype: str,
    weights: WeightBytes | None = None,
    rates: dict[str, float],
    cache: str = "bf16",
    share: RankShare = WHOLE,
) -> TimeBound:
    """Lower bound on the seconds of a case, of the whole prompt or of one decode step; see
    `case_cost`."""
    cost = case_cost(config, case, dtype=dtype, weights=weights, cache=cache, share=share)
    return step_seconds(cost, peak_rates(dtype, rates))
