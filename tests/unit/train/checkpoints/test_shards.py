"""Checkpoints that several processes write: a part each, then one commit."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from lowlat.train.checkpoints.errors import CheckpointWriteError
from lowlat.train.checkpoints.run_folder import RunFolder
from lowlat.train.checkpoints.store import CheckpointStore
from tests.train_faults.states import assert_is, facts, saves_in, state
from tests.train_faults.tracing import in_child


@pytest.fixture
def run(tmp_path: Path) -> Iterator[RunFolder]:
    with RunFolder(tmp_path / "run") as run:
        saves_in(run).write(1, state(1), facts(1))
        yield run


def write_parts(saves: CheckpointStore, step: int) -> list[str]:
    for part, tensors in state(step).items():
        saves.write_shard(step, part, tensors)
    return list(state(step))


def test_processes_write_a_part_each(run: RunFolder) -> None:
    """The others neither hold the run nor are its children's children: the path is enough."""
    saves = saves_in(run)
    for part, tensors in state(2).items():

        def work(part: str = part, tensors: list = tensors) -> None:
            other = RunFolder(run.path)
            saves_in(other).write_shard(2, part, tensors)

        assert in_child(work) == 0
    assert saves.steps() == [1]
    assert saves.commit(2, list(state(2)), facts(2)) == run.checkpoints / "step-00000002"
    assert_is(saves.latest(), 2)
    assert_is(CheckpointStore(RunFolder(run.path), report=print).open(2), 2)
    names = {entry.name for entry in (run.checkpoints / "step-00000002").iterdir()}
    assert names == {
        "facts.json",
        "manifest.json",
        "model.safetensors",
        "optimizer.safetensors",
    }


def test_many_parts(run: RunFolder) -> None:
    saves = saves_in(run)
    parts = [f"state-{rank:05}-of-00013" for rank in range(13)]
    for rank, part in enumerate(parts):
        saves.write_shard(2, part, [(f"weight.{rank}", torch.full((rank,), float(rank)))])
    saves.commit(2, parts, facts(2))
    save = saves.latest()
    assert save is not None and len(save.names()) == 13
    assert all(
        torch.equal(save.tensor(f"weight.{r}"), torch.full((r,), 1.0 * r)) for r in range(13)
    )


def damage_missing(partial: Path) -> None:
    (partial / "model.part.json").unlink()


def damage_no_file(partial: Path) -> None:
    (partial / "model.safetensors").unlink()


def damage_short(partial: Path) -> None:
    os.truncate(partial / "model.safetensors", 100)


def damage_undeclared(partial: Path) -> None:
    (partial / "third.safetensors").write_bytes(b"x")


def damage_record(partial: Path) -> None:
    (partial / "model.part.json").write_text('{"size": "many"}')


def damage_no_record(partial: Path) -> None:
    (partial / "model.part.json").write_text("[]")


@pytest.mark.parametrize(
    ("damage", "error"),
    [
        (damage_missing, "shard model was not written"),
        (damage_no_file, "cannot be read"),
        (damage_short, "shard model has 100 bytes, its writer wrote"),
        (damage_undeclared, "third.safetensors belongs to no shard"),
        (damage_record, "digest of shard model"),
        (damage_no_record, "must hold a JSON object"),
    ],
)
def test_incomplete_saves_are_refused(
    run: RunFolder, damage: Callable[[Path], None], error: str
) -> None:
    """Nothing of the attempt stays, and the next save of the same step can be written."""
    saves = saves_in(run)
    parts = write_parts(saves, 2)
    damage(run.checkpoints / ".step-00000002.writing")
    with pytest.raises(
        CheckpointWriteError, match=rf"checkpoint of step 2: .*{error}.* newest is .* step 1"
    ):
        saves.commit(2, parts, facts(2))
    assert [entry.name for entry in run.checkpoints.iterdir()] == ["step-00000001"]
    saves.commit(2, write_parts(saves, 2), facts(2))
    assert_is(saves.latest(), 2)


def test_parts_that_share_a_tensor_are_refused(run: RunFolder) -> None:
    saves = saves_in(run)
    for part in ("a", "b"):
        saves.write_shard(2, part, [("weight", torch.ones(3))])
    with pytest.raises(CheckpointWriteError, match="'weight' is in two shards"):
        saves.commit(2, ["a", "b"], {})


def test_a_part_written_again_replaces_the_first(run: RunFolder) -> None:
    """A retry after an interrupted attempt does not stumble over what that left."""
    saves = saves_in(run)
    saves.write_shard(2, "model", [("weight", torch.ones(3))])
    saves.commit(2, write_parts(saves, 2), facts(2))
    assert_is(saves.latest(), 2)


def test_no_process_wrote(run: RunFolder) -> None:
    with pytest.raises(CheckpointWriteError, match="shard model was not written"):
        saves_in(run).commit(2, ["model"], {})
