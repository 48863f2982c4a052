"""Weights: every planted defect is named with its place, and equal weights give no finding."""

import json
from pathlib import Path

import pytest
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
    MLP,
    WeightPlant,
    Weights,
    all_of,
    changes,
    damage,
    experts,
    halves,
    of_heads,
    pairs,
    parts_of_heads,
    transposed,
)
from .weight_plants import BIAS, HEADS, KV_B, NOPE, O_PROJ, PAIRS, PLANTS, Q_B, low


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
