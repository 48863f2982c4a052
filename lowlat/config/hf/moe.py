"""MoE fields of config.json -> MoEConfig, with checks that routing is possible."""

from dataclasses import fields as dataclass_fields
from typing import Any, NamedTuple

from lowlat.config.model import MLPLayerType, MoEConfig
from lowlat.utils.json_fields import JsonFields

FAMILY_FIELDS = ("scale_after_norm", "router_bias", "output_norm")
"""Fields of MoEConfig that the family implies; no files have them."""

MOE_FIELDS = {
    *(field.name for field in dataclass_fields(MoEConfig) if field.name not in FAMILY_FIELDS),
    *("num_local_experts", "num_experts"),
}
"""Fields of the expert layers, without effect in a model that has none."""

SOFTMAX_FAMILIES = ("deepseek_v2", "mistral4")
"""Families whose gate is a softmax; in all others it is a sigmoid."""

LAYER_TYPE_FAMILIES = ("glm4_moe_lite", "axk1")
"""Families whose files give mlp_layer_types; without it, the first layer alone is dense."""


def moe_from_hf(
    fields: JsonFields, model_type: str, layers: int, mtp_layers: int
) -> MoEConfig | None:
    """The experts; None for a model all of whose layers are dense (or n_routed_experts null)."""
    types = _layer_types(fields, model_type, layers)
    name = fields.spelling("n_routed_experts", "num_local_experts", "num_experts")
    is_null = fields.mentioned(name) and not fields.present(name)
    if is_null or not types.has_experts(layers, mtp_layers):
        fields.ignore(*MOE_FIELDS)
        return None
    is_v2, has_no_groups = model_type == "deepseek_v2", model_type in ("glm4_moe_lite", "mistral4")
    softmax_methods = ("greedy", "group_limited_greedy")
    method: Any = fields.choice(
        "topk_method",
        softmax_methods if is_v2 else ("noaux_tc",),
        "greedy" if is_v2 else "noaux_tc",
    )
    scoring: Any = "softmax" if model_type in SOFTMAX_FAMILIES else "sigmoid"
    fields.choice("scoring_func", (scoring,), scoring)
    # greedy selection ignores groups
    group_default = 1 if has_no_groups or method == "greedy" else None
    groups, kept = (fields.integer(key, group_default) for key in ("n_group", "topk_group"))
    if method == "greedy":
        groups, kept = 1, 1
    moe = MoEConfig(
        n_routed_experts=fields.integer(name),
        num_experts_per_tok=fields.integer("num_experts_per_tok"),
        n_shared_experts=fields.nullable_integer("n_shared_experts", minimum=0) or 0,
        moe_intermediate_size=fields.integer("moe_intermediate_size"),
        **types._asdict(),
        scoring_func=scoring,
        topk_method=method,
        n_group=groups,
        topk_group=kept,
        norm_topk_prob=fields.boolean("norm_topk_prob", not is_v2),
        routed_scaling_factor=fields.positive(
            "routed_scaling_factor", 1.0 if model_type in SOFTMAX_FAMILIES else None
        ),
        scale_after_norm=not is_v2,
        router_bias=model_type != "mistral4",
        output_norm=model_type == "axk1",
    )
    if is_v2 and moe.norm_topk_prob and moe.num_experts_per_tok > 1:
        # DeepSeek's file divides and does not scale, transformers scales and does not divide,
        # llama.cpp does both; no released V2 shows which is meant
        remedy = "implementations of deepseek_v2 disagree about it; set it to false"
        raise fields.unsupported("norm_topk_prob", remedy)
    check_routing(fields, moe)
    return moe


def check_routing(fields: JsonFields, moe: MoEConfig) -> None:
    """Raise UserError naming the field of `fields` that makes routing among `moe` impossible."""
    experts, chosen = moe.n_routed_experts, moe.num_experts_per_tok
    if experts % moe.n_group:
        raise fields.error("n_group", f"{moe.n_group} does not divide n_routed_experts {experts}")
    if moe.topk_group > moe.n_group:
        raise fields.error("topk_group", f"{moe.topk_group} is more than n_group {moe.n_group}")
    size = experts // moe.n_group
    if moe.topk_method == "noaux_tc" and size < 2:
        raise fields.error(
            "n_group", f"{moe.n_group} leaves groups of 1 expert; a group's score needs 2"
        )
    if chosen > moe.topk_group * size:
        raise fields.error(
            "num_experts_per_tok",
            f"{chosen} is more than the {moe.topk_group * size} experts of topk_group groups",
        )


class _LayerTypes(NamedTuple):
    """Fields of MoEConfig that say which layers have experts."""

    first_k_dense_replace: int
    moe_layer_freq: int
    mlp_layer_types: tuple[MLPLayerType, ...] | None

    def has_experts(self, layers: int, mtp_layers: int) -> bool:
        """Whether a decoder layer or MTP module may have some."""
        if self.mlp_layer_types is not None:
            return True
        return self.first_k_dense_replace < layers + mtp_layers


def _layer_types(fields: JsonFields, model_type: str, layers: int) -> _LayerTypes:
    """Which layers have experts: mlp_layer_types, where the file has it, else
    first_k_dense_replace and moe_layer_freq, which must not contradict it.
    """
    types = fields.strings("mlp_layer_types")
    has_first = fields.present("first_k_dense_replace")
    default = 1 if types or model_type in LAYER_TYPE_FAMILIES else None
    first = fields.integer("first_k_dense_replace", default, minimum=0)
    frequency = fields.integer("moe_layer_freq", 1)
    if not types:
        return _LayerTypes(first, frequency, None)
    if len(types) != layers:
        raise fields.error("mlp_layer_types", f"has {len(types)} entries for {layers} layers")
    kinds: tuple[MLPLayerType, ...] = tuple(_kind(fields, kind) for kind in types)
    if has_first or frequency > 1:
        if regular_layer_types(range(layers), first, frequency) != kinds:
            name = "first_k_dense_replace" if has_first else "moe_layer_freq"
            raise fields.error(
                "mlp_layer_types", f"contradicts {name} {fields.value(name)}; keep mlp_layer_types"
            )
        return _LayerTypes(first, frequency, None)
    dense = kinds.index("sparse") if "sparse" in kinds else layers
    is_regular = regular_layer_types(range(layers), dense, 1) == kinds
    return _LayerTypes(dense, 1, None) if is_regular else _LayerTypes(0, 1, kinds)


def _kind(fields: JsonFields, kind: str) -> MLPLayerType:
    if kind == "dense":
        return "dense"
    if kind == "sparse":
        return "sparse"
    raise fields.wrong("mlp_layer_types", "an array of 'dense' and 'sparse'")


def regular_layer_types(layers: range, first: int, frequency: int) -> tuple[MLPLayerType, ...]:
    """Kinds of layers by first_k_dense_replace and moe_layer_freq."""
    return tuple(
        "sparse" if layer >= first and layer % frequency == 0 else "dense" for layer in layers
    )
