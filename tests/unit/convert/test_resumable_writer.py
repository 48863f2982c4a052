"""Conversions that end in the middle: what is left, and that the same call resumes from there."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lowlat.checkpoint import resumable_writer
from lowlat.checkpoint.file_layout import Segment
from lowlat.checkpoint.resumable_writer import partial_path
from lowlat.convert.run import convert
from lowlat.utils.atomic_files import rename_new
from lowlat.utils.errors import UserError
from tests import forked
from tests.parameters import slow_except
from tests.unit.checkpoint.builders import FAMILIES, edit_config, rewrite, write_model

FAMILY = "deepseek_v3-mtp"


@pytest.fixture(params=["new", "new.gguf"], ids=["hf", "gguf"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A destination; the source is next to it as `m`, its finished conversion as `whole`."""
    write_model(tmp_path / "m", FAMILIES[FAMILY])
    convert(tmp_path / "m", tmp_path / f"whole{Path(request.param).suffix}", dtype="int8")
    return tmp_path / request.param


def again(place: Path) -> None:
    convert(place.parent / "m", place, dtype="int8")


def contents(path: Path) -> dict[str, bytes]:
    if path.is_file():
        return {"": path.read_bytes().replace(b"whole", b"new")}
    return {file.name: file.read_bytes() for file in path.iterdir()}


def assert_whole(place: Path) -> None:
    whole = place.with_name(f"whole{place.suffix}")
    found, expected = contents(place), contents(whole)
    assert found.keys() == expected.keys()
    if place.suffix:  # general.name differs in length
        found, expected = ({"": text[""][-20000:]} for text in (found, expected))
    assert found == expected
    assert not partial_path(place).exists()


class Counted:
    """`resumable_writer._write`, counted, failing when a number of segments are done."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.written: list[str] = []
        self.limit, self.fault = sys.maxsize, Exception()
        self._real: Callable[[Any, Segment], str] = resumable_writer._write
        monkeypatch.setattr(resumable_writer, "_write", self)

    def __call__(self, out: Any, segment: Segment) -> str:
        if len(self.written) == self.limit:
            raise self.fault
        digest = self._real(out, segment)
        self.written.append(segment.label)
        return digest

    def stop_after(self, count: int, fault: BaseException) -> None:
        self.written.clear()
        self.limit, self.fault = count, fault  # pyright: ignore[reportAttributeAccessIssue]


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch, place: Path) -> Counted:
    return Counted(monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("done", [0, 1, 7])
def test_ctrl_c_and_on(place: Path, counted: Counted, done: int) -> None:
    """Nothing under the destination's name; then only what is missing is made."""
    counted.stop_after(sys.maxsize, Exception())
    again(place)
    total = len(counted.written)
    if place.is_file():
        place.unlink()
    else:
        shutil.rmtree(place)
    counted.stop_after(done, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        again(place)
    assert not place.exists() and partial_path(place).is_dir()
    counted.stop_after(sys.maxsize, Exception())
    again(place)
    assert len(counted.written) == total - done
    assert_whole(place)


def test_damage_in_what_is_there_is_made_good(place: Path, counted: Counted) -> None:
    """A flipped bit in a finished tensor, and a torn last line of the journal."""
    counted.stop_after(9, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        again(place)
    file = next(iter((partial_path(place) / "out").iterdir()))
    with file.open("r+b") as out:
        out.seek(-1, os.SEEK_END)
        last = out.read(1)
        out.seek(-1, os.SEEK_END)
        out.write(bytes([last[0] ^ 4]))
    with (partial_path(place) / "journal.jsonl").open("ab") as journal:
        journal.write(b'{"file": "mod')
    damaged = counted.written[-1]
    counted.stop_after(sys.maxsize, Exception())
    again(place)
    assert counted.written[0] == damaged
    assert_whole(place)


@pytest.mark.parametrize("change", slow_except(["weights"], ["options", "weights", "config"]))
def test_another_conversion_is_not_resumed(place: Path, counted: Counted, change: str) -> None:
    counted.stop_after(5, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        again(place)
    counted.stop_after(sys.maxsize, Exception())
    source, dtype = place.parent / "m", "int8"
    if change == "weights":
        rewrite(source, lambda tensors: tensors["model.norm.weight"].fill_(1))
    elif change == "config":
        edit_config(source, rms_norm_eps=1e-6)
    else:
        dtype = "int4"
    what = "options" if change == "options" else "source"
    message = f"unfinished conversion that differs in its {what} .it was .*now"
    with pytest.raises(UserError, match=message):
        convert(source, place, dtype=dtype)
    assert partial_path(place).is_dir()  # it may still be finished


def test_two_at_once(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, tried = resumable_writer._write, []

    def write(out: Any, segment: Segment) -> str:
        if not tried:
            tried.append(segment)
            with pytest.raises(UserError, match="another process is writing it"):
                again(place)
        return real(out, segment)

    monkeypatch.setattr(resumable_writer, "_write", write)
    again(place)
    assert tried
    assert_whole(place)


def test_a_full_disk_is_said_before(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The room that is left free counted."""
    usage = resumable_writer.shutil.disk_usage(place.parent)._replace(
        free=resumable_writer.SPARE_BYTES
    )
    monkeypatch.setattr(resumable_writer.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(
        UserError, match=r"17 MB are needed, 16 MB are free on its disk; free some space"
    ):
        again(place)
    assert not partial_path(place).exists() and not place.exists()


def test_a_full_disk_in_the_middle(place: Path, counted: Counted) -> None:
    counted.stop_after(6, OSError(28, "No space left on device"))
    with pytest.raises(UserError, match=r"cannot be written \(No space left.*the same command"):
        again(place)
    counted.stop_after(sys.maxsize, Exception())
    again(place)
    assert_whole(place)


def test_what_would_fail_again_is_not_kept(place: Path) -> None:
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    rewrite(place.parent / "m", lambda tensors: tensors[name][0].fill_(1e6))
    with pytest.raises(UserError, match=r"beyond the range of fp16"):
        convert(place.parent / "m", place, dtype="fp16")
    assert not partial_path(place).exists() and not place.exists()


@pytest.mark.slow
def test_a_destination_that_appears_meanwhile_costs_no_work(
    place: Path, counted: Counted, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rename_late(made: Path, destination: Path) -> None:
        place.write_text("mine")
        rename_new(made, destination)

    with monkeypatch.context() as patch:
        patch.setattr(resumable_writer, "rename_new", rename_late)
        with pytest.raises(UserError, match="exists already"):
            again(place)
    assert place.read_text() == "mine"
    place.unlink()
    counted.written.clear()
    again(place)
    assert counted.written == []
    assert_whole(place)


def test_an_existing_destination_is_left_alone(place: Path) -> None:
    place.write_text("mine")
    with pytest.raises(UserError, match="exists already"):
        again(place)
    assert place.read_text() == "mine"


CHILD = """
import sys
from pathlib import Path
from lowlat.checkpoint import resumable_writer
from lowlat.convert.run import convert

real = resumable_writer._write
def write(out, segment):
    digest = real(out, segment)
    print(segment.label, flush=True)
    sys.stdin.readline()
    return digest
resumable_writer._write = write
convert(Path(sys.argv[1]), Path(sys.argv[2]), dtype="int8")
"""


def killed(place: Path, segments: int) -> list[str]:
    """A conversion in a process of its own, killed -9 after a number of segments."""
    arguments = [sys.executable, "-c", CHILD, str(place.parent / "m"), str(place)]
    labels = []
    with forked.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdin is not None and child.stdout is not None
        for _ in range(segments):
            labels.append(child.stdout.readline().strip())
            if len(labels) < segments:
                child.stdin.write("\n")
                child.stdin.flush()
        child.send_signal(signal.SIGKILL)
    return labels


@pytest.mark.slow
def test_killed(place: Path, counted: Counted) -> None:
    labels = killed(place, 4)
    again(place)
    # the last had no time to be noted, or had
    assert set(labels[:3]).isdisjoint(counted.written)
    assert_whole(place)


MEMORY = """
import resource, sys
from pathlib import Path
from lowlat.convert.run import convert

def anonymous():
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024

import threading, time
peak, done = [anonymous()], []
def watch():
    while not done:
        peak[0] = max(peak[0], anonymous())
        time.sleep(0.002)
before = peak[0]
watcher = threading.Thread(target=watch)
watcher.start()
convert(Path(sys.argv[1]), Path(sys.argv[2]), dtype=sys.argv[3])
done.append(1)
watcher.join()
print(peak[0] - before)
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Matrices of 262 MB in fp32 and stacked experts of 50 MB."""
    config = FAMILIES["deepseek_v3"]
    assert config.moe is not None
    moe = replace(config.moe, moe_intermediate_size=512)
    folder = tmp_path_factory.mktemp("large") / "m"
    write_model(folder, replace(config, hidden_size=2048, vocab_size=32000, moe=moe))
    return folder


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux says RssAnon")
@pytest.mark.parametrize(
    ("name", "dtype"),
    [("new", "int4"), ("new", "fp8"), ("new", "fp32"), ("new.gguf", "int8"), ("new.gguf", "fp32")],
)
def test_memory_does_not_grow_with_tensors(
    large: Path, tmp_path: Path, name: str, dtype: str
) -> None:
    """Less than the largest matrix takes."""
    arguments = [sys.executable, "-c", MEMORY, str(large), str(tmp_path / name), dtype]
    done = forked.run(arguments, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 160_000_000
