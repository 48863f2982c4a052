"""Mistakes in lowlat's rotation and softmax scale."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lowlat.config.model import ModelConfig, RopeConfig, yarn_mscale
from lowlat.model import mla, rotary
from lowlat.ops import rope
from lowlat.ops.rope import RotaryTable

from .plant import EQUAL, GIVEN, LINEAR, PLAIN, SOFTMAX_ALONE, UNSCALED, Plant, replace_function

MAGNITUDE = rope.rotation_magnitude
FREQUENCIES = rope.inverse_frequencies
TABLE = rope.rotary_table


def m(settings: RopeConfig, name: str) -> float:
    """YaRN's m of one of the two scales."""
    return yarn_mscale(settings.factor, getattr(settings, name) or 0.0)


def unscaled_frequencies(settings: RopeConfig, dim: int) -> Tensor:
    return FREQUENCIES(RopeConfig(rope_theta=settings.rope_theta), dim)


def rotation(turn: Callable[..., Tensor], only: str = "") -> Callable[..., Tensor]:
    """`apply_rope` with a mistake in the rotation of queries, keys or (without `only`) both."""

    def apply(x: Tensor, table: RotaryTable, *, interleave: bool) -> Tensor:
        what = "queries" if x.shape[1] > 1 else "keys"
        made = turn if only in ("", what) else rope.apply_rope
        return made(x, table, interleave=interleave)

    return apply


def halves(x: Tensor, table: RotaryTable, *, interleave: bool) -> Tensor:
    return rope.apply_rope(x, table, interleave=not interleave)


def no_rotation(x: Tensor, *_: Tensor, **__: bool) -> Tensor:
    return x


def left_in_halves(x: Tensor, table: RotaryTable, *, interleave: bool) -> Tensor:
    """Neighbours are rotated, but real parts are left before imaginary ones."""
    turned = rope.apply_rope(x, table, interleave=interleave)
    return torch.cat([turned[..., 0::2], turned[..., 1::2]], dim=-1)


def turns(
    name: str, turn: Callable[..., Tensor], kind: str, first: str, says: str, only: str = ""
) -> Plant:
    return Plant(
        name=f"RoPE: {name}",
        plant=replace_function(mla, "apply_rope", rotation(turn, only)),
        kind=kind,
        first=first,
        says=says,
    )


def magnitude(
    name: str,
    value: Callable[[RopeConfig], float],
    says: str,
    config: dict[str, Any] | None = None,
) -> Plant:
    return Plant(
        name=f"YaRN: cos and sin {name}",
        plant=replace_function(rope, "rotation_magnitude", value),
        kind="yarn_cos_sin",
        first="q_rotated",
        says=says,
        config=config or {},
    )


def scale(
    name: str,
    factor: Callable[[RopeConfig], float],
    says: str,
    *,
    config: dict[str, Any] | None = None,
    kind: str = "yarn_softmax_scale",
    nope: bool = False,
) -> Plant:
    """A factor in place of m(mscale_all_dim)^2; `nope` counts other channels than the rotary."""

    def softmax_scale_of(self: ModelConfig, layer: int) -> float:
        attention: Any = self.attention_of(layer)
        width = attention.qk_nope_head_dim if nope else attention.qk_head_dim
        return width**-0.5 * factor(self.rope_of(layer))

    return Plant(
        name=f"softmax: {name}",
        plant=replace_function(ModelConfig, "softmax_scale_of", softmax_scale_of),
        kind=kind,
        first="scores",
        says=says,
        config=config or {},
    )


def frequencies(name: str, config: dict[str, Any]) -> Plant:
    return Plant(
        name=f"RoPE: frequencies not scaled, {name}",
        plant=replace_function(rope, "inverse_frequencies", unscaled_frequencies),
        kind="rope_frequencies",
        first="q_rotated",
        says=f"does not scale the frequencies for {name}",
        config=config,
    )


def shifted(offset: int) -> Plant:
    """Positions with an offset, in both queries and keys: scores show nothing of it."""

    def table(positions: Tensor, *rest: Any) -> RotaryTable:
        return TABLE(positions + offset, *rest)

    return Plant(
        name=f"RoPE: positions {offset:+d}",
        plant=replace_function(rotary, "rotary_table", table),
        kind="position_offset",
        first="q_rotated",
        says=f"rotates the queries at position p {'+' if offset > 0 else '-'} {abs(offset):,}, not",
    )


ROTATION = [
    shifted(1),
    shifted(-1),
    shifted(-2003),
    turns(
        "halves for neighbours",
        halves,
        "rope_layout",
        "q_rotated",
        "rotates pairs (i, i + d/2) of the queries, not (2i, 2i+1)",
    ),
    turns(
        "queries in halves",
        halves,
        "rope_layout",
        "q_rotated",
        "rotates pairs (i, i + d/2) of the queries, not (2i, 2i+1)",
        "queries",
    ),
    turns(
        "keys in halves",
        halves,
        "rope_layout",
        "k_rotated",
        "rotates pairs (i, i + d/2) of the keys, not (2i, 2i+1)",
        "keys",
    ),
    turns(
        "queries not rotated",
        no_rotation,
        "rope_missing",
        "q_rotated",
        "does not rotate the queries",
        "queries",
    ),
    turns(
        "keys not rotated",
        no_rotation,
        "rope_missing",
        "k_rotated",
        "does not rotate the keys",
        "keys",
    ),
    turns(
        "rotated channels in halves",
        left_in_halves,
        "rope_order",
        "q_rotated",
        "leaves the rotated channels of the queries in another order",
    ),
    turns(
        "rotated channels of keys in halves",
        left_in_halves,
        "rope_order",
        "k_rotated",
        "leaves the rotated channels of the keys in another order",
        "keys",
    ),
    frequencies("yarn", {}),
    frequencies("linear", LINEAR),
]
MAGNITUDES = [
    magnitude("not corrected", lambda _: 1.0, "the factor is not applied"),
    magnitude("not corrected, no scales", lambda _: 1.0, "the factor is not applied", UNSCALED),
    magnitude(
        "without the denominator",
        lambda settings: m(settings, "mscale"),
        "the denominator m(mscale_all_dim) is missing",
    ),
    magnitude(
        "without the denominator, equal scales",
        lambda settings: m(settings, "mscale"),
        "the denominator m(mscale_all_dim) is missing",
        EQUAL,
    ),
    magnitude(
        "by the denominator",
        lambda settings: m(settings, "mscale_all_dim"),
        "only m(mscale_all_dim) is applied",
    ),
    magnitude(
        "by m(1)",
        lambda settings: yarn_mscale(settings.factor, 1.0),
        "mscale and mscale_all_dim are ignored",
    ),
    magnitude("not as given", lambda _: 1.0, "attention_factor is not applied", GIVEN),
    magnitude("twice", lambda settings: MAGNITUDE(settings) ** 2, "the factor is applied twice"),
    magnitude(
        "twice, no scales",
        lambda settings: MAGNITUDE(settings) ** 2,
        "the factor is applied twice",
        UNSCALED,
    ),
]
SCALES = [
    scale("not corrected", lambda _: 1.0, "m(mscale_all_dim)^2 is missing"),
    scale(
        "not corrected, equal scales",
        lambda _: 1.0,
        "m(mscale_all_dim)^2 is missing",
        config=EQUAL,
    ),
    scale(
        "not corrected, no mscale",
        lambda _: 1.0,
        "m(mscale_all_dim)^2 is missing",
        config=SOFTMAX_ALONE,
    ),
    scale(
        "correction not squared",
        lambda settings: m(settings, "mscale_all_dim"),
        "m(mscale_all_dim) is not squared",
    ),
    scale(
        "correction twice",
        lambda settings: m(settings, "mscale_all_dim") ** 4,
        "m(mscale_all_dim)^2 is applied twice",
    ),
    scale(
        "corrected by mscale",
        lambda settings: m(settings, "mscale") ** 2,
        "m(mscale)^2 is used instead of m(mscale_all_dim)^2",
    ),
    scale(
        "corrected by m(1)",
        lambda settings: yarn_mscale(settings.factor, 1.0) ** 2,
        "mscale_all_dim is ignored",
    ),
    scale(
        "YaRN and no rotary channels",
        lambda settings: m(settings, "mscale_all_dim") ** 2,
        "the RoPE channels are not counted",
        nope=True,
    ),
    scale(
        "no rotary channels",
        lambda _: 1.0,
        "the RoPE channels are not counted",
        config=PLAIN,
        kind="softmax_scale",
        nope=True,
    ),
]
ATTENTION = [*ROTATION, *MAGNITUDES, *SCALES]
