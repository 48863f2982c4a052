"""Models of the family converted: GQA with experts and MTP exactly, other forms not at all."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lowlat.checkpoint.load import load_model
from lowlat.checkpoint.save import save_model
from lowlat.convert.parameters.exact_mla import check_exact
from lowlat.convert.report import describe_attention
from lowlat.convert.run import convert
from lowlat.utils.errors import UserError
from tests.lowlat_configs import EVERY, random_model
from tests.packed_attention import PackedAttention


@pytest.mark.parametrize("interleave", [False, True])
def test_grouped_query_attention_with_experts_becomes_deepseek_v3(
    tmp_path: Path, interleave: bool
) -> None:
    """Regression: neighbouring channels that turn together taken for halves of a head."""
    config = EVERY["combined gqa"]
    rope = config.rope_of(0)
    config = replace(config, rope=replace(rope, rope_interleave=interleave))
    save_model(random_model(config, torch.float32), config, tmp_path / "gqa", source=None)
    convert(tmp_path / "gqa", tmp_path / "mla", to="mla")
    models = [load_model(tmp_path / name, dtype="fp64").model for name in ("gqa", "mla")]
    assert models[1].config.model_type == "deepseek_v3" and len(models[1].mtp) == 2
    ids = torch.arange(0, 263, 7)
    packed = PackedAttention([len(ids)])
    with torch.inference_mode():
        before, after = (m.logits(m(ids, packed.positions(), packed)) for m in models)
    torch.testing.assert_close(after, before, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("name", "words"),
    [("gla-2", "GLA-2, 2 x 13 + 6"), ("gta-3", "GTA-3, 3 x 10 + 4"), ("tpa", "TPA, ranks 2 + 1")],
)
def test_other_forms_are_refused_by_name(name: str, words: str) -> None:
    with pytest.raises(UserError, match=rf"{words.replace('+', '.')}; --to mla"):
        check_exact(EVERY[name])
    heads = EVERY[name].attention.num_attention_heads
    assert describe_attention(EVERY[name].attention) == f"{words}, {heads} heads"


def test_the_number_type_of_any_form_can_change(tmp_path: Path) -> None:
    config = EVERY["tpa"]
    save_model(random_model(config, torch.float32), config, tmp_path / "fp32", source=None)
    convert(tmp_path / "fp32", tmp_path / "bf16", dtype="bf16")
    loaded = load_model(tmp_path / "bf16")
    assert loaded.config == config
    assert loaded.model.embed_tokens.weight.dtype == torch.bfloat16
