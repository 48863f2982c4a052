"""Small policies: fp32 master weights whose bf16 rounding the engine and the trainer share."""

from dataclasses import replace

import torch

from lowlat.config.model import ModelConfig
from lowlat.model.transformer import Transformer
from lowlat.train.layers.stacked_experts import stack_experts
from lowlat.train.parallel.mesh import ProcessMesh
from lowlat.train.policy.distribution import SamplingDistribution
from lowlat.train.policy.learner import PolicyLearner
from lowlat.train.policy.loss import LossOptions
from tests import configs
from tests.lowlat_configs import MOE, random_model

GROUPED = replace(MOE, n_routed_experts=6, num_experts_per_tok=2, n_group=2, topk_group=1)
CONFIGS: dict[str, ModelConfig] = {
    "mla-moe-mtp": configs.byte_model_config(
        "deepseek_v3", configs.MLA, moe=GROUPED, num_nextn_predict_layers=1
    ),
    "mla-yarn": configs.byte_model_config("deepseek_v3", configs.MLA, rope=configs.YARN),
    "gqa": configs.byte_model_config("llama", configs.GQA, tie_word_embeddings=True),
    "gqa-moe": configs.byte_model_config("lowlat", configs.GQA, moe=GROUPED),
}


def masters(config: ModelConfig, seed: int = 7) -> Transformer:
    """fp32 weights, experts stacked; all but routing biases are trained."""
    model = random_model(config, torch.float32, seed=seed)
    stack_experts(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.endswith("e_score_correction_bias"))
    return model


def learner(
    model: Transformer,
    distribution: SamplingDistribution | None = None,
    options: LossOptions | None = None,
    mesh: ProcessMesh | None = None,
) -> PolicyLearner:
    """A learner of all weights, without a reference."""
    return PolicyLearner(
        model,
        None,
        distribution=distribution or SamplingDistribution(),
        options=options or LossOptions(),
        mesh=mesh,
    )
