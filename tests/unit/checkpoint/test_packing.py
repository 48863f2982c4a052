"""int8 and int4 models: every projection packed from the file's exact values, the rest in bf16."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from gguf import GGMLQuantizationType as Kind

from lowlat.checkpoint.load import load_model
from lowlat.checkpoint.mapped_file import MappedFile
from lowlat.checkpoint.save import save_model
from lowlat.convert.run import convert
from lowlat.model.linear import Linear
from lowlat.model.transformer import Transformer
from lowlat.utils.errors import UserError
from lowlat.utils.huge_pages import HAS_HUGE_PAGES
from lowlat.utils.progress import Task, Unit
from tests.configs import GQA
from tests.packed_attention import PackedAttention
from tests.parameters import slow_except

from .builders import (
    FAMILIES,
    assert_same_bits,
    bits,
    edit_config,
    gqa,
    random_model,
    rewrite,
    write_model,
)
from .gguf_files import write_gguf

WORDS = ("int8", "int4")


class Counting:
    """A Progress that adds up."""

    shown = False

    def __init__(self) -> None:
        self.total, self.done = 0, 0

    def advance(self, n: int = 1) -> None:
        self.done += n

    @contextmanager
    def task(self, label: str, total: int | None = None, unit: Unit = "items") -> Iterator[Task]:
        self.total += total or 0
        yield self


def linears(model: Transformer) -> dict[str, Linear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, Linear)}


def dense(model: Transformer, name: str) -> torch.Tensor:
    """The fp32 matrix of projection `name`, the embedding where a tied model has no head."""
    if name == "lm_head" and model.lm_head is None:
        return model.embed_tokens.weight
    return linears(model)[name].dense_weight(torch.float32)


@pytest.mark.parametrize("dtype", WORDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_from_exact_values(tmp_path: Path, family: str, dtype: str) -> None:
    """fp8 blocks too are packed from their fp32 values; router biases stay fp32."""
    write_model(tmp_path / "m", FAMILIES[family])
    exact = load_model(tmp_path / "m", dtype="fp32").model
    model = load_model(tmp_path / "m", dtype=dtype).model
    assert linears(model).keys() == linears(exact).keys() | {"lm_head"}
    for name, linear in linears(model).items():
        for part, value in linear.pack(dense(exact, name)).items():
            assert torch.equal(getattr(linear, part), value), (name, part)
    plain = {
        name: value
        for name, value in model.state_dict().items()
        if name.rpartition(".")[0] not in linears(model) or name.endswith(".bias")
    }
    assert "embed_tokens.weight" in plain
    for name, value in plain.items():
        router = name.endswith("e_score_correction_bias")
        expected = torch.float32 if router else torch.bfloat16
        assert torch.equal(value, exact.state_dict()[name].to(expected)), name
        assert value.dtype == expected


@pytest.mark.parametrize("dtype", WORDS)
@pytest.mark.parametrize("family", ["deepseek_v3-mtp", "llama-tied", "qwen2-converted"])
def test_packed_models_compute_as_bf16(tmp_path: Path, family: str, dtype: str) -> None:
    """The logits of the bf16 model with the same matrices, to the bit."""
    write_model(tmp_path / "m", FAMILIES[family])
    plain = load_model(tmp_path / "m", dtype="bf16").model
    packed = load_model(tmp_path / "m", dtype=dtype).model
    ids, backend = torch.arange(11), PackedAttention([11])

    def logits(model: Transformer) -> torch.Tensor:
        return model.logits(model(ids, backend.positions(), backend))

    with torch.no_grad():
        before = logits(plain)
        plain.add_head()
        state = plain.state_dict()
        for name, linear in linears(packed).items():
            state[f"{name}.weight"] = linear.dense_weight(torch.bfloat16)
        plain.load_state_dict(state, assign=True)
        found = logits(packed)
        assert found.dtype == torch.float32 and not torch.equal(found, before)
        assert torch.equal(found, logits(plain))


BLOCKS = [("int8", Kind.Q8_0), ("int4", Kind.Q4_1)]


def without_loss(exact: Transformer, packed: Transformer, dtype: str) -> int:
    """How many projections of the packed model's own type are bit for bit those of `exact`."""
    names = [name for name, linear in linears(packed).items() if linear.storage == dtype]
    for name in names:
        assert torch.equal(dense(packed, name), dense(exact, name)), name
    return len(names)


@pytest.mark.parametrize(("dtype", "kind"), BLOCKS)
def test_gguf_blocks_load_without_loss(tmp_path: Path, dtype: str, kind: Kind) -> None:
    """Projections have the values of the file, read from it or through its exact MLA form."""
    attention = replace(GQA, num_attention_heads=4, head_dim=16)
    config = replace(gqa("llama"), attention=attention, hidden_size=64, intermediate_size=96)
    parameters = random_model(config, torch.float32).state_dict()
    path = write_gguf(tmp_path / "m.gguf", config, parameters, kind=kind)
    exact = load_model(path)
    heads = int(dtype == "int8")
    assert without_loss(exact.model, load_model(path, dtype=dtype).model, dtype) == 14 + heads
    save_model(exact.model, exact.config, tmp_path / "gqa", source=None)
    convert(tmp_path / "gqa", tmp_path / "mla", to="mla")
    exact, packed = (load_model(tmp_path / "mla", dtype=name) for name in ("fp32", dtype))
    assert without_loss(exact.model, packed.model, dtype) == 12 + heads
    for name, linear in linears(packed.model).items():
        if linear.storage == "int8_rows":
            assert torch.equal(dense(packed.model, name), dense(exact.model, name)), name


@pytest.mark.slow
def test_smollm_in_int4_is_smollm(smollm_gguf: Path) -> None:
    """The real file's 210 Q4_1 matrices, and its Q8_0 embedding as the head."""
    exact, packed = (load_model(smollm_gguf, dtype=name).model for name in ("fp32", "int4"))
    assert without_loss(exact, packed, "int4") == 210
    assert torch.equal(dense(packed, "lm_head"), dense(exact, "lm_head"))


@pytest.mark.parametrize("dtype", WORDS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e38])
def test_values_that_do_not_fit(tmp_path: Path, dtype: str, value: float) -> None:
    write_model(tmp_path / "m", FAMILIES["llama"])
    name = "model.layers.1.mlp.up_proj.weight"

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name][3, 5] = value

    rewrite(tmp_path / "m", change)
    with pytest.raises(UserError, match=f"'{name}' has values .* too large for {dtype}; use"):
        load_model(tmp_path / "m", dtype=dtype)


@pytest.mark.skipif(not HAS_HUGE_PAGES, reason="the system has no large pages")
def test_packed_weights_share_huge_pages(tmp_path: Path) -> None:
    write_model(tmp_path / "m", FAMILIES["llama"])
    model = load_model(tmp_path / "m", dtype="int4").model
    matrices = [part for linear in linears(model).values() for part in linear.parameters()]
    assert len({part.untyped_storage().data_ptr() for part in matrices}) == 1


def test_progress_ends_at_its_total(tmp_path: Path) -> None:
    """A tied embedding is read twice: as itself and as the head."""
    write_model(tmp_path / "m", FAMILIES["llama-tied"])
    progress = Counting()
    load_model(tmp_path / "m", dtype="int4", progress=progress)
    assert progress.total == progress.done > 0


class Saved(NamedTuple):
    """A model packed while loading, and the folder it was saved as."""

    family: str
    model: Transformer
    dtype: str
    folder: Path


QUICK = ("deepseek_v3-fp8", "deepseek_v3-mtp", "llama-tied", "qwen2-converted")
SAVED = slow_except(list(product(QUICK, WORDS)), product(FAMILIES, WORDS))


@pytest.fixture(scope="module", params=SAVED, ids=str)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    family, dtype = request.param
    folder = tmp_path_factory.mktemp("saved")
    torch.manual_seed(0)
    write_model(folder / "m", FAMILIES[family])
    loaded = load_model(folder / "m", dtype=dtype)
    save_model(loaded.model, loaded.config, folder / "packed", source=None)
    return Saved(family, loaded.model, dtype, folder / "packed")


def test_packed_weights_are_saved_unchanged(saved: Saved) -> None:
    """Bit for bit, for every dtype that leaves packed weights packed."""
    _, model, dtype, folder = saved
    for asked in ("auto", "bf16", dtype):
        loaded = load_model(folder, dtype=asked)
        assert loaded.config.packing == dtype
        assert_same_bits(loaded.model, model)


def test_dequantized_for_other_dtypes(saved: Saved) -> None:
    """fp32 has the packed values exactly, and packing them again changes nothing."""
    family, model, dtype, folder = saved
    exact = load_model(folder, dtype="fp32")
    assert exact.config.packing is None
    for name, linear in linears(exact.model).items():
        if name != "lm_head" or not exact.config.tie_word_embeddings:
            assert torch.equal(linear.weight, dense(model, name)), name
    if family == "deepseek_v3-fp8":
        return  # random blocks have groups of values too near each other for fp16 minima
    save_model(exact.model, exact.config, folder.parent / "exact", source=None)
    again = load_model(folder.parent / "exact", dtype=dtype).model
    # int8 rows have fp32 scales, which may come back one unit in the last place away
    same = {n for n, linear in linears(model).items() if linear.storage in WORDS and n != "lm_head"}
    for name, value in again.state_dict().items():
        if name.rpartition(".")[0] in same:
            assert torch.equal(bits(value), bits(model.state_dict()[name])), name


@pytest.mark.parametrize("dtype", WORDS)
def test_loading_reads_no_weight(
    tmp_path: Path, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Packed weights are views of the mapped file: nothing is copied or computed."""
    write_model(tmp_path / "m", FAMILIES["llama-converted"])
    convert(tmp_path / "m", tmp_path / "packed", dtype=dtype)
    views: dict[int, str] = {}
    real = MappedFile.tensor

    def tensor(self: MappedFile, start: int, *shape: Any) -> torch.Tensor:
        made = real(self, start, *shape)
        views[made.data_ptr()] = self.path.name
        return made

    monkeypatch.setattr(MappedFile, "tensor", tensor)
    model = load_model(tmp_path / "packed", dtype="bf16").model
    for name, linear in linears(model).items():
        for part in ("weight", "weight_scale", "weight_minimum"):
            value = getattr(linear, part)
            assert value is None or value.data_ptr() in views, f"{name}.{part}"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("weight", lambda t: t.view(torch.int8)), r"q_proj.weight' is int8, not uint8, as quant"),
        (("weight", lambda t: t[:1].clone()), r"q_proj.weight' has shape \[1, .* asks for \[4, "),
        (("weight_scale", lambda t: t.float()), r"q_proj.weight_scale' is float32, not float16"),
        (("weight_minimum", None), r"q_proj.weight_minimum' is missing"),
    ],
    ids=["type", "shape", "scales", "missing"],
)
@pytest.mark.parametrize("asked", ["bf16", "fp32"])
def test_damaged_packed_files_name_the_tensor(
    tmp_path: Path, change: tuple[str, Any], message: str, asked: str
) -> None:
    write_model(tmp_path / "m", FAMILIES["llama"])
    convert(tmp_path / "m", tmp_path / "packed", dtype="int4")
    name = f"model.layers.1.self_attn.q_proj.{change[0]}"

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        if change[1] is None:
            del tensors[name]
        else:
            tensors[name] = change[1](tensors[name])

    rewrite(tmp_path / "packed", edit)
    with pytest.raises(UserError, match=message):
        load_model(tmp_path / "packed", dtype=asked)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bits": 5}, "quantization_config.bits 5 is not supported; supported: 8, 4"),
        ({"bits": None}, "quantization_config.bits is missing"),
        ({"group_size": 64}, "quantization_config.group_size 64 is not supported; supported: 32"),
        ({"tile_rows": 8}, "quantization_config.tile_rows 8 is not supported"),
        ({"desc_act": False}, r"quantization_config.desc_act \(false\) is unknown"),
        ({"quant_method": "aqlm"}, '"aqlm" is not supported; supported: fp8, lowlat'),
    ],
)
def test_unknown_packing_names_the_field(
    tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    write_model(tmp_path / "m", FAMILIES["llama"])
    convert(tmp_path / "m", tmp_path / "packed", dtype="int4")
    raw = json.loads((tmp_path / "packed" / "config.json").read_text())
    edit_config(tmp_path / "packed", quantization_config=raw["quantization_config"] | fields)
    with pytest.raises(UserError, match=message):
        load_model(tmp_path / "packed")


def test_packed_files_without_their_config_are_refused(tmp_path: Path) -> None:
    write_model(tmp_path / "m", FAMILIES["llama"])
    convert(tmp_path / "m", tmp_path / "packed", dtype="int8")
    edit_config(tmp_path / "packed", quantization_config=None)
    with pytest.raises(UserError, match="no quantization_config that marks the weights as packed"):
        load_model(tmp_path / "packed")
