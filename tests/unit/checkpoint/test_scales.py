"""Scales of fp8 blocks: what they may be, and the same checks whether or not weights are multiplied
out.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lowlat.checkpoint.load import load_model
from lowlat.utils.errors import UserError
from tests.parameters import slow_except

from .builders import FAMILIES, FP8, assert_same_bits, rewrite, write_model
from .test_load import UP, Tensors, at, cast


@pytest.mark.parametrize("dtype", ["auto", "bf16", "int8"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (cast(UP + "_scale_inv", torch.int32), "is int32, but scales are float32, bfloat16 or"),
        (cast(UP + "_scale_inv", torch.float8_e4m3fn), "is float8_e4m3fn, but scales are"),
        (cast(UP + "_scale_inv", torch.float64), "is float64, but scales are"),
        (cast(UP + "_scale_inv", torch.float8_e8m0fnu), "or float8_e8m0fnu with scale_fmt ue8m0"),
        (at(UP + "_scale_inv", (0, 1), -1.0), "holds scales below 0"),
        (at(UP + "_scale_inv", (0, 1), torch.inf), "holds values that are not finite"),
    ],
)
def test_scales_are_checked_alike_whether_dequantized_or_packed(
    tmp_path: Path, change: Callable[[Tensors], None], message: str, dtype: str
) -> None:
    """Regression: integers, fp8 numbers and negative ones used as scales."""
    write_model(tmp_path / "m", FAMILIES["deepseek_v3-fp8"])
    rewrite(tmp_path / "m", change)
    with pytest.raises(UserError) as caught:
        load_model(tmp_path / "m", dtype=dtype)
    assert f"tensor '{UP}_scale_inv' " in str(caught.value) and message in str(caught.value)


@pytest.mark.parametrize(
    "kind",
    slow_except([torch.float8_e8m0fnu], [torch.bfloat16, torch.float16, torch.float8_e8m0fnu]),
)
def test_scales_of_fewer_bits(tmp_path: Path, kind: torch.dtype) -> None:
    """Powers of two, which all of these hold: the same model as from fp32."""
    quant = replace(FP8, scale_fmt="ue8m0")
    write_model(tmp_path / "m", replace(FAMILIES["deepseek_v3-fp8"], quantization=quant))

    def powers(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.endswith("_scale_inv")]:
            tensors[name] = torch.exp2(tensors[name].log2().round().clamp(-9, 9))

    rewrite(tmp_path / "m", powers)
    before = {dtype: load_model(tmp_path / "m", dtype=dtype).model for dtype in ("auto", "fp32")}
    rewrite(
        tmp_path / "m",
        lambda t: t.update({n: v.to(kind) for n, v in t.items() if n.endswith("_scale_inv")}),
    )
    for dtype, model in before.items():
        assert_same_bits(load_model(tmp_path / "m", dtype=dtype).model, model)
