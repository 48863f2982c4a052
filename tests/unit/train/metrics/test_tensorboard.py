"""TensorBoard files, read back with tensorboard's own reader."""

import errno
import math
import threading
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest

from lowlat.train.metrics.tensorboard import TensorBoardFiles, load_picture
from lowlat.utils.errors import UserError
from tests.unit.train.metrics.records import evaluation, layer, start, step

event_accumulator = pytest.importorskip(
    "tensorboard.backend.event_processing.event_accumulator", reason="needs tensorboard"
)


def read(folder: Path) -> Any:
    files = event_accumulator.EventAccumulator(str(folder))
    return files.Reload()


def scalars(files: Any, name: str) -> dict[int, float]:
    return {event.step: event.value for event in files.Scalars(name)}


def test_curves_of_steps_and_evaluations(tmp_path: Path) -> None:
    files = TensorBoardFiles(tmp_path, start())
    files.step(step(1))
    files.step(step(2, mfu=None, loss=math.nan))
    files.evaluation(evaluation(2))
    files.close()
    found = read(tmp_path)
    losses = scalars(found, "loss/train")
    assert losses[1] == 7.0 and math.isnan(losses[2])
    assert scalars(found, "loss/train_mtp_1") == pytest.approx({1: 8.0, 2: 5.5})
    assert scalars(found, "loss/held_out") == {2: 5.0}
    assert scalars(found, "bits_per_byte/held_out") == {2: 1.25}
    assert scalars(found, "loss/held_out_mtp_1") == {2: 3.5}
    assert scalars(found, "speed/mfu") == pytest.approx({1: 0.43})
    assert scalars(found, "optimizer/learning_rate") == pytest.approx({1: 3e-4, 2: 3e-4})
    assert scalars(found, "max_violation/layer_03") == pytest.approx(
        {1: 0.4737, 2: 0.4737}, abs=1e-4
    )
    assert scalars(found, "bias_max/layer_02") == pytest.approx({1: 0.04, 2: 0.04})
    tags = found.Tags()
    assert "loss/z" not in tags["scalars"] and "loss/sequence_balance" in tags["scalars"]
    assert tags["images"] == ["experts/load_of_layers"]
    assert [event.step for event in found.Images("experts/load_of_layers")] == [1]
    assert len(found.Histograms("load_over_mean/layer_01")) == 1


def test_resumed_run_voids_later_points(tmp_path: Path) -> None:
    files = TensorBoardFiles(tmp_path, start())
    for number in range(1, 6):
        files.step(step(number, loss=1.0))
    files.close()
    files = TensorBoardFiles(tmp_path, start(3))
    files.step(step(4, loss=2.0))
    files.close()
    assert scalars(read(tmp_path), "loss/train") == {1: 1.0, 2: 1.0, 3: 1.0, 4: 2.0}


def test_loads_as_colours() -> None:
    picture = load_picture([layer(1, [1, 1, 4]), layer(2, [2, 2, 2]), layer(3, [0, 3, 3])])
    assert picture.shape == (24, 24, 3) and picture.dtype == np.uint8
    even = (247, 247, 247)
    assert tuple(picture[8, 0]) == tuple(picture[15, 23]) == even
    assert tuple(picture[0, 23]) == (178, 60, 20)  # twice the mean
    assert tuple(picture[23, 0]) == (33, 102, 172)  # no load


def test_folder_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "tensorboard").write_text("")
    with pytest.raises(UserError, match="TensorBoard files cannot be written"):
        TensorBoardFiles(tmp_path / "tensorboard", start())


def test_a_full_disk_is_reported_once(tmp_path: Path) -> None:
    """Regression: the traceback of a thread before the line that says the same; those of others
    are shown.
    """
    told: list[object] = []
    before = threading.excepthook
    threading.excepthook = lambda arguments: told.append(arguments.exc_value)
    try:
        files = TensorBoardFiles(tmp_path, start())
        queue = files._writer.file_writer.event_writer._async_writer  # pyright: ignore
        queue._writer.write = Mock(side_effect=OSError(errno.ENOSPC, "No space left on device"))
        with pytest.raises(UserError, match=r"TensorBoard files cannot be written .No space left"):
            for number in range(1, 200):
                files.step(step(number))
        fault = OSError("another")
        other = threading.Thread(target=Mock(side_effect=fault))
        other.start()
        other.join()
    finally:
        threading.excepthook = before
    assert told == [fault]
