"""Reads single routed experts of a checkpoint, for expert load balancing (EPLB) while serving."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from torch import nn

from lowlat.checkpoint.load import LoadedModel
from lowlat.model.lora import LowRankUpdate, add_adapters
from lowlat.model.share import ModelShare


def read_experts(
    load: Callable[..., LoadedModel],
    adapters: Sequence[Mapping[str, LowRankUpdate]],
    share: ModelShare,
    wanted: Mapping[int, set[int]],
) -> dict[int, dict[int, nn.Module]]:
    """Routed experts by layer and number, with their updates of `adapters`.

    load: `load_model` with the arguments of a model that this process has; share: what it has of
    the model; wanted: numbers of experts by layer.
    """
    names = {
        f"layers.{layer}.mlp.experts.{number}": (layer, number)
        for layer, numbers in wanted.items()
        for number in numbers
    }
    if not names:
        return {}

    def is_wanted(name: str) -> bool:
        return ".".join(name.split(".")[:5]) in names

    all_experts = replace(share, experts=1, expert_rank=0, redundant_experts=0)
    model = load(divide=lambda config: all_experts, only=is_wanted).model
    add_adapters(
        model, [{path: own for path, own in each.items() if is_wanted(path)} for each in adapters]
    )
    found: dict[int, dict[int, nn.Module]] = {}
    for name, (layer, number) in names.items():
        found.setdefault(layer, {})[number] = model.get_submodule(name)
    return found
