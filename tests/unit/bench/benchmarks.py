"""The generator of random checkpoints, which lies outside the package."""

import importlib.util
from pathlib import Path
from types import ModuleType


def random_checkpoint() -> ModuleType:
    path = Path(__file__).parents[3] / "benchmarks" / "random_checkpoint.py"
    spec = importlib.util.spec_from_file_location("random_checkpoint", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
