"""Model of the balance, MTP and precision studies: a small DeepSeek-V3 with MLA and MoE."""

from typing import Any

from lowlat_lab.study.plan import model_table
from lowlat_lab.study.sizes import StudySize

EXPERTS = 16
CHOSEN = 4


def expert_table(size: StudySize, *, mtp: int) -> dict[str, Any]:
    """The [model] table: MLA, a dense layer, then MoE layers, `mtp` MTP modules."""
    width = size.head_dim
    attention = {
        "form": "mla",
        "num_attention_heads": size.num_attention_heads,
        "kv_lora_rank": 4 * width,
        "qk_nope_head_dim": width,
        "qk_rope_head_dim": width // 2,
        "v_head_dim": width,
    }
    moe = {
        "n_routed_experts": EXPERTS,
        "num_experts_per_tok": CHOSEN,
        "n_shared_experts": 1,
        "moe_intermediate_size": size.moe_intermediate_size,
        "first_k_dense_replace": 1,
    }
    table = model_table(size, attention, size.intermediate_size)
    return table | {"moe": moe, "num_nextn_predict_layers": mtp}
