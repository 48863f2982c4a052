"""Scratch folder of a compression: layer statistics and new tensors on disk.

Memory holds one layer at a time.
"""

import hashlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import final

import torch
from torch import Tensor

from lowlat.checkpoint.fetch.cache_dir import sha256_file
from lowlat.checkpoint.fill_parameters import fit
from lowlat.checkpoint.safetensors.reader import SafetensorsFile
from lowlat.checkpoint.safetensors.writer import file_pieces
from lowlat.convert.compression.statistics import LayerStatistics
from lowlat.utils.disk_errors import NO_SPACE
from lowlat.utils.errors import UserError
from lowlat.utils.file_lock import lock_for_writing


def digest_of(folder: Path) -> str:
    """A short hash of the new tensors of all layers in `folder`."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("layer-*.safetensors")):
        digest.update(f"{path.name} {sha256_file(path)}\n".encode())
    return digest.hexdigest()[:12]


@contextmanager
def scratch_folder(dst: Path) -> Iterator[Path]:
    """An empty scratch folder next to `dst`, removed at exit. Files of a killed process are removed
    first. Raises UserError if another process uses it, or for an error of the disk.
    """
    folder = dst.with_name(f".{dst.name}.calibration")
    try:
        folder.mkdir(exist_ok=True)
        with (folder / "lock").open("ab") as lock:
            lock_for_writing(lock, dst)
            for file in folder.glob("*.safetensors"):
                file.unlink()
            try:
                yield folder
            finally:
                shutil.rmtree(folder, ignore_errors=True)
    except OSError as error:
        is_full = error.errno in NO_SPACE
        remedy = "free some space and repeat the command"
        raise UserError(
            f"{dst}: cannot be written ({error.strerror}); "
            f"{remedy if is_full else 'choose another destination'}"
        ) from error


@final
class LayerScratch:
    """Layers' statistics and tensors in `folder`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._held: tuple[int, dict[str, Tensor]] = (-1, {})

    def save_statistics(self, number: int, statistics: LayerStatistics) -> None:
        """Save the statistics of layer `number`."""
        values = asdict(statistics)
        residual = torch.tensor(values.pop("residual"), dtype=torch.float64)
        rotation = torch.view_as_real(values.pop("rotation"))
        tensors = values | {"residual": residual, "rotation": rotation}
        _write(self._statistics_file(number), tensors)

    def statistics(self, number: int) -> LayerStatistics:
        """The statistics of layer `number`."""
        values = _read(self._statistics_file(number))
        residual = float(values.pop("residual"))
        # tensors are aligned to 8 bytes, complex128 needs 16
        rotation = torch.view_as_complex(values.pop("rotation").clone())
        return LayerStatistics(**values, residual=residual, rotation=rotation)

    def save_tensors(self, number: int, tensors: dict[str, Tensor], dtype: torch.dtype) -> None:
        """Save the new tensors of layer `number`, by their names in its attention.

        Raises UserError for values beyond the range of `dtype`.
        """
        where = f"layer {number} of the converted model: '{{}}'"
        stored = {
            name: fit(tensor, name, where.format(name), False, dtype)
            for name, tensor in tensors.items()
        }
        _write(self._tensor_file(number), stored)

    def read(self, name: str) -> Tensor:
        """The new tensor of parameter `name`. Caches the tensors of one layer."""
        _, number, _, below = name.split(".", 3)
        if self._held[0] != int(number):
            self._held = int(number), _read(self._tensor_file(int(number)))
        return self._held[1][below]

    def _statistics_file(self, number: int) -> Path:
        return self._folder / f"statistics-{number}.safetensors"

    def _tensor_file(self, number: int) -> Path:
        return self._folder / f"layer-{number}.safetensors"


def _write(path: Path, tensors: dict[str, Tensor]) -> None:
    path.unlink(missing_ok=True)  # tensors that were read may still be views of it
    with path.open("xb") as file:
        file.writelines(file_pieces(list(tensors.items())))


def _read(path: Path) -> dict[str, Tensor]:
    file = SafetensorsFile(path)
    return {name: file.read(name) for name in file.extents}
