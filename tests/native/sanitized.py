"""Runs pytest with a module that was built with sanitizers in place of the installed one.

`make sanitize` builds it and calls this. A report of a sanitizer ends the process with an error.
"""

import importlib.util
import sys
from pathlib import Path

import pytest


def main(build: str, *arguments: str) -> int:
    """The exit status of pytest with `arguments`, for the module in the folder `build`."""
    (path,) = Path(build).glob("_native.*.so")
    spec = importlib.util.spec_from_file_location("lowlat._native", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules["lowlat._native"] = module
    return pytest.main(list(arguments))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
