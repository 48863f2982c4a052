"""Weights: every planted defect is named with its place, and equal weights give no finding."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from lowlat.checkpoint.hf_folder import open_checkpoint
from lowlat.checkpoint.load import read_config
from lowlat.cli import main
from lowlat.compare.weights.finding import WEIGHT_NAMES
from lowlat.compare.weights.layout import head_layout
from lowlat.compare.weights.run import compare_weights
from lowlat.convert.run import convert
from tests.fakes import byte_tokenizer
from tests.parity.draw import draw_case

from .models import llama_case, v3_case, write
from .weight_defects import (
    ATTENTION,
    MLP,
    Defect,
    WeightPlant,
    Weights,
    all_of,
    changes,
    damage,
    exchange,
    experts,
    fp8_blocks,
    halves,
    int8_blocks,
    of_heads,
    pairs,
    parts_of_heads,
    rows,
    transposed,
    truncated,
)

PAIRS = "has RoPE rows in pairs (i, i + d/2) where A has (2i, 2i+1)"
HALVES = "has RoPE rows in pairs (2i, 2i+1) where A has (i, i + d/2)"
KV_B, Q_B, KV_A = (
    f"{ATTENTION}{name}.weight" for name in ("kv_b_proj", "q_b_proj", "kv_a_proj_with_mqa")
)
O_PROJ, GATE, BIAS = (
    f"{ATTENTION}o_proj.weight",
    f"{MLP}gate.weight",
    f"{MLP}gate.e_score_correction_bias",
)
DOWN = "model.layers.0.mlp.down_proj.weight"
NOPE, ROPE, LATENT, V = 7, 10, 13, 5
HEADS = 3


def plant(
    name: str, defect: Defect, kind: str, says: str, *places: str, label: str = "B"
) -> WeightPlant:
    return WeightPlant(name=name, defect=defect, kind=kind, says=says, places=places, label=label)


def tensor(
    name: str, change: Callable, kind: str, says: str, at: str, label: str = "B"
) -> WeightPlant:
    return plant(name, changes(at, change), kind, says, at, label=label)


def low(x: torch.Tensor) -> torch.Tensor:
    return x.bfloat16().float()


V3 = [
    tensor("bias in bf16", low, "rounding", "has A's values rounded to bf16", BIAS),
    tensor("bias truncated", truncated, "rounding", "has A's values truncated to bf16", BIAS),
    tensor(
        "bias in fp16",
        lambda x: x.half().float(),
        "rounding",
        "has A's values rounded to fp16",
        BIAS,
    ),
    tensor(
        "bias in fp8",
        lambda x: x.to(torch.float8_e4m3fn).float(),
        "rounding",
        "has A's values rounded to fp8 (e4m3)",
        BIAS,
    ),
    tensor(
        "matrix stored as bf16",
        lambda x: x.bfloat16(),
        "rounding",
        "has A's values rounded to bf16",
        Q_B,
    ),
    plant(
        "experts exchanged",
        experts({3: 4, 4: 3}),
        "experts",
        "exchanges experts 3 and 4",
        f"{MLP}experts",
    ),
    plant(
        "experts in a cycle",
        experts({0: 1, 1: 2, 2: 0}),
        "experts",
        "has A's experts 1, 2 and 0 in experts 0, 1 and 2",
        f"{MLP}experts",
    ),
    plant(
        "expert doubled",
        experts({5: 2}),
        "experts",
        "has A's expert 2 in expert 5",
        f"{MLP}experts",
    ),
    tensor(
        "router rows exchanged",
        rows([0, 1, 2, 4, 3, *range(5, 12)]),
        "experts",
        "exchanges the router rows of experts 3 and 4",
        GATE,
    ),
    tensor(
        "bias entries exchanged",
        rows([1, 0, *range(2, 12)]),
        "experts",
        "exchanges experts 0 and 1",
        BIAS,
    ),
    plant(
        "gate and up of an expert",
        exchange(f"{MLP}experts.5.gate_proj.weight", f"{MLP}experts.5.up_proj.weight"),
        "gate_up",
        "exchanges gate_proj and up_proj",
        f"{MLP}experts.5",
    ),
    plant(
        "gate and up of shared experts",
        exchange(f"{MLP}shared_experts.gate_proj.weight", f"{MLP}shared_experts.up_proj.weight"),
        "gate_up",
        "exchanges gate_proj and up_proj",
        f"{MLP}shared_experts",
    ),
    tensor(
        "rope rows of q",
        of_heads(HEADS, slice(NOPE, None), halves),
        "rope_rows",
        f"{PAIRS}, in all heads",
        Q_B,
    ),
    tensor(
        "rope rows of one head",
        of_heads(HEADS, slice(NOPE, None), halves, (1,)),
        "rope_rows",
        f"{PAIRS}, in head 1",
        Q_B,
    ),
    tensor(
        "rope rows of two heads, twice",
        of_heads(HEADS, slice(NOPE, None), lambda x: halves(halves(x)), (0, 2)),
        "rope_rows",
        "has RoPE rows reordered twice, in heads 0 and 2",
        Q_B,
    ),
    tensor(
        "rope rows of the key", of_heads(1, slice(LATENT, None), halves), "rope_rows", PAIRS, KV_A
    ),
    tensor(
        "rope rows first",
        lambda x: torch.cat([x[LATENT:], x[:LATENT]]),
        "parts",
        "has RoPE rows before latent rows",
        KV_A,
    ),
    tensor(
        "k of a head transposed",
        of_heads(HEADS, slice(NOPE), transposed, (1,)),
        "transposed",
        "has the k rows of head 1 transposed",
        KV_B,
    ),
    tensor(
        "v of all heads transposed",
        of_heads(HEADS, slice(NOPE, None), transposed),
        "transposed",
        "has the v rows of all heads transposed",
        KV_B,
    ),
    tensor(
        "a head transposed",
        of_heads(HEADS, slice(None), transposed, (2,)),
        "transposed",
        "has the rows of head 2 transposed",
        KV_B,
    ),
    tensor(
        "v before k",
        of_heads(HEADS, slice(None), lambda x: torch.cat([x[NOPE:], x[:NOPE]])),
        "parts",
        "has v rows before k rows in all heads",
        KV_B,
    ),
    tensor(
        "all k before all v",
        lambda x: torch.cat(
            [
                x.unflatten(0, (HEADS, -1))[:, part].flatten(0, 1)
                for part in (slice(NOPE), slice(NOPE, None))
            ]
        ),
        "parts",
        "has the k rows of all heads before the v rows",
        KV_B,
    ),
    tensor(
        "heads exchanged",
        parts_of_heads(HEADS, slice(None), [2, 1, 0]),
        "heads",
        "exchanges heads 0 and 2",
        KV_B,
    ),
    tensor(
        "k of heads exchanged",
        parts_of_heads(HEADS, slice(NOPE), [1, 0, 2]),
        "heads",
        "exchanges the k rows of heads 0 and 1",
        KV_B,
    ),
    tensor(
        "columns of heads exchanged",
        lambda x: parts_of_heads(HEADS, slice(None), [0, 2, 1])(x.T).T,
        "heads",
        "exchanges heads 1 and 2",
        O_PROJ,
    ),
    tensor(
        "head-minor order",
        lambda x: x.unflatten(0, (HEADS, -1)).transpose(0, 1).flatten(0, 1),
        "heads",
        "has rows in the order (channel, head), not (head, channel)",
        KV_B,
    ),
    tensor(
        "a head without values",
        of_heads(HEADS, slice(NOPE), torch.zeros_like, (2,)),
        "constant",
        "has zeros in the k rows of head 2",
        KV_B,
    ),
    tensor("scaled", lambda x: x * 0.25, "scale", "scales the weight by 0.25", O_PROJ),
    tensor(
        "a head scaled",
        of_heads(HEADS, slice(NOPE, None), lambda x: x * 3, (0,)),
        "scale",
        "scales the RoPE rows of head 0 by 3",
        Q_B,
    ),
    tensor(
        "norm scaled by column",
        lambda x: x * torch.linspace(1, 2, 11),
        "scale",
        "scales every column by its own factor",
        Q_B,
    ),
    tensor(
        "norm around zero", lambda x: x - 1, "offset", "adds -1 to the weight", "model.norm.weight"
    ),
    plant(
        "another layer's",
        lambda w: w.update({O_PROJ: w["model.layers.0.self_attn.o_proj.weight"]}),
        "other_layer",
        "has the weights of A's layer 0 in layer 1",
        O_PROJ,
    ),
    plant(
        "another layer's norm in the last MTP module",
        lambda w: w.update({"model.layers.3.enorm.weight": w["model.layers.2.enorm.weight"]}),
        "other_layer",
        "has the weights of A's layer 2 in layer 3",
        "model.layers.3.enorm.weight",
    ),
    plant(
        "the head's in place of the embedding",
        lambda w: w.update({"model.embed_tokens.weight": w["lm_head.weight"]}),
        "other_tensor",
        "has A's lm_head.weight in this place",
        "model.embed_tokens.weight",
    ),
    tensor(
        "a row perturbed",
        lambda x: x + 0.1 * (torch.arange(len(x)) == 3)[:, None],
        "unexplained",
        "differs in 1 of 34 rows, first in row 3",
        DOWN,
    ),
    tensor(
        "a head perturbed",
        of_heads(
            HEADS, slice(NOPE), lambda x: x + torch.linspace(-1, 1, x.numel()).view(x.shape), (1,)
        ),
        "unexplained",
        "differs in the k rows of head 1",
        KV_B,
    ),
]
Q = f"{ATTENTION}q_proj.weight"
DIRECT = [
    tensor(
        "rope rows of q_proj",
        of_heads(HEADS, slice(NOPE, None), halves, (0, 1)),
        "rope_rows",
        f"{PAIRS}, in heads 0 and 1",
        Q,
    ),
]
UP = f"{MLP}up_proj.weight"


def in_blocks(
    change: Callable[[torch.Tensor], torch.Tensor],
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Changes the columns that are whole blocks."""
    return lambda x: torch.cat([change(x[:, :64]), x[:, 64:]], dim=1)


K = f"{ATTENTION}k_proj.weight"
LLAMA = [
    plant(
        "permuted as in GGUF",
        all_of(
            changes(Q, of_heads(6, slice(None), pairs)), changes(K, of_heads(3, slice(None), pairs))
        ),
        "rope_rows",
        f"{HALVES}, in all heads",
        Q,
        K,
    ),
    tensor(
        "keys permuted as one head", pairs, "rope_rows", f"{HALVES}, as for 1 head instead of 3", K
    ),
    tensor(
        "heads of values exchanged",
        parts_of_heads(3, slice(None), [1, 0, 2]),
        "heads",
        "exchanges heads 0 and 1",
        f"{ATTENTION}v_proj.weight",
    ),
    tensor(
        "int8 blocks",
        in_blocks(lambda x: int8_blocks(x, 32)),
        "rounding",
        "has A's values rounded to int8 blocks of 32",
        UP,
    ),
    tensor(
        "fp8 blocks",
        in_blocks(fp8_blocks),
        "rounding",
        "has A's values rounded to fp8 (e4m3) blocks",
        UP,
    ),
    tensor(
        "fp8 blocks as bf16",
        in_blocks(lambda x: low(fp8_blocks(x))),
        "rounding",
        "has A's values rounded to fp8 (e4m3) blocks",
        UP,
    ),
    plant(
        "gate and up of an MLP",
        exchange(UP, f"{MLP}gate_proj.weight"),
        "gate_up",
        "exchanges gate_proj and up_proj",
        MLP.rstrip("."),
    ),
]
PLANTS = (
    [("v3", each) for each in V3]
    + [("direct", each) for each in DIRECT]
    + [("llama", each) for each in LLAMA]
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    heads = {"num_attention_heads": HEADS, "num_key_value_heads": HEADS}
    cases = {
        "v3": v3_case(**heads),
        "direct": v3_case(q_lora_rank=None, **heads),
        "llama": llama_case(),
    }
    return {name: write(case, tmp_path_factory.mktemp(name)) for name, case in cases.items()}


@pytest.mark.parametrize(("model", "planted"), PLANTS, ids=[each.name for _, each in PLANTS])
def test_planted_defect_is_named(
    model: str, planted: WeightPlant, folders: dict[str, Path], tmp_path: Path
) -> None:
    path = folders[model]
    bad = damage(path, tmp_path / "bad", planted.defect)
    found = compare_weights(path, bad)
    assert found is not None and found.differ and found.only == ((), ())
    (finding,) = found.findings
    assert (finding.explanation.kind, finding.explanation.detail) == (planted.kind, planted.says)
    assert finding.explanation.label == planted.label
    assert tuple(place.name for place in finding.places) == planted.places
    assert finding.relative > 0
    back = compare_weights(bad, path)
    assert back is not None and back.differ and back.findings


def test_every_kind_is_planted() -> None:
    kinds = {each.kind for _, each in PLANTS}
    assert kinds == set(WEIGHT_NAMES) - {"channels"}


def test_the_rounded_side_may_be_a(folders: dict[str, Path], tmp_path: Path) -> None:
    bad = damage(folders["v3"], tmp_path / "bad", changes(BIAS, low))
    found = compare_weights(bad, folders["v3"])
    assert found is not None
    (finding,) = found.findings
    assert finding.explanation.label == "A" and finding.explanation.detail.startswith("has B's")


@pytest.mark.parametrize("model", ["v3", "direct", "llama"])
def test_equal_weights_give_no_finding(
    model: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    copy = damage(folders[model], tmp_path / "copy", lambda weights: None)
    found = compare_weights(folders[model], copy)
    assert found is not None and not found.differ and found.findings == () and found.compared > 20
    assert compare_weights(folders[model], folders[model]) is None


def test_several_defects_are_all_named(folders: dict[str, Path], tmp_path: Path) -> None:
    defect = all_of(
        experts({3: 4, 4: 3}),
        changes(BIAS, low),
        changes(Q_B, of_heads(HEADS, slice(NOPE, None), halves)),
        changes(KV_B, of_heads(HEADS, slice(NOPE), transposed, (1,))),
    )
    found = compare_weights(folders["v3"], damage(folders["v3"], tmp_path / "bad", defect))
    assert found is not None
    kinds = [finding.explanation.kind for finding in found.findings]
    assert sorted(kinds) == ["experts", "rope_rows", "rounding", "transposed"]
    assert kinds[-1] == "rounding"


def test_defects_are_named_in_a_rounded_copy(folders: dict[str, Path], tmp_path: Path) -> None:
    """A converter that permutes also writes bf16."""

    def in_bf16(weights: Weights) -> None:
        for name in weights:
            weights[name] = weights[name].bfloat16()

    defect = all_of(
        experts({3: 4, 4: 3}), changes(Q_B, of_heads(HEADS, slice(NOPE, None), halves)), in_bf16
    )
    found = compare_weights(folders["v3"], damage(folders["v3"], tmp_path / "bad", defect))
    assert found is not None
    named = {finding.explanation.detail: len(finding.places) for finding in found.findings}
    assert named.keys() == {
        "exchanges experts 3 and 4",
        f"{PAIRS}, in all heads",
        "has A's values rounded to bf16",
    }
    assert named["has A's values rounded to bf16"] == found.compared - 7


@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3", "kimi_k2", "llama", "qwen3"])
@pytest.mark.parametrize("index", range(3))
def test_rope_rows_of_drawn_models(family: str, index: int, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    folder = write(draw_case(family, index), tmp_path / "a")
    config = read_config(open_checkpoint(folder))
    attention = config.attention_of(0)
    if attention.rope_dim <= 2:
        pytest.skip("two RoPE rows have no other order")
    turn = halves if config.rope_of(0).rope_interleave else pairs
    planted: list[str] = []

    def defect(weights: Weights) -> None:
        for name in ("q_proj", "q_b_proj", "k_proj", "kv_a_proj_with_mqa"):
            at = f"model.layers.0.self_attn.{name}.weight"
            if at in weights:
                layout = head_layout(config, at, tuple(weights[at].shape))
                assert layout is not None
                part = slice(layout.size - attention.rope_dim, None)
                weights[at] = of_heads(layout.heads, part, turn)(weights[at])
                planted.append(at)

    found = compare_weights(folder, damage(folder, tmp_path / "bad", defect))
    assert found is not None and found.compared - found.equal == len(planted) == 2
    assert {finding.explanation.kind for finding in found.findings} == {"rope_rows"}
    assert {place.name for each in found.findings for place in each.places} == set(planted)


@pytest.fixture(scope="module")
def whole_blocks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose rows are whole blocks of 32, with a tokenizer."""
    sizes = {"kv_lora_rank": 32, "q_lora_rank": 32, "qk_nope_head_dim": 32, "v_head_dim": 32}
    plain = {"rope_type": "default", "rope_theta": 1e4}
    case = v3_case(
        vocab_size=269,
        hidden_size=64,
        intermediate_size=64,
        moe_intermediate_size=32,
        num_nextn_predict_layers=0,
        rope_parameters=plain,
        **sizes,
    )
    folder = write(case, tmp_path_factory.mktemp("blocks"))
    byte_tokenizer().save(folder)
    return folder


@pytest.mark.parametrize(
    ("dtype", "says"),
    [
        ("fp32", None),
        ("int8", "stores Q8_0, A stores fp32"),
        ("int4", "stores Q4_1, A stores fp32"),
    ],
)
def test_gguf_files(dtype: str, says: str | None, whole_blocks: Path, tmp_path: Path) -> None:
    """Alone and with defects that must be seen through the rounding of blocks."""
    file = tmp_path / "m.gguf"
    convert(whole_blocks, file, dtype=dtype)
    found = compare_weights(whole_blocks, file)
    assert found is not None and found.only == ((), ()) and found.compared == 65
    details = {finding.explanation.detail for finding in found.findings}
    assert {finding.explanation.kind for finding in found.findings} <= {"rounding"}
    assert (found.equal == 65) if says is None else (says in details)
    defect = all_of(
        experts({3: 4, 4: 3}),
        changes(Q_B, of_heads(2, slice(32, None), halves)),
        changes(KV_B, of_heads(2, slice(32), transposed, (1,))),
        changes(O_PROJ, lambda x: parts_of_heads(2, slice(None), [1, 0])(x.T).T),
    )
    bad = compare_weights(file, damage(whole_blocks, tmp_path / "bad", defect))
    assert bad is not None
    assert {finding.explanation.detail for finding in bad.findings} - details >= {
        "exchanges experts 3 and 4",
        f"{PAIRS}, in all heads",
        "has the k rows of head 1 transposed",
        "exchanges heads 0 and 1",
    }


def test_packed_folders(whole_blocks: Path, tmp_path: Path) -> None:
    convert(whole_blocks, tmp_path / "packed", dtype="int8")
    found = compare_weights(whole_blocks, tmp_path / "packed")
    assert found is not None and found.compared == 65
    assert {each.explanation.kind for each in found.findings} == {"rounding"}
    assert "stores int8, A stores fp32" in {each.explanation.detail for each in found.findings}


def test_attention_of_another_kind_is_left_out(folders: dict[str, Path], tmp_path: Path) -> None:
    """An exact conversion changes nothing else."""
    convert(folders["llama"], tmp_path / "mla", to="mla")
    found = compare_weights(folders["llama"], tmp_path / "mla")
    assert found is not None and found.equal == found.compared > 10
    assert found.only[0] and all(".self_attn." in name for names in found.only for name in names)


def invoke(*arguments: str | Path) -> tuple[int, str]:
    result = CliRunner().invoke(main.app, ["compare", *map(str, arguments)])
    return result.exit_code, result.stdout


def test_equal_activations_with_other_weights(folders: dict[str, Path], tmp_path: Path) -> None:
    """The exit code is that of the activations."""
    bad = damage(folders["v3"], tmp_path / "bad", changes(BIAS, low))
    code, text = invoke(folders["v3"], bad, "--tokens", "5", "--tolerance", "0.5")
    assert code == 0 and "equal within 0.5" in text
    flat = " ".join(text.split())
    assert "weights differ: 1 of 173 tensors " in flat
    assert f"rounded weights: B has A's values rounded to bf16, at {BIAS}; relative" in flat


def test_a_defect_replaces_no_known_mistake(folders: dict[str, Path], tmp_path: Path) -> None:
    bad = damage(
        folders["v3"], tmp_path / "bad", changes(KV_B, of_heads(HEADS, slice(NOPE), transposed))
    )
    code, text = invoke(folders["v3"], bad, "--tokens", "9")
    assert code == 1 and "first difference at layer 1" in text
    assert "no known mistake" not in text
    said = "transposed weights: B has the k rows of all heads transposed"
    assert said in " ".join(text.split())


def test_json_has_the_weights(folders: dict[str, Path], tmp_path: Path) -> None:
    bad = damage(folders["v3"], tmp_path / "bad", experts({3: 4, 4: 3}))
    _, text = invoke(folders["v3"], bad, "--tokens", "5", "--json")
    weights = json.loads(text)["weights"]
    assert (weights["compared"], weights["equal"]) == (173, 167)
    assert weights["findings"][0]["places"] == [f"{MLP}experts"]
    assert weights["findings"][0]["kind"] == "experts"
    assert weights["not_compared"] == {"a": [], "b": []}
    _, text = invoke(folders["v3"], f"{folders['v3']}@bf16", "--tokens", "5", "--json")
    assert json.loads(text)["weights"] is None
