"""Small GQA models to compress: weights in memory, text of random tokens."""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from lowlat.config.model import ModelConfig, RopeConfig
from lowlat.convert.compression.calibration import Calibration
from lowlat.convert.compression.compress import CompressionReport, compress
from lowlat.convert.parameters.weights import Weights
from lowlat.model.transformer import Transformer
from lowlat.utils.progress import SilentProgress
from tests.configs import GQA
from tests.fakes import gqa_config, tiny_model

LENGTH = 37
YARN = RopeConfig(
    rope_theta=100.0,
    rope_type="yarn",
    factor=4.0,
    original_max_position_embeddings=24,
    beta_fast=4.0,
)
INTERLEAVED = RopeConfig(rope_theta=100.0, rope_interleave=True)


def model_config(
    *, bias: bool = False, groups: int = 3, rope: RopeConfig | None = None
) -> ModelConfig:
    attention = replace(GQA, num_key_value_heads=groups, head_dim=16, qkv_bias=bias)
    return gqa_config(
        model_type="qwen2" if bias else "llama",
        hidden_size=61,
        num_hidden_layers=3,
        attention=attention,
        rope=rope or RopeConfig(rope_theta=100.0),
    )


class ModelWeights(Weights):
    """The parameters of a model in memory."""

    def __init__(self, model: Transformer) -> None:
        self.config, self._state = model.config, model.state_dict()

    def dtype(self, name: str) -> torch.dtype:
        return self._state[name].dtype

    def read(self, name: str) -> Tensor:
        return self._state[name]

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        return self._state[name][start:stop]

    def release(self, name: str) -> None:
        pass

    def where(self, name: str) -> str:
        return name


CASES = [
    model_config(),
    model_config(bias=True),
    model_config(groups=1),
    model_config(groups=6, rope=YARN),
    model_config(rope=INTERLEAVED),
]
IDS = ["plain", "bias", "mqa", "mha-yarn", "interleaved"]


def weights_of(config: ModelConfig) -> ModelWeights:
    model = tiny_model(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.5)
    return ModelWeights(model)


def windows(count: int = 6) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randint(263, (count, LENGTH), generator=generator)


def compressed_model(
    weights: Weights,
    folder: Path,
    layout: str,
    method: str = "weighted",
    share: float = 0.5,
    calibration: Calibration | None = None,
    precision: torch.dtype = torch.float32,
) -> tuple[Weights, CompressionReport]:
    """Compressed in `folder` to half of its cache."""
    return compress(
        weights,
        calibration or Calibration(windows=windows(8), held_out=windows(4), origin="test"),
        share=share,
        method=method,
        layout=layout,  # pyright: ignore[reportArgumentType]
        scratch=folder,
        dtype=torch.float32,
        progress=SilentProgress(),
        precision=precision,
    )
