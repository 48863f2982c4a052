"""Sampling options: every range, every contradiction, and that the message names the option."""

import math
from typing import Any

import pytest

from lowlat.engine.params import MAX_LOGIT_BIAS
from lowlat.generate.params import MAX_STOP_LENGTH, SamplingOptions, SamplingParams, make_params
from lowlat.utils.errors import UserError


def test_defaults_are_greedy_up_to_the_context() -> None:
    params = SamplingParams()
    assert params.is_greedy and not params.has_penalties
    assert params.max_tokens is None and params.n == 1 and params.logprobs is None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", 0),
        ("max_tokens", -1),
        ("max_tokens", 1 << 40),
        ("max_tokens", True),
        ("temperature", -0.1),
        ("temperature", 1e-9),
        ("temperature", 100.5),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", True),
        ("top_k", -1),
        ("top_k", True),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("top_p", math.nan),
        ("min_p", -0.01),
        ("min_p", 1.01),
        ("min_p", math.nan),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", 1e-40),
        ("repetition_penalty", -1.0),
        ("repetition_penalty", math.inf),
        ("presence_penalty", 2.1),
        ("presence_penalty", -math.inf),
        ("frequency_penalty", -2.1),
        ("frequency_penalty", math.nan),
        ("logit_bias", {-1: 1.0}),
        ("logit_bias", {True: 1.0}),
        ("logit_bias", {3: math.nan}),
        ("logit_bias", {3: 101.0}),
        ("logit_bias", dict.fromkeys(range(MAX_LOGIT_BIAS + 1), 1.0)),
        ("seed", True),
        ("seed", 1 << 63),
        ("logprobs", -1),
        ("logprobs", 21),
        ("logprobs", True),
        ("n", 0),
        ("n", 129),
        ("n", True),
        ("stop", ("",)),
        ("stop", ("x" * (MAX_STOP_LENGTH + 1),)),
        ("stop", tuple(str(i) for i in range(17))),
    ],
)
def test_out_of_range_values_are_errors_that_name_the_option(name: str, value: object) -> None:
    """Regression: NaN passing comparisons, booleans passing as integers, requests without a cap."""
    options: dict[str, Any] = {"temperature": 1.0, name: value}
    with pytest.raises(UserError, match=name):
        SamplingParams(**options)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", 1),
        ("temperature", 0.0),
        ("temperature", 100),
        ("top_k", 0),
        ("top_p", 1.0),
        ("top_p", 1e-6),
        ("min_p", 1.0),
        ("repetition_penalty", 0.5),
        ("presence_penalty", -2.0),
        ("frequency_penalty", 2),
        ("logit_bias", {0: -100, 5: 100.0}),
        ("seed", -(1 << 63)),
        ("seed", (1 << 63) - 1),
        ("logprobs", 0),
        ("logprobs", 20),
        ("n", 128),
        ("stop", tuple(str(i) for i in range(16))),
    ],
)
def test_borders_are_allowed(name: str, value: object) -> None:
    options: dict[str, Any] = {"temperature": 1.0, name: value}
    assert getattr(SamplingParams(**options), name) == value


@pytest.mark.parametrize(
    ("name", "value"), [("top_k", 2), ("top_p", 0.9), ("min_p", 0.1), ("n", 2)]
)
def test_options_without_effect_at_temperature_0_are_errors(name: str, value: object) -> None:
    """Regression: an option that is accepted and silently ignored."""
    options: dict[str, Any] = {"temperature": 0.0, name: value}
    with pytest.raises(UserError, match=rf"{name}.*temperature 0"):
        SamplingParams(**options)


def test_options_that_agree_with_greedy_are_allowed() -> None:
    params = SamplingParams(temperature=0.0, top_k=1, seed=3, logprobs=2, repetition_penalty=1.1)
    assert params.is_greedy and params.has_penalties


def test_keyword_options_become_params() -> None:
    assert make_params({"stop": "\n"}).stop == ("\n",)
    assert make_params({"stop": None}).stop == ()
    assert make_params({"stop": ["a", "b"], "temperature": 0.5}) == SamplingParams(
        stop=("a", "b"), temperature=0.5
    )


def test_an_unknown_keyword_is_an_error_that_lists_the_options() -> None:
    options: Any = {"max_token": 3}
    with pytest.raises(UserError, match=r"'max_token' is unknown.*max_tokens"):
        make_params(options)


def test_keyword_options_are_the_fields() -> None:
    """Regression: an option added to one of the two and not to the other."""
    assert set(SamplingOptions.__annotations__) == set(SamplingParams.__dataclass_fields__)
