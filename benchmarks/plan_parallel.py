"""Compare `lowlat plan serve --machine here --parallel` with `lowlat bench --parallel`.

    python benchmarks/plan_parallel.py MODEL --parallel tensor=2 [--rounds 5] [--out FOLDER]
    sudo python benchmarks/plan_parallel.py MODEL --parallel tensor=2 --network 0.125 --latency 500

Each of two processes has a processor of its own. --network, in GB/s: they are in two network
namespaces, and tc's tbf limits the link between them; --latency: microseconds by which every
message is delayed (`delayed_messages`). Plan and benchmark alternate and run under the same
conditions; the ratio is that of the medians. Exits with 1 if one of them is not within 20 %.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import results_file
from lost_process import ADDRESSES, INNER, NAMESPACE, OUTER, namespace, node
from serving.servers import free_port

LAUNCHER = [sys.executable, "-m", "torch.distributed.run"]
DELAYED = str(Path(__file__).with_name("delayed_messages.py"))
BURST = "64kb"
MOST_ERROR = 0.2


def run(args: argparse.Namespace, verb: Sequence[str], topology: Path) -> dict[str, Any]:
    """The JSON object of a verb of lowlat in two processes."""
    program = ["-m", "lowlat"] if args.latency is None else [DELAYED, str(args.latency)]
    command = [*program, *verb, "--parallel", args.parallel, "--dtype", args.dtype, "--json"]
    if args.network is None:
        environment = os.environ | {"LOWLAT_TOPOLOGY": str(topology)}
        launched = [*LAUNCHER, "--standalone", "--nproc-per-node=2", *command]
        return json.loads(output(launched, environment))
    nodes = ["--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d"]
    nodes.append(f"--rdzv-endpoint={ADDRESSES[OUTER]}:{free_port()}")
    first, second = (
        (["taskset", "-c", str(number), *command], os.environ | settings)
        for number, (command, settings) in enumerate(
            node(LAUNCHER, nodes, command, number, interface)
            for number, interface in enumerate((OUTER, INNER))
        )
    )
    inside = ["ip", "netns", "exec", NAMESPACE, *second[0]]
    with subprocess.Popen(inside, env=second[1], stdout=subprocess.DEVNULL) as other:
        try:
            found = json.loads(output(*first))
        except BaseException:
            other.terminate()  # it would wait for the first one
            raise
    return found


def output(command: Sequence[str], environment: dict[str, str]) -> str:
    return subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, text=True, check=True
    ).stdout


@contextlib.contextmanager
def network(rate: float | None) -> Iterator[None]:
    """Two network namespaces whose link has `rate` GB/s in each direction; None: no namespaces."""
    if rate is None:
        yield
        return
    limit = ["root", "tbf", "rate", f"{8e9 * rate:.0f}bit", "burst", BURST, "latency", "100ms"]
    with namespace():
        subprocess.run(["tc", "qdisc", "add", "dev", OUTER, *limit], check=True)
        inside = ["ip", "netns", "exec", NAMESPACE, "tc", "qdisc", "add", "dev", INNER, *limit]
        subprocess.run(inside, check=True)
        yield


def measure(args: argparse.Namespace, topology: Path) -> dict[str, list[float]]:
    """Decoded tokens per second, and seconds to the first token, of every round."""
    found: dict[str, list[float]] = {}
    plan = ["plan", "serve", args.model, "--machine", "here", "--context", str(args.context)]
    plan += ["--prompt", str(args.prompt)]
    bench = ["bench", args.model, "--decode", str(args.context), "--prefill", str(args.prompt)]
    bench += ["--rounds", "1"]
    for _ in range(args.rounds):
        layouts = run(args, plan, topology)["layouts"]
        if not layouts:
            sys.exit(f"the memory of this machine does not hold {args.model}")
        planned, rows = layouts[0], run(args, bench, topology)["rows"]
        for row in rows:
            if row["not_measured"]:
                sys.exit(f"{row['kind']} was not measured: {row['not_measured']}")
        speed = {row["kind"]: row["tokens_per_second"] for row in rows}
        for name, value in (
            ("planned_decode", planned["tokens_per_second"]),
            ("decode", speed["decode"]),
            ("planned_first_token", planned["first_token_seconds"]),
            ("first_token", args.prompt / speed["prefill"]),
        ):
            found.setdefault(name, []).append(value)
        print({name: round(values[-1], 3) for name, values in found.items()}, flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--parallel", default="tensor=2")
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--prompt", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--network", type=float, help="GB/s")
    parser.add_argument("--latency", type=float, help="microseconds")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, network(args.network):
        topology = Path(folder, "nodes")
        topology.write_text("0,0,0\n1,1,1\n")
        found = measure(args, topology)
    medians = {name: statistics.median(values) for name, values in found.items()}
    ratios = {
        name: medians[name] / medians[f"planned_{name}"] for name in ("decode", "first_token")
    }
    print(
        f"{args.parallel}: decode with {args.context:,} cached: plan "
        f"{medians['planned_decode']:.1f} tok/s, measured {medians['decode']:.1f} "
        f"({ratios['decode']:.2f}x); prompt of {args.prompt:,}: plan "
        f"{medians['planned_first_token']:.2f} s, measured {medians['first_token']:.2f} s "
        f"({ratios['first_token']:.2f}x)"
    )
    if args.out is not None:
        options = {"options": {k: str(v) for k, v in vars(args).items()}}
        results_file.write(results_file.heading() | options | {**found, "ratios": ratios}, args.out)
    if any(abs(ratio - 1) > MOST_ERROR for ratio in ratios.values()):
        sys.exit("not within 20 %")


if __name__ == "__main__":
    main()
