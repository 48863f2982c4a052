"""Peak memory of conversions whose checkpoint is much larger than the memory limit.

    python benchmarks/random_checkpoint.py large /tmp/large
    sudo python benchmarks/convert_memory.py /tmp/large /tmp/out --limit-gb 2
        [--kept benchmarks/results/NAME]

Every conversion runs in its own control group with a memory limit, which includes cached file
pages. The page cache is dropped first. Prints one JSON object per conversion and removes the
destination. Anonymous memory (without cached files) is sampled. Needs Linux and the right to create
a control group.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import results_file
from larger_than_memory import ControlGroup, forget

CONVERSIONS = (
    ("int4", "folder"),
    ("int8", "model.gguf"),
    ("fp8", "folder"),
    ("fp32", "model.gguf"),
)


def convert(source: Path, target: Path, dtype: str, limit: int) -> dict[str, object]:
    """Memory, size and time of one conversion."""
    forget(source)
    group = ControlGroup(limit)
    boot = "from lowlat.cli.main import run; run()"
    command = [sys.executable, "-c", boot, "convert", str(source), str(target), "--dtype", dtype]
    start, anonymous = time.perf_counter(), 0
    try:
        child = subprocess.Popen(command, preexec_fn=group.join, stdout=subprocess.DEVNULL)
        while child.poll() is None:
            anonymous = max(anonymous, anonymous_bytes(child.pid))
            time.sleep(0.02)
        peak = group.peak()
    finally:
        group.remove()
    if child.returncode:
        raise SystemExit(f"{dtype} to {target.name}: exit code {child.returncode}")
    files = [target] if target.is_file() else list(target.glob("*.safetensors"))
    return {
        "dtype": dtype,
        "target": target.name,
        "source_bytes": sum(file.stat().st_size for file in source.glob("*.safetensors")),
        "target_bytes": sum(file.stat().st_size for file in files),
        "limit_bytes": limit,
        "peak_bytes": peak,
        "peak_anonymous_bytes": anonymous,
        "seconds": round(time.perf_counter() - start, 1),
    }


def anonymous_bytes(pid: int) -> int:
    """Anonymous memory of a process; 0 once it has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        return int(status.split("RssAnon:")[1].split()[0]) * 1024
    except (OSError, IndexError):
        return 0


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("out", type=Path, help="folder for destinations, created and removed")
    parser.add_argument("--limit-gb", type=float, default=2.0)
    parser.add_argument("--only", help="a dtype")
    parser.add_argument("--kept", type=Path, help="folder to keep results.json in")
    given = parser.parse_args()
    given.out.mkdir()
    rows: list[dict[str, object]] = []
    try:
        for dtype, name in CONVERSIONS:
            if given.only in (None, dtype):
                target = given.out / name
                rows.append(convert(given.checkpoint, target, dtype, int(given.limit_gb * 1e9)))
                print(json.dumps(rows[-1]), flush=True)
                target.unlink() if target.is_file() else shutil.rmtree(target)
    finally:
        shutil.rmtree(given.out)
    if given.kept is not None:
        results_file.write(results_file.heading() | {"rows": rows}, given.kept)


if __name__ == "__main__":
    main()
