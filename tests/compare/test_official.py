"""DeepSeek's inference/model.py through a stand-in of its public shape, in a process of its own."""

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lowlat.compare.implementations import deepseek_worker, peers
from lowlat.compare.implementations.peers import DeepSeekModel
from lowlat.compare.result_json import as_dict
from lowlat.compare.result_text import notes
from lowlat.compare.run import ComparisonResult, compare
from lowlat.compare.trace import Block
from lowlat.utils.errors import UserError

from .models import EQUAL_SCALES, llama_case, own_side, v3_case, window, write

STAND_IN = Path(__file__).with_name("stand_in_model.py")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The public file knows one mscale: that of a checkpoint whose two are equal."""
    case = v3_case(rope_parameters=dict(EQUAL_SCALES))
    return write(case, tmp_path_factory.mktemp("official"))


def edited(folder: Path, old: str, new: str) -> Path:
    """The stand-in with one line replaced."""
    source = STAND_IN.read_text()
    assert source.count(old) == 1, old
    path = folder / "model.py"
    path.write_text(source.replace(old, new))
    return path


@pytest.fixture
def same_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker's work in this process, which saves the start of another."""

    def run(_: str, requests: list[dict[str, Any]], *, label: str) -> None:
        try:
            deepseek_worker.run(**requests[0])
        except UserError as error:
            raise UserError(f"{label}: {error}") from error

    monkeypatch.setattr(peers, "run_in_worker", run)
    for name in ("kernel", "deepseek_model_py"):  # the worker adds them
        monkeypatch.setitem(sys.modules, name, ModuleType(name))


def official(script: Path, path: Path, dtype: str = "fp32") -> DeepSeekModel:
    config = own_side(path).config
    kind = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    return DeepSeekModel(script, path, config, label="official", dtype=kind)


def against(script: Path, path: Path, dtype: str = "fp32", **options: Any) -> ComparisonResult:
    pair = own_side(path, dtype), official(script, path, dtype)
    return compare(*pair, [window()], **options)


def test_it_computes_the_same(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a process of its own, as users run it: next to files that it was not asked to run."""
    (tmp_path / "torch.py").write_text("raise SystemExit('a file of the folder')")
    monkeypatch.chdir(tmp_path)
    report = against(STAND_IN, checkpoint)
    assert report.equal and report.diagnosis.findings == ()
    parts = {place.part for place in report.comparison.places() if place.block.number == 1}
    assert {"q", "q_rotated", "k_rotated", "latent", "scores", "heads", "routing_weights"} <= parts
    assert {"routed", "shared", "mlp", "residual"} <= parts
    assert "has no MTP modules" in notes(as_dict(report))[0]


@pytest.mark.slow
def test_a_fault_comes_back_from_the_other_process(checkpoint: Path, tmp_path: Path) -> None:
    script = edited(tmp_path, "class Gate(", "class Router(")
    with pytest.raises(UserError) as caught:
        against(script, checkpoint)
    assert "has no Gate" in str(caught.value) and "\n" not in str(caught.value)


def test_the_end_of_the_other_process_is_reported(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = edited(tmp_path, "import math\n", "import os\nos.abort()\n")
    with pytest.raises(UserError, match="official: fails at run time: killed by SIGABRT"):
        official(script, checkpoint).trace(window())
    monkeypatch.setattr(peers, "TIMEOUT", 0.01)
    with pytest.raises(UserError, match="official: fails at run time: no answer within 0 s"):
        official(STAND_IN, checkpoint).trace(window())


@pytest.mark.usefixtures("same_process")
def test_its_gate_in_bf16_is_named(checkpoint: Path) -> None:
    """In bf16 the public file multiplies its gate in bf16: the mistake is found, not assumed."""
    report = against(STAND_IN, checkpoint, "bf16")
    assert {(f.label, f.kind) for f in report.diagnosis.findings} == {("B", "gate_precision")}
    if report.with_imposed is not None:
        assert all(found.changed == 0 for found in report.with_imposed.routing.values())


GROUP_MASK = (
    'groups.masked_fill(outside[..., None], float("-inf"))',
    "groups.masked_fill(outside[..., None], 0.0)",
    "group_mask",
)
NORMALISATION = (
    "weights = weights / weights.sum(-1, keepdim=True)",
    "pass",
    "gate_normalisation",
)


@pytest.mark.usefixtures("same_process")
@pytest.mark.parametrize(
    ("old", "new", "kind"), [GROUP_MASK, NORMALISATION], ids=["group mask", "normalisation"]
)
def test_a_mistake_of_a_gate_in_bf16_is_named_as_well(
    checkpoint: Path, tmp_path: Path, old: str, new: str, kind: str
) -> None:
    """Regression: "expert selection: the only cause" of a gate that makes two mistakes at once."""
    report = against(edited(tmp_path, old, new), checkpoint, "bf16")
    found = {(f.label, f.kind) for f in report.diagnosis.findings}
    assert found == {("B", "gate_precision"), ("B", kind)}


@pytest.mark.usefixtures("same_process")
def test_imposed_experts_leave_the_files_factors(checkpoint: Path, tmp_path: Path) -> None:
    """Regression: factors computed as they should be in place of those of the file."""
    old, new, kind = NORMALISATION
    report = against(edited(tmp_path, old, new), checkpoint, impose_experts=True)
    assert str(report.first) == "layer 1 routing_weights"
    assert {(f.label, f.kind) for f in report.diagnosis.findings} == {("B", kind)}


@pytest.mark.usefixtures("same_process")
@pytest.mark.parametrize(
    ("made", "kept"), [("", torch.bfloat16), (", dtype=torch.float32", torch.float32)]
)
def test_the_gates_bias_has_the_files_type(
    checkpoint: Path, tmp_path: Path, made: str, kept: torch.dtype
) -> None:
    """The public file has its bias in the default type in older versions, in fp32 in newer ones."""
    old = "nn.Parameter(torch.empty(args.n_routed_experts)) if args.dim == 7168"
    new = f"nn.Parameter(torch.empty(args.n_routed_experts{made})) if args.dim == 34"
    trace = official(edited(tmp_path, old, new), checkpoint, "bf16").trace(window())
    stored = load_file(checkpoint / "model.safetensors")
    expected = stored["model.layers.1.mlp.gate.e_score_correction_bias"].to(kept).float()
    found = trace.get(Block("layer", 1), "gate_bias")
    assert found is not None and torch.equal(found, expected)


@pytest.mark.usefixtures("same_process")
def test_a_checkpoint_without_shared_experts(checkpoint: Path, tmp_path: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"n_shared_experts": 0}))
    stored = load_file(checkpoint / "model.safetensors")
    kept = {name: tensor for name, tensor in stored.items() if "shared_experts" not in name}
    save_file(kept, tmp_path / "model.safetensors")
    assert against(STAND_IN, tmp_path).equal


@pytest.mark.usefixtures("same_process")
@pytest.mark.parametrize(
    ("old", "new", "kind"),
    [
        GROUP_MASK,
        (
            "if args.max_seq_len > args.original_seq_len:\n            self",
            "if False:\n            self",
            "yarn_softmax_scale",
        ),
    ],
    ids=["group mask", "softmax scale"],
)
def test_mistakes_in_the_file_are_named(
    checkpoint: Path, tmp_path: Path, old: str, new: str, kind: str
) -> None:
    report = against(edited(tmp_path, old, new), checkpoint)
    assert {(f.label, f.kind) for f in report.diagnosis.findings} == {("B", kind)}


@pytest.mark.usefixtures("same_process")
@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("class Gate(", "class Router(", "has no Gate; is it DeepSeek's inference/model.py?"),
        ("    mscale: float = 1.0\n", "", "its ModelArgs is not the public one"),
        ("import math\n", "import maths\n", "cannot be imported: ModuleNotFoundError"),
        ("import math\n", "raise SystemExit(0)\n", "cannot be imported: SystemExit"),
        (
            "self.wkv_b = Linear(args.kv_lora_rank, ",
            "self.wkv_b = Linear(1 + args.kv_lora_rank, ",
            "model.py has no layers.0.attn.wkv_b.weight of shape",
        ),
        (
            "self.norm = RMSNorm(args.dim)",
            "self.norm = RMSNorm(args.dim); self.x = RMSNorm(3)",
            "has no weight for x.weight of model.py",
        ),
    ],
    ids=["class", "field", "import", "end", "shape", "missing"],
)
def test_another_file_is_refused_in_one_line(
    checkpoint: Path, tmp_path: Path, old: str, new: str, says: str
) -> None:
    with pytest.raises(UserError) as caught:
        against(edited(tmp_path, old, new), checkpoint)
    assert says in str(caught.value) and str(caught.value).startswith("official: ")
    assert "\n" not in str(caught.value)


def test_models_it_cannot_run_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    config = own_side(checkpoint).config
    with pytest.raises(UserError, match="is not a file"):
        DeepSeekModel(tmp_path / "no.py", checkpoint, config, label="o", dtype=torch.float32)
    llama = own_side(write(llama_case(), tmp_path))
    with pytest.raises(UserError, match="runs DeepSeek models only"):
        DeepSeekModel(STAND_IN, tmp_path, llama.config, label="o", dtype=torch.float32)
