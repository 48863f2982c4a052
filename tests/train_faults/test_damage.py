"""Corrupt checkpoints: all are noticed, the one before is used, and one line reports it."""

import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lowlat.train.checkpoints.run_folder import RunFolder
from lowlat.train.checkpoints.store import CheckpointStore
from lowlat.utils.errors import UserError

from .states import assert_is, facts, make_run, saves_in, state

FLIPS = 200
FILES = ("manifest.json", "facts.json", "state.safetensors")


@pytest.fixture
def reports() -> list[str]:
    return []


@pytest.fixture
def saves(tmp_path: Path, reports: list[str]) -> Iterator[CheckpointStore]:
    """Whole saves of steps 1 and 2."""
    with RunFolder(make_run(tmp_path / "run", 1, 2)) as run:
        yield saves_in(run, reports.append)


def newest(saves: CheckpointStore) -> Path:
    return saves.folder / "step-00000002"


def check_passed_over(saves: CheckpointStore, reports: list[str], fault: str) -> None:
    """Save 1 is loaded, save 2 kept aside as it is, and one line says why."""
    damaged = {entry.name for entry in newest(saves).iterdir()}
    assert_is(saves.latest(), 1)
    assert len(reports) == 1 and "\n" not in reports[0]
    line = reports.pop()
    assert line.startswith(f"{newest(saves)}: ") and fault in line
    assert line.endswith(
        "; step-00000001 is used instead, this one is renamed to step-00000002.broken"
    )
    aside = newest(saves).with_name("step-00000002.broken")
    assert {entry.name for entry in aside.iterdir()} == damaged
    assert saves.steps() == [1]


def test_flipped_bits(saves: CheckpointStore, reports: list[str]) -> None:
    """200 single bits, drawn evenly over the kinds of files and then over a file's bits."""
    chance = random.Random(0)
    for number in range(FLIPS):
        file = newest(saves) / FILES[number % len(FILES)]
        content = bytearray(file.read_bytes())
        bit = chance.randrange(8 * len(content))
        content[bit // 8] ^= 1 << bit % 8
        file.write_bytes(content)
        check_passed_over(saves, reports, "")
        content[bit // 8] ^= 1 << bit % 8
        aside = newest(saves).with_name("step-00000002.broken")
        (aside / file.name).write_bytes(content)
        aside.rename(newest(saves))
        assert_is(saves.latest(), 2)


@pytest.mark.parametrize("name", FILES)
def test_every_length(saves: CheckpointStore, reports: list[str], name: str) -> None:
    """Files cut short or with more at their end."""
    file = newest(saves) / name
    whole = file.read_bytes()
    lengths = sorted({0, 1, 7, 8, 9, len(whole) // 2, len(whole) - 1, len(whole) + 1})
    for length in lengths:
        file.write_bytes((whole + b"\0")[:length])
        check_passed_over(saves, reports, "")
        newest(saves).with_name("step-00000002.broken").rename(newest(saves))
        file.write_bytes(whole)


def remove(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).unlink()


def add(name: str) -> Callable[[Path], object]:
    return lambda folder: shutil.copy(folder / "state.safetensors", folder / name)


def replace_by_link(folder: Path) -> None:
    original = folder / "state.safetensors"
    moved = folder.parent.parent / "elsewhere.safetensors"
    original.rename(moved)
    original.symlink_to(moved)


def replace_by_folder(folder: Path) -> None:
    (folder / "facts.json").unlink()
    (folder / "facts.json").mkdir()


def replace_by_pipe(folder: Path) -> None:
    (folder / "manifest.json").unlink()
    os.mkfifo(folder / "manifest.json")


def take_from_other_save(name: str) -> Callable[[Path], object]:
    return lambda folder: shutil.copy(folder.with_name("step-00000001") / name, folder)


def whole_other_save(folder: Path) -> None:
    shutil.rmtree(folder)
    shutil.copytree(folder.with_name("step-00000001"), folder)


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        *((remove(name), name) for name in FILES),
        (add("third.safetensors"), "'third.safetensors' does not belong to it"),
        (add("a\nb"), r"'a\nb' does not belong to it"),
        (lambda folder: (folder / "inner").mkdir(), "'inner' is not a regular file"),
        (replace_by_link, "'state.safetensors' is not a regular file"),
        (replace_by_folder, "'facts.json' is not a regular file"),
        (replace_by_pipe, "'manifest.json' is not a regular file"),
        (take_from_other_save("state.safetensors"), "'state.safetensors' is not what was written"),
        (take_from_other_save("facts.json"), "'facts.json' is not what was written"),
        (take_from_other_save("manifest.json"), "its manifest is that of step 1"),
        (whole_other_save, "its manifest is that of step 1"),
    ],
)
def test_files_that_are_other_files(
    saves: CheckpointStore, reports: list[str], damage: Callable[[Path], object], fault: str
) -> None:
    damage(newest(saves))
    check_passed_over(saves, reports, fault)


# Whoever can write files can also make a manifest that proves itself.


def sign(folder: Path, fields: dict[str, Any]) -> None:
    fields.pop("sha256", None)
    spelled = json.dumps(fields, indent=1, sort_keys=True) + "\n"
    fields["sha256"] = hashlib.sha256(spelled.encode()).hexdigest()
    text = json.dumps(fields, indent=1, sort_keys=True) + "\n"
    (folder / "manifest.json").write_text(text)


def forge(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    def damage(folder: Path) -> None:
        fields = json.loads((folder / "manifest.json").read_text())
        change(fields)
        sign(folder, fields)

    return damage


def forge_file(name: str, content: bytes) -> Callable[[Path], object]:
    """A file of that content which the manifest claims."""

    def damage(folder: Path) -> None:
        (folder / name).write_bytes(content)
        record = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        forge(lambda fields: fields["files"].update({name: record}))(folder)

    return damage


def safetensors(header: bytes, data: bytes = b"", length: int | None = None) -> bytes:
    return (len(header) if length is None else length).to_bytes(8, "little") + header + data


ENTRY = b'{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
RECORD = {"size": 1, "sha256": "0"}


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        (forge(lambda m: m["files"].update({"../step-00000001/facts.json": RECORD})), "is missing"),
        (forge(lambda m: m["files"].update({"/etc/passwd": RECORD})), "'/etc/passwd' is missing"),
        (forge(lambda m: m["files"].update({"a\nb": RECORD})), r"'a\nb' is missing"),
        (forge(lambda m: m["files"].update({"manifest.json": RECORD})), "is missing"),
        (forge(lambda m: m["files"]["facts.json"].update(size=-1)), "lacks a field or has"),
        (forge(lambda m: m["files"]["facts.json"].update(size=2**80)), "bytes, not the"),
        (forge(lambda m: m["files"]["facts.json"].update(size=True)), "lacks a field or has"),
        (forge(lambda m: m["files"]["facts.json"].pop("sha256")), "lacks a field or has"),
        (forge(lambda m: m["files"]["facts.json"].update(sha256=[1])), "is not what was written"),
        (forge(lambda m: m["files"].pop("facts.json")), "'facts.json' does not belong"),
        (forge(lambda m: m.update(files=[])), "lacks a field or has"),
        (forge(lambda m: m.update(step="2")), "lacks a field or has"),
        (forge(lambda m: m.update(step=3)), "its manifest is that of step 3"),
        (forge(lambda m: m.update(time=10**400)), "lacks a field or has"),
        (forge(lambda m: m.pop("time")), "lacks a field or has"),
        (lambda f: (f / "manifest.json").write_text("[" * 100_000), "nested too deeply"),
        (lambda f: (f / "manifest.json").write_text('{"step":1,"step":2}'), "appears twice"),
        (lambda f: (f / "manifest.json").write_text('{"time": 1e999}'), "manifest.json"),
        (lambda f: (f / "manifest.json").write_bytes(b"\xff"), "not valid JSON"),
        (lambda f: os.truncate(f / "manifest.json", 2**26), "bytes long, more than"),
        (forge_file("facts.json", b"[]"), "must hold a JSON object"),
        (forge_file("facts.json", b'{"a":1,"a":2}'), "appears twice"),
        (forge_file("facts.json", b'{"a":NaN}'), "NaN"),
        (forge_file("x.pkl", b"cos\nsystem\n"), "'x.pkl' is no shard of a checkpoint"),
        (forge_file("x.safetensors", b""), "empty"),
        (forge_file("x.safetensors", safetensors(b"{}", length=2**40)), "header length"),
        (forge_file("x.safetensors", safetensors(b"{}", length=2**20)), "truncated"),
        (forge_file("x.safetensors", safetensors(b'{"x":' + ENTRY + b"}")), "truncated"),
        (
            forge_file("x.safetensors", safetensors(b'{"steps":' + ENTRY + b"}", bytes(4))),
            "tensor 'steps' is in two shards",
        ),
        (
            forge_file(
                "x.safetensors",
                safetensors(b'{"x":' + ENTRY + b',"x":' + ENTRY + b"}", bytes(4)),
            ),
            "appears twice",
        ),
    ],
)
def test_forged_saves(
    saves: CheckpointStore, reports: list[str], damage: Callable[[Path], object], fault: str
) -> None:
    damage(newest(saves))
    check_passed_over(saves, reports, fault)


def test_a_save_of_a_later_format_is_not_broken(saves: CheckpointStore, reports: list[str]) -> None:
    """It must not be passed over for an older one, let alone moved."""
    forge(lambda manifest: manifest.update(format=2))(newest(saves))
    with pytest.raises(UserError, match=r"step-00000002: has format '2'.* continue with the"):
        saves.latest()
    assert saves.steps() == [1, 2] and reports == []


def test_several_broken_saves(tmp_path: Path, reports: list[str]) -> None:
    """One line each, both of which name the save that is used."""
    with RunFolder(make_run(tmp_path / "run")) as run:
        saves = saves_in(run, reports.append, keep_last=3)
        for step in (1, 2, 3):
            saves.write(step, state(step), facts(step))
        for step in (2, 3):
            (run.checkpoints / f"step-0000000{step}" / "facts.json").unlink()
        (run.checkpoints / "step-00000003.broken").mkdir()
        assert_is(saves.latest(), 1)
        assert [line.split("; ")[1:] for line in reports] == [
            ["step-00000001 is used instead, this one is renamed to step-00000003.broken-2"],
            ["step-00000001 is used instead, this one is renamed to step-00000002.broken"],
        ]


def test_no_whole_save(saves: CheckpointStore, reports: list[str]) -> None:
    """Regression: a run that begins from the start over its broken saves, at the second try."""
    for step in (1, 2):
        (saves.folder / f"step-0000000{step}" / "facts.json").unlink()
    for _ in range(2):
        with pytest.raises(
            UserError, match=r"no checkpoint is complete \(step-00000002: 'facts.json' is"
        ):
            saves.latest()
    assert saves.steps() == [1, 2] and reports == []
    for step in (1, 2):
        (saves.folder / f"step-0000000{step}").rename(saves.folder / f"step-0000000{step}.broken")
    with pytest.raises(UserError, match="has only corrupt checkpoints"):
        saves.latest()


def test_readers_move_nothing(saves: CheckpointStore, reports: list[str]) -> None:
    """Who does not hold the run passes over a broken save and leaves it where it is."""
    (newest(saves) / "facts.json").unlink()
    reader = saves_in(RunFolder(saves.folder.parent), reports.append)
    assert_is(reader.latest(), 1)
    assert len(reports) == 1 and reports[0].endswith("; step-00000001 is used instead")
    assert saves.steps() == [1, 2]
