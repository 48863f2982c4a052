"""int8 and int4 models: every projection packed from the file's exact values, the rest in bf16."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType as Kind

from lowlat.attention.packed import PackedAttention
from lowlat.checkpoint.load import load_model
from lowlat.checkpoint.save import save_model
from lowlat.config.model import GQAConfig
from lowlat.convert.run import convert
from lowlat.model.linear import Linear
from lowlat.model.transformer import Transformer
from lowlat.utils.errors import UserError
from lowlat.utils.progress import Task, Unit

from .builders import FAMILIES, gqa, random_model, rewrite, write_model
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
        self.total = total or 0
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
    attention = GQAConfig(num_attention_heads=4, num_key_value_heads=2, head_dim=16)
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


def test_progress_ends_at_its_total(tmp_path: Path) -> None:
    """A tied embedding is read twice: as itself and as the head."""
    write_model(tmp_path / "m", FAMILIES["llama-tied"])
    progress = Counting()
    load_model(tmp_path / "m", dtype="int4", progress=progress)
    assert progress.total == progress.done > 0


@pytest.mark.parametrize("dtype", WORDS)
def test_saving_is_refused(tmp_path: Path, dtype: str) -> None:
    write_model(tmp_path / "m", FAMILIES["llama"])
    loaded = load_model(tmp_path / "m", dtype=dtype)
    with pytest.raises(UserError, match=rf"copy: {dtype} weights exist in memory only.*bf16"):
        save_model(loaded.model, loaded.config, tmp_path / "copy", source=None)
    assert not (tmp_path / "copy").exists()
