"""quantization_config of packed checkpoints: written, read back, and strict."""

from dataclasses import replace

import pytest

from lowlat.config.hf.quantization import GROUP_SIZE, TILE_ROWS
from lowlat.config.hf.reader import config_from_hf
from lowlat.config.hf.writer import config_to_hf
from lowlat.config.model import ModelConfig, QuantConfig
from lowlat.config.weight_memory import weight_bytes
from lowlat.ops.quantized import GROUP, TILE
from lowlat.utils.errors import UserError
from tests import fakes

CONFIGS = {
    "llama": fakes.gqa_config(),
    "deepseek_v3": fakes.mla_config(),
    "lowlat": fakes.mla_config(model_type="lowlat"),
}


def test_numbers_are_those_of_the_tiles() -> None:
    assert (GROUP_SIZE, TILE_ROWS) == (GROUP, TILE)


@pytest.mark.parametrize("packing", ["int8", "int4"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_there_and_back(config: ModelConfig, packing: str) -> None:
    packed = replace(config, packing=packing)  # pyright: ignore[reportArgumentType]
    raw = config_to_hf(packed)
    assert raw["quantization_config"]["bits"] == int(packing.removeprefix("int"))
    assert config_from_hf(raw) == packed
    assert config_to_hf(config).get("quantization_config") is None


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_unknown_fields_are_named(config: ModelConfig) -> None:
    raw = config_to_hf(replace(config, packing="int8"))
    raw["quantization_config"]["zero_point"] = True
    with pytest.raises(UserError, match=r"quantization_config\.zero_point"):
        config_from_hf(raw)


def test_lowlat_knows_one_storage_at_a_time() -> None:
    raw = config_to_hf(replace(CONFIGS["lowlat"], packing="int8"))
    raw |= {"quantization": {"weight_block_size": [128, 128]}}
    with pytest.raises(UserError, match="quantization is given together with quantization_config"):
        config_from_hf(raw)
    assert config_to_hf(replace(CONFIGS["lowlat"], quantization=QuantConfig()))["quantization"]


@pytest.mark.parametrize("packing", ["int8", "int4"])
def test_memory_is_that_of_the_form(packing: str) -> None:
    """As released, and in bf16, which leaves packed weights packed."""
    config = CONFIGS["deepseek_v3"]
    packed = replace(config, packing=packing)  # pyright: ignore[reportArgumentType]
    for dtype in (None, "bf16"):
        assert weight_bytes(packed, dtype) == weight_bytes(config, packing)
    assert weight_bytes(packed, "fp32") == weight_bytes(config, "fp32")
