"""What waits on disk while a model is compressed, so that one layer at a time is in memory.

Owns the files of a scratch folder: statistics of layers, and their new tensors.
"""

import hashlib
from dataclasses import asdict
from pathlib import Path
from typing import final

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lowlat.checkpoint.fetch.cache_dir import sha256_file
from lowlat.checkpoint.fill_parameters import fit
from lowlat.convert.statistics import LayerStatistics


def digest_of(folder: Path) -> str:
    """A short hash of the new tensors of all layers in `folder`."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("layer-*.safetensors")):
        digest.update(f"{path.name} {sha256_file(path)}\n".encode())
    return digest.hexdigest()[:12]


@final
class Scratch:
    """Layers' statistics and tensors in `folder`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._held: tuple[int, dict[str, Tensor]] = (-1, {})

    def keep_statistics(self, number: int, statistics: LayerStatistics) -> None:
        """Write down what was measured of layer `number`."""
        values = asdict(statistics)
        residual = torch.tensor(values.pop("residual"), dtype=torch.float64)
        rotation = torch.view_as_real(values.pop("rotation")).contiguous()
        tensors = values | {"residual": residual, "rotation": rotation}
        save_file(tensors, self._statistics_file(number))

    def statistics(self, number: int) -> LayerStatistics:
        """What was measured of layer `number`."""
        values = load_file(self._statistics_file(number))
        residual = float(values.pop("residual"))
        # a tensor in a file may lie at a multiple of 8 bytes, which is none of a complex number's
        rotation = torch.view_as_complex(values.pop("rotation").clone())
        return LayerStatistics(**values, residual=residual, rotation=rotation)

    def keep_tensors(self, number: int, tensors: dict[str, Tensor], dtype: torch.dtype) -> None:
        """Write down the new tensors of layer `number`, by their names in its attention.

        Raises UserError for values beyond the range of `dtype`.
        """
        where = f"layer {number} of the converted model: '{{}}'"
        stored = {
            name: fit(tensor, name, where.format(name), False, dtype).contiguous()
            for name, tensor in tensors.items()
        }
        save_file(stored, self._tensor_file(number))

    def read(self, name: str) -> Tensor:
        """The new tensor of parameter `name`; those of the layer read last are in memory."""
        _, number, _, below = name.split(".", 3)
        if self._held[0] != int(number):
            self._held = int(number), load_file(self._tensor_file(int(number)))
        return self._held[1][below]

    def _statistics_file(self, number: int) -> Path:
        return self._folder / f"statistics-{number}.safetensors"

    def _tensor_file(self, number: int) -> Path:
        return self._folder / f"layer-{number}.safetensors"
