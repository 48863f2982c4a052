"""The verb: exit codes, text, JSON, plot, and one line for every fault."""

import ctypes
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from lowlat.checkpoint.load import load_model
from lowlat.cli import main
from lowlat.compare.implementations import peers
from lowlat.compare.implementations.open import open_implementation
from lowlat.compare.implementations.spec import parse
from lowlat.compare.result_text import heading
from lowlat.convert.run import convert
from lowlat.peers import llama_cpp_model
from lowlat.peers.protocol import Unsupported, timed_handlers
from lowlat.utils.errors import UserError
from lowlat.utils.progress import SilentProgress
from tests.fakes import byte_tokenizer
from tests.packed_attention import PackedAttention

from .models import llama_case, v3_case, write

Invoke = Callable[..., Result]
VOCAB = 269


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that reads bytes."""
    path = write(llama_case(vocab_size=VOCAB), tmp_path_factory.mktemp("bytes"))
    byte_tokenizer().save(path)
    return path


@pytest.fixture(scope="module")
def v3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(v3_case(), tmp_path_factory.mktemp("v3"))


def invoke(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main.app, ["compare", *map(str, arguments)])


def fault(*arguments: str | Path) -> str:
    """The one line of a fault the user can mend, which ends the program with 2."""
    result = invoke(*arguments)
    assert isinstance(result.exception, UserError), result.output
    assert "\n" not in str(result.exception)
    return str(result.exception)


def test_equal_ends_with_0(folder: Path) -> None:
    result = invoke(folder, f"transformers:{folder}", "--tokens", "19")
    assert result.exit_code == 0, result.output
    assert "equal within 0.0001" in result.output and "layer 1" in result.output


def test_rounded_rows_of_a_cache_are_within_their_tolerance(folder: Path) -> None:
    """Regression: judged as fp32, every int8 cache is different and its keys are unexplained."""
    result = invoke(folder, f"{folder}@cache-int8", "--tokens", "19", "--json")
    report = json.loads(result.stdout)
    assert result.exit_code == 0 and report["tolerance"] == 0.2
    assert (report["a"]["precision"], report["a"]["cache"]) == ("fp32", None)
    assert (report["b"]["precision"], report["b"]["cache"]) == ("fp32", "int8")
    assert heading(report)[:2] == [
        f"A  {folder} (fp32)",
        f"B  {folder}@cache-int8 (fp32, int8 KV cache)",
    ]
    assert report["diagnosis"]["unexplained"] == []
    assert next(row["relative"] for row in report["parts"] if row["part"] == "v") > 1e-3
    tight = invoke(folder, f"{folder}@cache-int8", "--tokens", "19", "--tolerance", "1e-4")
    assert tight.exit_code == 1 and "first difference at layer 0 v" in tight.output


def test_different_ends_with_1_and_names_the_place(folder: Path) -> None:
    result = invoke(folder, f"{folder}@int4", "--tolerance", "0.01", "--tokens", "19")
    assert result.exit_code == 1
    assert "first difference at layer 0 q" in result.output
    assert "no known mistake; checked in A and B" in result.output.replace("\n", " ")


def test_all_lists_every_part(folder: Path) -> None:
    short, full = (invoke(folder, folder, "--tokens", "9", *more) for more in ((), ("--all",)))
    assert "k_rotated" in full.output and "post_norm" in full.output
    assert "k_rotated" not in short.output


def test_json_is_strict_and_alone_on_stdout(v3: Path) -> None:
    result = invoke(v3, f"{v3}@int4", "--json", "--start", "501", "--tokens", "17")
    report = json.loads(result.stdout, parse_constant=pytest.fail)
    assert report["format"] == 1 and report["start"] == 501 and report["tokens"] == 17
    assert (result.exit_code == 0) == report["equal"]
    assert report["a"]["precision"] == "fp32" and report["b"]["precision"] == "int4"
    blocks = {item["block"] for item in report["parts"]}
    assert blocks == {"embedding", "layer 0", "layer 1", "output", "mtp 0", "mtp 1"}
    assert {item["block"] for item in report["logits"]} == {"output", "mtp 0", "mtp 1"}
    assert {item["block"] for item in report["experts"]} == {"layer 1", "mtp 0", "mtp 1"}


def test_text_is_read_by_the_tokenizer_in_windows(folder: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The sea was calm, and the boats lay in the harbour.")
    options = ("--text", text, "--tokens", "40", "--window", "16", "--json")
    report = json.loads(invoke(folder, folder, *options).stdout)
    assert (report["tokens"], report["windows"]) == (40, 3)


@pytest.mark.parametrize("ending", [pytest.param("svg", marks=pytest.mark.slow), "png"])
def test_plot_is_written(v3: Path, tmp_path: Path, ending: str) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / f"plot.{ending}"
    invoke(v3, f"{v3}@bf16", "--plot", path, "--tokens", "9")
    assert path.stat().st_size > 5000


def test_faults_of_the_sides(folder: Path, v3: Path, tmp_path: Path) -> None:
    assert "does not exist" in fault(tmp_path / "none", folder)
    assert "vocab_size is 269 and 97" in fault(folder, v3)
    assert "holds no fp8 blocks" in fault(folder, f"{folder}@fp8")
    assert "option 'fast' is unknown" in fault(folder, f"{folder}@bf16,fast")
    assert "is a folder; give a .gguf file" in fault(folder, f"gguf:{folder}")
    assert "selects its own experts" in fault(v3, f"{v3}@native", "--impose-experts")
    assert "does not show the experts it selects" in fault(f"{v3}@native", v3, "--impose-experts")
    assert "has no experts" in fault(folder, f"{folder}@bf16", "--impose-experts")


@pytest.mark.parametrize("option", [("--seed", str(1 << 63)), ("--tokens", "1000000000000")])
def test_numbers_beyond_all_bounds(folder: Path, option: tuple[str, str]) -> None:
    result = invoke(folder, folder, *option)
    assert result.exit_code == 2 and option[0] in result.output


def test_sizes_that_differ_are_named(folder: Path, tmp_path: Path) -> None:
    other = write(llama_case(vocab_size=VOCAB, num_hidden_layers=1), tmp_path)
    assert "num_hidden_layers is 2 and 1" in fault(folder, other)


def test_an_unreadable_model_is_named(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    assert "config.json" in fault(folder, tmp_path)
    assert "config.json" in fault(folder, f"transformers:{tmp_path}")


def test_faults_of_the_text(folder: Path, v3: Path, tmp_path: Path) -> None:
    (tmp_path / "short").write_text("a")
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    assert "is too short: 1 tokens" in fault(folder, folder, "--text", tmp_path / "short")
    assert "is not UTF-8 text" in fault(folder, folder, "--text", tmp_path / "latin")
    assert "cannot read" in fault(folder, folder, "--text", tmp_path / "none")
    assert "--text needs a tokenizer" in fault(v3, v3, "--text", tmp_path / "short")
    assert "at least 2" in fault(folder, folder, "--tokens", "1")
    assert "max_position_embeddings" in fault(folder, folder, "--start", "9000")


def test_transformers_that_is_not_installed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert "pip install transformers" in fault(folder, f"transformers:{folder}")


@pytest.fixture
def gguf(folder: Path, tmp_path: Path) -> Path:
    """The model that reads bytes as llama.cpp's file, in fp32."""
    convert(folder, tmp_path / "m.gguf", dtype="fp32")
    return tmp_path / "m.gguf"


def test_llama_cpp_that_is_not_installed(
    folder: Path, gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    assert "pip install llama-cpp-python" in fault(folder, f"gguf:{gguf}")


class LlamaCpp(ModuleType):
    """A stand-in for the functions of llama_cpp that computes with lowlat's model."""

    llama_token = ctypes.c_int32
    llama_log_callback = staticmethod(lambda hear: hear)
    llama_model_get_vocab = staticmethod(lambda model: model.config)
    llama_vocab_n_tokens = staticmethod(lambda config: config.vocab_size)
    llama_batch_get_one = staticmethod(lambda tokens, count: list(tokens)[:count])

    def __init__(self, folder: Path, loads: bool = True) -> None:
        super().__init__("llama_cpp")
        self.model = load_model(folder, dtype="fp32").model
        self.loads = loads
        self.settings, self.options = SimpleNamespace(), SimpleNamespace(yarn_beta_fast=-1.0)
        self.llama_backend_init = lambda: None
        self.llama_print_system_info = lambda: b"AVX512 = 1 | AMX_INT8 = 1 | "
        self.llama_model_default_params = lambda: self.settings
        self.llama_context_default_params = lambda: self.options
        self.llama_init_from_model = lambda model, options: [model]
        self.llama_get_memory = lambda context: context
        self.llama_n_batch = lambda context: 512
        self.__version__ = "0"

    def llama_log_set(self, hear: Callable[..., None], _: object) -> None:
        self.hear = hear

    def llama_model_load_from_file(self, path: bytes, _: object) -> Any:
        assert path.endswith(b"m.gguf")
        self.hear(2, b"llama_model_load: loading\n", None)
        if not self.loads:
            self.hear(4, b"error loading model: tensor not found\n", None)
            self.hear(4, b"failed to load model\n", None)
        return self.model if self.loads else None

    def llama_memory_clear(self, context: list[Any], _: bool) -> None:
        del context[1:]

    def llama_decode(self, context: list[Any], batch: list[int]) -> int:
        context += batch
        return 0

    def llama_get_logits_ith(self, context: list[Any], _: int) -> Any:
        model, *ids = context
        backend = PackedAttention([len(ids)])
        with torch.no_grad():
            hidden = model(torch.tensor(ids), backend.positions(), backend)
            self.row = model.logits(hidden)[-1].numpy()
        return self.row.ctypes.data_as(ctypes.POINTER(ctypes.c_float))


@pytest.fixture
def same_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers the requests to llama.cpp's worker in this process."""

    def run(_: str, requests: Sequence[dict[str, Any]], *, label: str) -> None:
        handlers = timed_handlers(llama_cpp_model.LlamaCpp())
        for request in requests:
            try:
                handlers[request.pop("op")](**request)
            except Unsupported as error:
                raise UserError(f"{label}: {error}") from error

    monkeypatch.setattr(peers, "run_in_worker", run)


@pytest.mark.usefixtures("same_process")
def test_llama_cpp_shows_logits_alone(
    folder: Path, gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llama = LlamaCpp(folder)
    monkeypatch.setitem(sys.modules, "llama_cpp", llama)
    result = invoke(folder, f"gguf:{gguf}", "--tokens", "9", "--window", "5")
    assert result.exit_code == 0, result.output
    assert "llama.cpp shows logits only" in result.output
    assert "equal within 0.0001" in result.output  # the file's own data type
    # The file's settings are used, and no buffers in which llama.cpp ends on some models.
    assert llama.options.yarn_beta_fast == -1.0 and llama.settings.use_extra_bufts is False
    assert (llama.options.type_k, llama.options.type_v) == (0, 0)
    assert "starts at position 0" in fault(folder, f"gguf:{gguf}", "--start", "3")


@pytest.mark.usefixtures("same_process")
def test_llama_cpp_says_why_it_cannot_load(
    folder: Path, gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", LlamaCpp(folder, loads=False))
    said = fault(folder, f"gguf:{gguf}", "--tokens", "9")
    assert said == f"gguf:{gguf}: llama.cpp cannot load it: error loading model: tensor not found"


def test_llama_cpp_ends_in_a_process_of_its_own(
    folder: Path, gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Regression: a failed assertion of llama.cpp that ends lowlat."""
    site = tmp_path / "site"
    site.mkdir()
    (site / "llama_cpp.py").write_text(
        "import os, sys\n"
        "llama_log_callback = lambda hear: hear\n"
        "llama_log_set = lambda hear, data: None\n"
        "def llama_backend_init():\n"
        "    sys.stderr.write('x.cpp:1: GGML_ASSERT(a < b) failed\\n')\n"
        "    sys.stderr.flush()\n"
        "    os.abort()\n"
    )
    monkeypatch.setitem(sys.modules, "llama_cpp", ModuleType("llama_cpp"))
    monkeypatch.setenv("PYTHONPATH", str(site))
    said = fault(folder, f"gguf:{gguf}", "--tokens", "9")
    assert ": killed by SIGABRT; x.cpp:1: GGML_ASSERT(a < b) failed; read fewer" in said


@pytest.mark.parametrize(
    ("dtype", "precision"), [("fp32", "fp32"), ("fp16", "fp16"), ("bf16", "bf16"), ("int8", "int8")]
)
def test_the_tolerance_of_a_file_is_that_of_its_matrices(
    tmp_path: Path, dtype: str, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    wide = write(llama_case(hidden_size=192, intermediate_size=64, head_dim=32), tmp_path / "m")
    convert(wide, tmp_path / "m.gguf", dtype=dtype)
    monkeypatch.setitem(sys.modules, "llama_cpp", ModuleType("llama_cpp"))
    side, _ = open_implementation(parse(f"gguf:{tmp_path}/m.gguf"), SilentProgress())
    assert side.precision == precision


def test_what_cannot_be_reported_is_an_error_first(tmp_path: Path) -> None:
    """Regression: a comparison of hours whose report is lost for want of a folder."""
    pytest.importorskip("matplotlib")
    nowhere = tmp_path / "nowhere" / "p.svg"
    assert "its folder does not exist" in fault("nothing", "nothing", "--plot", nowhere)
    picture = tmp_path / "p.foo"
    assert "'.foo' is not an image format" in fault("nothing", "nothing", "--plot", picture)
    told = fault("nothing", "nothing", "--text", "some.txt", "--seed", 7)
    assert "--seed is for random tokens" in told
    assert "--tolerance must be a finite" in fault("nothing", "nothing", "--tolerance", "inf")


def test_plot_without_matplotlib_is_said_first(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "--plot needs matplotlib" in fault("nothing", "nothing", "--plot", tmp_path / "p.svg")


def test_the_entry_point_ends_with_the_code(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for arguments, code in (
        ((folder, folder, "--tokens", "5"), 0),
        ((folder, f"{folder}@int4", "--tolerance", "0", "--tokens", "5"), 1),
        ((folder, "nothing"), 2),
    ):
        monkeypatch.setattr(sys, "argv", ["lowlat", "compare", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main.run()
        assert (ended.value.code or 0) == code
