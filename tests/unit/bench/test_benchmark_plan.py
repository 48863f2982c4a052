"""The options of a run: what is refused, by name."""

import sys

import pytest

from lowlat.bench.benchmark_plan import (
    BenchmarkCase,
    Program,
    make_plan,
    parse_lengths,
    parse_peers,
)
from lowlat.ops import native
from lowlat.utils.errors import UserError


def test_a_plan_has_prompts_first_and_rising() -> None:
    plan = make_plan(prefill="300, 64", decode="7", threads=1)
    assert plan.cases == (
        BenchmarkCase(kind="prefill", tokens=64),
        BenchmarkCase(kind="prefill", tokens=300),
        BenchmarkCase(kind="decode", tokens=7),
    )
    assert plan.context == 300


def test_default_lengths_end_with_the_context() -> None:
    """Regression: a command without options that no model of a short context could take."""
    lengths = [(c.kind, c.tokens) for c in make_plan(threads=1).within(2048).cases]
    assert lengths == [("prefill", 512), ("prefill", 2048), ("decode", 128), ("decode", 2048)]
    chosen = make_plan(prefill="512,4096", threads=1).within(2048)
    assert chosen.context == 4096
    assert make_plan(threads=1).within(64).context == 32768, "nothing would be left"


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"dtype": "int3"}, "--dtype 'int3'"),
        ({"cache": "fp4"}, "--cache 'fp4'"),
        ({"cache": "bf16", "dtype": "fp32"}, "--cache bf16: --dtype fp32"),
        ({"prefill": "", "decode": ""}, "both empty"),
        ({"prefill": "12,x"}, "--prefill 'x'"),
        ({"decode": "0"}, "--decode '0'"),
        ({"decode": "-5"}, "--decode '-5'"),
        ({"decode": "9999999"}, "--decode '9999999'"),
        ({"rounds": 0}, "--rounds 0"),
        ({"threads": 0}, "--threads 0"),
        ({"threads": native.processors() + 1}, f"has {native.processors()} cores"),
        ({"peers": "ollama"}, "--peers 'ollama'"),
        ({"peers": "vllm,vllm"}, "names vllm twice"),
        ({"peers": "vllm=/no/such/python"}, "/no/such/python"),
    ],
)
def test_wrong_options_are_named(options: dict[str, object], problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        make_plan(**options)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("dtype", "cache", "found"),
    [
        ("bf16", "auto", "bf16"),
        ("int4", "bf16", "bf16"),
        ("fp32", "auto", "fp32"),
        ("fp32", "int8", "int8"),
    ],
)
def test_the_cache_dtype_follows_the_weights(dtype: str, cache: str, found: str) -> None:
    """Regression: results of an fp32 cache that call it bf16."""
    assert make_plan(dtype=dtype, cache=cache, threads=1).cache == found


def test_lengths_are_sorted_and_single() -> None:
    assert parse_lengths("--decode", "512,128,512,") == [128, 512]


def test_peers_have_an_interpreter() -> None:
    assert parse_peers(f"transformers, llama.cpp={sys.executable}") == (
        Program(name="transformers", python=sys.executable),
        Program(name="llama.cpp", python=sys.executable),
    )
    assert parse_peers("") == ()
