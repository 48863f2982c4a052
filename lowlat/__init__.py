"""Load, convert, serve and train DeepSeek-V3 models (MLA, MoE, MTP, DSA) on CPUs: the Python API.

Public names load on first use, so that `import lowlat` is quick.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lowlat.api import LLM as LLM
    from lowlat.api import load as load
    from lowlat.api import prepare as prepare
    from lowlat.config.model import ModelConfig as ModelConfig
    from lowlat.generate.completion import Completion as Completion
    from lowlat.generate.model import Model as Model
    from lowlat.generate.params import SamplingParams as SamplingParams
    from lowlat.utils.errors import UserError as UserError

    __version__: str

__all__ = [
    "LLM",
    "Completion",
    "Model",
    "ModelConfig",
    "SamplingParams",
    "UserError",
    "__version__",
    "load",
    "prepare",
]

_HOMES = {
    "LLM": "lowlat.api",
    "load": "lowlat.api",
    "prepare": "lowlat.api",
    "ModelConfig": "lowlat.config.model",
    "Completion": "lowlat.generate.completion",
    "Model": "lowlat.generate.model",
    "SamplingParams": "lowlat.generate.params",
    "UserError": "lowlat.utils.errors",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return version("lowlat")
    if name not in _HOMES:
        raise AttributeError(f"module 'lowlat' has no attribute '{name}'")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
