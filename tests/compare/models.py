"""Small models with everything that can go wrong in them, and sides with mistakes planted."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DeepseekV3Config, DeepseekV32Config, GlmMoeDsaConfig, LlamaConfig

from lowlat.checkpoint.load import load_model
from lowlat.compare.implementations.base import Implementation
from lowlat.compare.implementations.lowlat_pytorch import LowlatPyTorch
from lowlat.compare.inputs import random_ids
from lowlat.compare.trace import NONE_IMPOSED, ImposedChoices, Trace, Window
from lowlat.config.model import ModelConfig
from tests.parity.draw import Case
from tests.parity.oracle import build, save

Patch = Callable[[pytest.MonkeyPatch], None]
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 16.0,
    "original_max_position_embeddings": 512,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 0.7,
    "mscale_all_dim": 1.2,
}
EQUAL_SCALES = YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}
START = 2003
"""Position of the first token: position 0 cannot show an error of rotation."""
TOKENS = 23
VOCAB = 97


def v3_case(**changes: Any) -> Case:
    """A deepseek_v3 with YaRN, groups, biases far enough below zero, MTP modules, prime sizes."""
    fields: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 34,
        "intermediate_size": 19,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "kv_lora_rank": 13,
        "q_lora_rank": 11,
        "qk_nope_head_dim": 7,
        "qk_rope_head_dim": 10,
        "v_head_dim": 5,
        "rms_norm_eps": 1e-6,
        "rope_parameters": dict(YARN),
        "max_position_embeddings": 8192,
        "rope_interleave": True,
        "n_routed_experts": 12,
        "num_experts_per_tok": 3,
        "n_shared_experts": 1,
        "moe_intermediate_size": 11,
        "routed_scaling_factor": 2.5,
        "n_group": 4,
        "topk_group": 2,
        "norm_topk_prob": True,
        "first_k_dense_replace": 1,
        "num_nextn_predict_layers": 2,
        "tie_word_embeddings": False,
    }
    config = DeepseekV3Config(**(fields | changes))
    mtp = config.num_nextn_predict_layers
    return Case(
        name="v3",
        family="deepseek_v3",
        seed=11,
        config=config,
        mtp=mtp,
        mtp_copies=False,
        start=START,
        bias_shift=-0.7,
    )


def sparse_case(family: str = "deepseek_v32", **changes: Any) -> Case:
    """The same without MTP modules, which transformers leaves out, with indexers that choose 7 of
    the tokens; three layers of glm_moe_dsa, of which the last shares the choice of the second.
    """
    fields = v3_case().config.to_dict() | {
        "num_hidden_layers": 3,
        "num_nextn_predict_layers": 0,
        "index_n_heads": 8,
        "index_head_dim": 15,
        "index_topk": 7,
    }
    for name in ("model_type", "architectures", "transformers_version", "head_dim"):
        fields.pop(name, None)
    kind = {"deepseek_v32": DeepseekV32Config, "glm_moe_dsa": GlmMoeDsaConfig}[family]
    if family == "glm_moe_dsa":
        fields["indexer_types"] = ["full", "full", "shared"]
    config = kind(**(fields | changes))
    return replace(v3_case(), name=family, family=family, config=config, mtp=0)


def llama_case(**changes: Any) -> Case:
    fields: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 66,
        "intermediate_size": 67,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "head_dim": 22,
        "max_position_embeddings": 8192,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        "bos_token_id": None,
        "eos_token_id": None,
    }
    config = LlamaConfig(**(fields | changes))
    return Case(
        name="llama",
        family="llama",
        seed=5,
        config=config,
        mtp=0,
        mtp_copies=False,
        start=START,
        bias_shift=0.0,
    )


def write(case: Case, folder: Path) -> Path:
    """The checkpoint of `case`."""
    save(build(case), folder)
    return folder


def window(tokens: int = TOKENS, start: int = START) -> Window:
    return Window(torch.tensor(random_ids(VOCAB, tokens, 3)), start)


def own_side(path: Path, dtype: str = "fp32", **options: Any) -> LowlatPyTorch:
    model = load_model(path, dtype=dtype).model.requires_grad_(False)
    return LowlatPyTorch(model, label=str(path), precision=dtype, **options)


class Planted(Implementation):
    """A side that is built and run with a mistake in the code, which is gone afterwards."""

    unseen = ""
    can_impose_experts = can_impose_tokens = True

    def __init__(self, make: Callable[[], Implementation], plant: Patch | None) -> None:
        self._plant = plant
        with self._planted():
            self._side = make()
        self.label = "planted" if plant else "clean"
        self.config: ModelConfig = self._side.config
        self.precision = self._side.precision

    def trace(self, window: Window, imposed: ImposedChoices = NONE_IMPOSED) -> Trace:
        with self._planted():
            return self._side.trace(window, imposed)

    def _planted(self) -> AbstractContextManager[None]:
        return nullcontext() if self._plant is None else _patched(self._plant)


@contextmanager
def _patched(plant: Patch) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        plant(patch)
        yield
