"""Initial weights: the right spread, and a function of the seed alone."""

import torch

from lowlat.model.init import init_weights
from lowlat.model.transformer import Transformer

from .draw import gqa_config, mla_config


def initialised(seed: int, **changes: object) -> Transformer:
    model = Transformer(mla_config(num_nextn_predict_layers=1, **changes))
    init_weights(model, seed=seed)
    return model


def test_spread_norms_and_biases() -> None:
    model = initialised(7, hidden_size=67, initializer_range=0.006)
    for name, value in model.named_parameters():
        if "norm" in name:
            assert (value == 1).all(), name
        elif name.endswith("bias"):
            assert (value == 0).all(), name
        elif value.numel() > 1000:
            assert 0.9 < value.std().item() / 0.006 < 1.1, name
            assert abs(value.mean().item()) < 0.001, name


def test_biases_of_projections_are_zero() -> None:
    model = Transformer(gqa_config())
    init_weights(model, seed=1)
    biases = [value for name, value in model.named_parameters() if name.endswith(".bias")]
    assert len(biases) == 8 and all((value == 0).all() for value in biases)


def test_depends_on_the_seed_alone() -> None:
    first = initialised(7).state_dict()
    torch.manual_seed(99)
    again, other = initialised(7).state_dict(), initialised(8).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["embed_tokens.weight"], other["embed_tokens.weight"])
