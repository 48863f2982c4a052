"""What a planted mistake is, and the configs that some of them need to be seen."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from .models import EQUAL_SCALES, YARN, Patch

DEFAULT = {"rope_type": "default", "rope_theta": 1e4}
EQUAL = {"rope_parameters": EQUAL_SCALES}
UNSCALED = {
    "rope_parameters": {name: v for name, v in YARN.items() if not name.startswith("mscale")}
}
"""YaRN whose factor on cos and sin is m(1) and whose softmax has none."""
SOFTMAX_ALONE = {"rope_parameters": {name: v for name, v in YARN.items() if name != "mscale"}}
GIVEN = {"rope_parameters": YARN | {"attention_factor": 1.3}}
"""YaRN whose factor on cos and sin stands in the config."""
PLAIN = {"rope_parameters": DEFAULT}
LINEAR = {"rope_parameters": DEFAULT | {"rope_type": "linear", "factor": 8.0}}
UNNORMALISED = {"norm_topk_prob": False}


@dataclass(frozen=True, kw_only=True, slots=True)
class Plant:
    """A mistake, and how it must be reported."""

    name: str
    plant: Patch
    kind: str
    """The mistake's name in a report."""
    first: str
    """The part that differs first."""
    says: str
    """Part of the sentence."""
    config: dict[str, Any] = field(default_factory=dict)
    """Changes to the config of `v3_case`, which has YaRN with mscale and mscale_all_dim unequal."""
    implementation: Literal["lowlat", "transformers"] = "lowlat"


def replace_function(owner: Any, name: str, new: Callable[..., Any]) -> Patch:
    return lambda patch: patch.setattr(owner, name, new)
