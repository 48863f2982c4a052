"""Machine and versions in a study report."""

import os
import platform
from importlib.metadata import version
from typing import Any

import torch

from lowlat.utils.machine import processor


def describe() -> dict[str, Any]:
    """Processor, cores, versions."""
    return {
        "cpu": processor().model,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lowlat": version("lowlat"),
    }
