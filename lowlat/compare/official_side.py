"""DeepSeek's inference/model.py, in a process of its own: the host's side.

The file is the user's, named on the command line, and never part of lowlat; `official_worker` runs
it. It has no MTP modules.
"""

import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

from lowlat.compare.side import Side, run_apart
from lowlat.compare.trace import Choices, Trace, Window, load_trace
from lowlat.config.model import MLAConfig, ModelConfig
from lowlat.utils.device import name_of
from lowlat.utils.errors import UserError


class OfficialSide(Side):
    """A model.py of the public shape with the weights of a Hugging Face checkpoint."""

    unseen = "it has no MTP modules, and the scores of its gate stay inside"
    takes_choices = True

    def __init__(
        self, script: Path, path: Path, config: ModelConfig, *, label: str, dtype: torch.dtype
    ) -> None:
        if not script.is_file():
            raise UserError(
                f"{label}: '{script}' is no file; give the path of DeepSeek's inference/model.py"
            )
        if not isinstance(config.attention, MLAConfig) or not config.attention.kv_a_layernorm:
            raise UserError(f"{label}: model.py runs DeepSeek models only, and this is none")
        self.script, self.path = script, path
        self.config = config
        self.label = label
        self.dtype = dtype
        self.precision = name_of(dtype)

    def trace(self, window: Window, choices: Choices | None = None) -> Trace:
        with tempfile.TemporaryDirectory(prefix="lowlat-official-") as name:
            folder = Path(name)
            imposed = {
                str(block.number): value.contiguous()
                for block, value in (choices or {}).items()
                if block.stage == "layer"
            }
            save_file(imposed, folder / "in")
            request = {
                "script": str(self.script.resolve()),
                "path": str(self.path.resolve()),
                "dtype": self.precision,
                "ids": window.ids.tolist(),
                "start": window.start,
                "choices": str(folder / "in"),
                "out": str(folder / "out"),
            }
            self._run(request)
            return load_trace(folder / "out", self.dtype)

    def _run(self, request: dict[str, object]) -> None:
        """Run the worker. Raises UserError with what it says it cannot do."""
        run_apart("lowlat.compare.official_worker", request, label=self.label)
