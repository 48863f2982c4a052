"""Models with other programs' quantized weights: kept in their own bits, against their exact values
in fp32.
"""

import json
import math
from pathlib import Path

import pytest
import torch

from lowlat.attention.cache import PagedCache
from lowlat.attention.metadata import AttentionBatch, SequenceSlice
from lowlat.checkpoint import stored_blocks
from lowlat.checkpoint.load import load_model
from lowlat.cli.info import info
from lowlat.model.linear import Linear
from lowlat.model.native import NativeModel, supports_native, weight_bytes
from lowlat.model.quant import weight_format
from lowlat.ops import native
from lowlat.utils.errors import UserError
from tests.unit.checkpoint.test_vendors import grouped_config, latent_config
from tests.unit.checkpoint.vendor_files import FORMATS, quantize_folder

from .inputs import assert_same_bits, thread_count
from .test_step import (
    PAGE_SIZE,
    STEPS,
    TABLES,
    distances,
    every_level,
    form_for,
    ids_of,
    native_logits,
    plain_logits,
)

if not native.available():
    pytest.skip(native.reason(), allow_module_level=True)

CONFIGS = {"mla": latent_config(), "gqa": grouped_config()}
BREAK_EVENS = (2.0, math.inf)
STEPPED = ["int4", "awq", "gptq-32", "fp8-channel", "mxfp4"]
"""Formats of every storage: steps of models run over these."""


def folder_of(folder: Path, family: str, own: str) -> Path:
    quantize_folder(folder / "m", CONFIGS[family], FORMATS[own])
    return folder / "m"


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("own", FORMATS)
def test_loading_keeps_the_file_s_bits(tmp_path: Path, family: str, own: str) -> None:
    """Every projection stays packed, its values are exact, and memory is the file's size."""
    exact = quantize_folder(tmp_path / "m", CONFIGS[family], FORMATS[own])
    kept = load_model(tmp_path / "m", keeps_blocks=True).model
    assert supports_native(kept)
    for name, module in kept.named_modules():
        if not isinstance(module, Linear):
            continue
        wanted = exact[f"model.{name}.weight" if name != "lm_head" else "lm_head.weight"]
        assert torch.equal(module.dense_weight(torch.float32), wanted), name
        assert (module.storage == "plain") == (name == "lm_head")
    # the smallest groups have 5.0 bits instead of 4.6
    assert weight_bytes(kept) <= 1.08 * (tmp_path / "m" / "model.safetensors").stat().st_size
    kind = "MXFP4" if "mxfp4" in own else "fp8" if "fp8" in own or own == "fbgemm" else None
    assert weight_format(kept, torch.bfloat16) in ({kind} if kind else {"int4", "Q4_0"})


@every_level
@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("own", STEPPED)
@torch.inference_mode()
def test_logits(tmp_path: Path, level: str, family: str, own: str) -> None:
    """As near to fp32 as a model whose weights are rounded to bf16."""
    path = folder_of(tmp_path, family, own)
    kept = load_model(path, keeps_blocks=True).model
    dense = load_model(path, dtype="bf16").model
    exact = load_model(path, dtype="fp32").model
    for break_even in BREAK_EVENS:
        reference = plain_logits(exact, break_even)
        plain = distances(native_logits(NativeModel(dense), break_even), reference)
        ours = distances(native_logits(NativeModel(kept), break_even), reference)
        assert ours.median() <= 1.4 * plain.median()


@every_level
@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("own", STEPPED)
@torch.inference_mode()
def test_batch_invariance(tmp_path: Path, level: str, family: str, own: str) -> None:
    """A sequence alone, on any number of threads, has the bits that it has in mixed batches."""
    model = NativeModel(load_model(folder_of(tmp_path, family, own), keeps_blocks=True).model)
    together = native_logits(model, 2.0)
    with thread_count(3):
        assert_same_bits(native_logits(model, 2.0), together)
    first = 0
    caches = [
        PagedCache(model.config, num_pages=48, page_size=PAGE_SIZE, dtype=torch.bfloat16)
        for _ in TABLES
    ]
    for step in STEPS:
        for s, start, length in step:
            form = form_for(length, 2.0)
            item = SequenceSlice(pages=TABLES[s], start=start, length=length, path=form)
            batch = AttentionBatch.build([item], page_size=PAGE_SIZE)
            ids = ids_of(model.config, [(s, start, length)])
            own_bits = model.step(ids, batch, caches[s], list(range(length)))[1]
            assert_same_bits(own_bits, together[first : first + length])
            first += length


@pytest.mark.parametrize("own", STEPPED)
def test_info_counts_the_bytes_in_memory(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], own: str
) -> None:
    path = folder_of(tmp_path, "mla", own)
    info(str(path), json_output=True)
    machine = json.loads(capsys.readouterr().out)["machine"]
    kept = load_model(path, keeps_blocks=True).model
    assert machine["weights_bytes"] == pytest.approx(weight_bytes(kept), rel=0.02)


def test_copies_that_do_not_fit_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = folder_of(tmp_path, "gqa", "int4")
    monkeypatch.setattr(stored_blocks, "is_larger_than_memory", lambda size: True)
    with pytest.raises(UserError, match="4-bit weights are copied"):
        load_model(path, keeps_blocks=True)
