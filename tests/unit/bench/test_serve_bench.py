"""benchmarks/serve.py: equal work for all, figures that hold, faults that show. No timing."""

import asyncio
import importlib
import importlib.util
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from lowlat.utils.errors import UserError

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"
FAKE = Path(__file__).parent / "fake_openai.py"


@pytest.fixture(autouse=True)
def benchmarks_path(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The benchmarks lie outside the package and import one another by `serving.`."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield


def module(name: str) -> ModuleType:
    return importlib.import_module(name)


def serve_benchmark() -> ModuleType:
    """By its file: `serve` is the name of a folder of tests, too."""
    path = BENCHMARKS / "serve.py"
    spec = importlib.util.spec_from_file_location("serve_benchmark", path)
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def program(*arguments: str) -> object:
    command = [sys.executable, str(FAKE), *arguments]
    return module("serving.servers").Program(name="fake", command=command)


def test_work_repeats_for_a_seed_and_keeps_its_lengths() -> None:
    workload = module("serving.workload")
    prompt, output = workload.parse_span("--prompt", "5:40"), workload.parse_span("--output", "7")

    def draw(seed: int) -> list:
        return workload.draw_work(
            50, prompt=prompt, output=output, shared=3, vocab_size=97, seed=seed
        )

    work = draw(1)
    assert work == draw(1) != draw(2)
    assert {one.output for one in work} == {7}
    assert {len(one.prompt) for one in work} <= set(range(5, 41))
    assert len({one.prompt[:3] for one in work}) == 1
    assert len({one.prompt for one in work}) == 50
    assert all(3 <= token < 97 for one in work for token in one.prompt)


def test_lengths_are_log_uniform() -> None:
    span = module("serving.workload").Span(low=10, high=1000)
    drawn = [span.draw(random.Random(seed)) for seed in range(2000)]
    assert min(drawn) == 10 and 950 < max(drawn) <= 1000
    assert 0.45 < sum(length < 100 for length in drawn) / 2000 < 0.55


@pytest.mark.parametrize("text", ["", "0", "9:3", "1:2:3", "-1", "4k"])
def test_lengths_that_are_none_are_named(text: str) -> None:
    with pytest.raises(UserError, match=r"^--prompt"):
        module("serving.workload").parse_span("--prompt", text)


def test_percentiles_by_hand() -> None:
    percentile = module("serving.figures").percentile
    values = [float(v) for v in range(1, 101)]
    assert (percentile(values, 0.5), percentile(values, 0.99)) == (50.0, 99.0)
    assert percentile([3.0], 0.99) == 3.0


def answer(started: float, pieces: list[float], error: str | None = None) -> object:
    return module("serving.client").Answer(
        started=started,
        pieces=pieces,
        ended=pieces[-1],
        prompt_tokens=10,
        output_tokens=len(pieces),
        error=error,
    )


def test_figures_by_hand() -> None:
    figures = module("serving.figures")

    def turn(server: str, slower: float) -> object:
        answers = [
            answer(0.0, [slower * t for t in (1.0, 2.0, 4.0)]),
            answer(1.0, [1.0 + slower * t for t in (2.0, 3.0, 4.0)]),
            answer(0.0, [0.5], error="HTTP 500"),
        ]
        return figures.Turn(
            server=server, concurrency=2, round=0, seconds=4 * slower, answers=answers
        )

    own, peer = figures.rows_of([turn("peer", 2.0), turn("lowlat", 1.0)])
    assert own["server"] == "lowlat" and own["failed"] == peer["failed"] == 1
    assert own["output_per_second"] == 6 / 4 and own["total_per_second"] == 26 / 4
    assert (own["ttft_p50"], own["ttft_p99"]) == (1.0, 2.0)
    assert (own["itl_p50"], own["itl_p99"], own["tpot_p50"]) == (1.0, 2.0, 1.0)
    assert "ratios" not in peer
    assert own["ratios"] == {name: pytest.approx(2.0) for name in own["ratios"]}
    assert len(own["ratios"]) == 7
    assert "| 2 | lowlat | 1.5 | 6.5 | 1,000 | 2,000 | 1,000 | 2,000 | 1 |" in figures.table(
        [own, peer]
    )


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (None, None),
        ("short", "4 tokens instead of 5"),
        ("http", 'HTTP 500: {"error": {"message": "out of tea"}}'),
        ("stream", 'error in the stream: {"message": "the model is tired"}'),
    ],
)
def test_answers_of_a_server(tmp_path: Path, fault: str | None, message: str | None) -> None:
    """A server that gives less than asked for must not look fast."""
    client, servers, workload = (
        module(f"serving.{name}") for name in ("client", "servers", "workload")
    )
    faults = () if fault is None else ("--fault", fault)
    work = [workload.Work(prompt=(5, 6, 7), output=5)] * 6
    with servers.Server(program(*faults), threads=1, folder=tmp_path) as server:
        server.wait_ready()
        server.stop()
        server.resume()
        answers = asyncio.run(client.ask_all(server.url, work, "model", {}, 2))
    assert [one.error for one in answers] == [message] * 6
    if fault is None:
        assert all(len(one.pieces) == 5 and one.prompt_tokens == 3 for one in answers)
        assert all(one.started <= one.pieces[0] <= one.ended for one in answers)


RULE = "=" * 60
TORCHRUN = f"""torch.distributed.elastic.multiprocessing.errors.ChildFailedError:
{RULE}
Root Cause (first observed failure):
[0]:
  rank      : 0 (local_rank: 0)
  exitcode  : -9 (pid: 123)
  error_file: <N/A>
  traceback : Signal 9 (SIGKILL) received by PID 123
{RULE}"""


@pytest.mark.parametrize(
    ("log", "reason"),
    [
        ("no model", "no model"),
        (f"lowlat: error: no model\n{TORCHRUN}", "lowlat: error: no model"),
        (TORCHRUN, "exitcode  : -9"),
    ],
    ids=["line", "torchrun", "killed"],
)
def test_a_server_that_ends_is_reported_with_its_error(
    tmp_path: Path, log: str, reason: str
) -> None:
    servers = module("serving.servers")
    broken = servers.Program(name="broken", command=[sys.executable, "-c", f"print({log!r})"])
    with servers.Server(broken, threads=1, folder=tmp_path) as server:
        with pytest.raises(UserError, match=f"broken ended while it started: {reason}"):
            server.wait_ready()


def test_peers_that_cannot_be_run_are_named(tmp_path: Path) -> None:
    serve = serve_benchmark()
    setup = module("serving.servers").Setup(
        model="m", dtype="int8", threads=1, context=64, concurrency=4
    )
    with pytest.raises(UserError, match="--llama and --gguf go together"):
        serve.programs_of(serve.parse(["m", "--llama", "x"]), setup)
    with pytest.raises(UserError, match="vllm has no int8"):
        serve.programs_of(serve.parse(["m", "--vllm", "python"]), setup)


def test_every_token_of_a_vocabulary_is_text(tmp_path: Path) -> None:
    """Regression: servers that answer with nothing where a token has no bytes of its own, or that
    cut an answer off where its bytes are no UTF-8.
    """
    import tokenizers

    from lowlat.text.tokenizer import Tokenizer

    from .benchmarks import random_checkpoint

    for name, data in random_checkpoint().tokenizer_files(300).items():
        (tmp_path / name).write_bytes(data)
    tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    texts, types = module("serving.gguf_vocab").vocabulary(Tokenizer.from_folder(tmp_path), 300)
    assert len(set(texts)) == len(texts) == len(types) == 300
    assert {text for text, kind in zip(texts, types, strict=True) if kind == 6} == {
        f"<0x{value:02X}>".encode() for value in range(128)
    }
    assert {f"<|bytes {value:02x}|>".encode() for value in range(128, 256)} < set(texts)
    assert types[256:258] == [3, 3] and texts[299] == "filler▁299".encode()
