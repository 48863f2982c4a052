"""MoE fields of config.json -> MoEConfig, with checks that routing is possible."""

from dataclasses import fields as dataclass_fields
from typing import Any

from lowlat.config.model import MoEConfig
from lowlat.utils.json_fields import JsonFields

MOE_FIELDS = {
    *(field.name for field in dataclass_fields(MoEConfig) if field.name != "scale_after_norm"),
    *("num_local_experts", "num_experts"),
}
"""Fields of the expert layers, without effect in a model that has none."""


def moe_from_hf(
    fields: JsonFields, model_type: str, layers: int, mtp_layers: int
) -> MoEConfig | None:
    """The experts; None for a model all of whose layers are dense (or n_routed_experts null)."""
    first_dense = _first_k_dense_replace(fields, model_type, layers)
    name = fields.spelling("n_routed_experts", "num_local_experts", "num_experts")
    is_null = fields.mentioned(name) and not fields.present(name)
    if is_null or first_dense >= layers + mtp_layers:
        fields.ignore(*MOE_FIELDS)
        return None
    is_v2, is_glm = model_type == "deepseek_v2", model_type == "glm4_moe_lite"
    softmax_methods = ("greedy", "group_limited_greedy")
    method: Any = fields.choice(
        "topk_method",
        softmax_methods if is_v2 else ("noaux_tc",),
        "greedy" if is_v2 else "noaux_tc",
    )
    scoring: Any = "softmax" if is_v2 else "sigmoid"
    fields.choice("scoring_func", (scoring,), scoring)
    # greedy selection ignores groups
    group_default = 1 if is_glm or method == "greedy" else None
    groups, kept = (fields.integer(key, group_default) for key in ("n_group", "topk_group"))
    if method == "greedy":
        groups, kept = 1, 1
    moe = MoEConfig(
        n_routed_experts=fields.integer(name),
        num_experts_per_tok=fields.integer("num_experts_per_tok"),
        n_shared_experts=fields.nullable_integer("n_shared_experts", minimum=0) or 0,
        moe_intermediate_size=fields.integer("moe_intermediate_size"),
        first_k_dense_replace=first_dense,
        moe_layer_freq=fields.integer("moe_layer_freq", 1),
        scoring_func=scoring,
        topk_method=method,
        n_group=groups,
        topk_group=kept,
        norm_topk_prob=fields.boolean("norm_topk_prob", not is_v2),
        routed_scaling_factor=fields.positive("routed_scaling_factor", 1.0 if is_v2 else None),
        scale_after_norm=not is_v2,
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


def _first_k_dense_replace(fields: JsonFields, model_type: str, layers: int) -> int:
    """Leading dense layers, from first_k_dense_replace or (glm4_moe_lite) from mlp_layer_types."""
    if model_type != "glm4_moe_lite":
        return fields.integer("first_k_dense_replace", minimum=0)
    types = fields.strings("mlp_layer_types")
    dense = len(types) - len(types[types.index("sparse") :]) if "sparse" in types else len(types)
    first = fields.integer("first_k_dense_replace", dense if types else 1, minimum=0)
    expected = tuple("dense" if layer < first else "sparse" for layer in range(layers))
    if types and types != expected:
        raise fields.error(
            "mlp_layer_types",
            f"must be 'dense' for first_k_dense_replace = {first} layers, then 'sparse'",
        )
    if fields.integer("moe_layer_freq", 1) != 1:
        raise fields.unsupported(
            "moe_layer_freq", "mlp_layer_types says which layers are sparse (1)"
        )
    return first
