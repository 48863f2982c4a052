"""DeepSeek's inference/model.py: the user's copy, run by `deepseek_worker` in a process."""

import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

from lowlat.compare.implementations.base import Implementation, run_in_worker
from lowlat.compare.trace import RoutedExperts, Trace, Window, load_trace
from lowlat.config.model import MLAConfig, ModelConfig
from lowlat.utils.device import dtype_name
from lowlat.utils.errors import UserError

WORKER = "lowlat.compare.implementations.deepseek_worker"


class DeepSeekModel(Implementation):
    """The public model.py with the weights of a Hugging Face checkpoint."""

    unseen = "model.py has no MTP modules, and does not return its router scores"
    can_impose_experts = True

    def __init__(
        self, script: Path, path: Path, config: ModelConfig, *, label: str, dtype: torch.dtype
    ) -> None:
        if not script.is_file():
            raise UserError(
                f"{label}: '{script}' is not a file; give the path of DeepSeek's inference/model.py"
            )
        if not isinstance(config.attention, MLAConfig) or not config.attention.kv_a_layernorm:
            raise UserError(f"{label}: model.py runs DeepSeek models only, and this is none")
        self.script, self.path = script, path
        self.config = config
        self.label = label
        self.dtype = dtype
        self.precision = dtype_name(dtype)

    def trace(self, window: Window, experts: RoutedExperts | None = None) -> Trace:
        with tempfile.TemporaryDirectory(prefix="lowlat-deepseek-") as name:
            folder = Path(name)
            imposed = {
                str(block.number): value.contiguous()
                for block, value in (experts or {}).items()
                if block.stage == "layer"
            }
            save_file(imposed, folder / "in")
            request = {
                "op": "trace",
                "script": str(self.script.resolve()),
                "path": str(self.path.resolve()),
                "dtype": self.precision,
                "ids": window.ids.tolist(),
                "start": window.start,
                "choices": str(folder / "in"),
                "out": str(folder / "out"),
            }
            run_in_worker(WORKER, [request], label=self.label)
            return load_trace(folder / "out", self.dtype)
