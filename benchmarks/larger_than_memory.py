"""Inference with a memory limit of half the checkpoint: same tokens as in memory, and the speed.

    sudo python benchmarks/larger_than_memory.py CHECKPOINT [--parallel pipeline=2]
        [--kept benchmarks/results/NAME]

Generates with and without a control group's memory limit of half the checkpoint's size, each in its
own process after dropping the files from the page cache. With --parallel, the limit is that of each
of several processes under torchrun. Prints one JSON object; exits with 1 if the tokens differ.
Needs Linux and the right to create a control group.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import results_file

from lowlat.config.serving_layout import ServingLayout

GROUP = "lowlat_larger_than_memory"
PROMPT = [5, 77, 1234, 900, 31, 8]
TOKENS = 16

CHILD = """
import json, os, sys, time
if groups := sys.argv[5:]:
    with open(groups[int(os.environ.get("RANK", "0"))], "w") as file:
        file.write(str(os.getpid()))
import lowlat
start = time.perf_counter()
model = lowlat.load(sys.argv[1], dtype="auto", parallel=sys.argv[4] or None)
loaded = time.perf_counter()
answer = model.generate(json.loads(sys.argv[2]), max_tokens=int(sys.argv[3]), temperature=0,
                        ignore_eos=True)
print(json.dumps({"tokens": list(answer.token_ids), "load_s": loaded - start,
                  "tokens_per_s": int(sys.argv[3]) / (time.perf_counter() - loaded)}))
"""


class ControlGroup:
    """A memory limit for process `rank`, by cgroup 2 or cgroup 1."""

    def __init__(self, limit: int, rank: int = 0) -> None:
        root = Path("/sys/fs/cgroup")
        self.is_second = (root / "cgroup.controllers").exists()
        self.folder = (root if self.is_second else root / "memory") / f"{GROUP}_{rank}"
        self.folder.mkdir(exist_ok=True)
        name = "memory.max" if self.is_second else "memory.limit_in_bytes"
        (self.folder / name).write_text(str(limit))

    @property
    def processes(self) -> Path:
        """The file that adds processes to the group."""
        return self.folder / "cgroup.procs"

    def join(self) -> None:
        """Add the current process; called in a child before its program starts."""
        self.processes.write_text(str(os.getpid()))

    def peak(self) -> int:
        """Peak memory in bytes, with cached file pages."""
        name = "memory.peak" if self.is_second else "memory.max_usage_in_bytes"
        return int((self.folder / name).read_text())

    def remove(self) -> None:
        self.folder.rmdir()


def forget(folder: Path) -> int:
    """Drop the checkpoint's files from the page cache, so that reads count in the control group.
    Returns their size in bytes."""
    total = 0
    for file in folder.glob("*.safetensors"):
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
        total += file.stat().st_size
    return total


def generate(
    folder: Path, groups: Sequence[ControlGroup] = (), parallel: str = ""
) -> dict[str, object]:
    """Tokens and speed of a fresh process, or of as many as `groups` with the layout `parallel`."""
    forget(folder)
    launcher = [sys.executable]
    if parallel:
        nodes = ["--standalone", f"--nproc-per-node={len(groups)}"]
        launcher += ["-m", "torch.distributed.run", *nodes]
    with tempfile.NamedTemporaryFile("w", suffix=".py") as program:
        program.write(CHILD)
        program.flush()
        arguments = [program.name, str(folder), json.dumps(PROMPT), str(TOKENS), parallel]
        files = [str(group.processes) for group in groups]
        command = [*launcher, *arguments, *files]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--parallel", default="", help="layout of several processes")
    parser.add_argument("--kept", type=Path, help="folder to keep results.json in")
    given = parser.parse_args()
    folder = given.checkpoint
    size = forget(folder)
    free = generate(folder)
    count = ServingLayout.parse(given.parallel).processes if given.parallel else 1
    groups = [ControlGroup(size // 2, rank) for rank in range(count)]
    try:
        limited = generate(folder, groups, given.parallel)
        peaks = [group.peak() for group in groups]
    finally:
        for group in groups:
            group.remove()
    same = free["tokens"] == limited["tokens"]
    report = {"checkpoint_bytes": size, "limit_bytes": size // 2, "peak_bytes": peaks, "same": same}
    report |= {"in_memory": free, "limited": limited}
    print(json.dumps(report, indent=2))
    if given.kept is not None:
        results_file.write(results_file.heading() | report, given.kept)
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
