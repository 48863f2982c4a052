"""Short names of attention variants for reports: 'MLA 512 + 64', 'GQA, 8 groups'."""

from lowlat.config.attention import (
    GLAConfig,
    GQAConfig,
    GTAConfig,
    MLAConfig,
    ModelAttention,
    TPAConfig,
)


def short_name(attention: ModelAttention) -> str:
    """'MLA 512 + 64', 'MLA 96-224 + 16-64' where layers differ, 'GQA, 8 groups', 'TPA, ranks 2 +
    2': the form in a few words.
    """
    match attention:
        case MLAConfig() | tuple():
            latent, rotary = entry_widths(attention)
            return f"MLA {latent} + {rotary}"
        case GLAConfig():
            groups, rank = attention.num_latent_groups, attention.group_rank
            return f"GLA-{groups}, {groups} x {rank} + {attention.qk_rope_head_dim}"
        case GTAConfig():
            groups, width = attention.num_key_value_heads, attention.head_dim
            return f"GTA-{groups}, {groups} x {width} + {attention.qk_rope_head_dim}"
        case TPAConfig():
            return f"TPA, ranks {attention.k_rank} + {attention.v_rank}"
        case GQAConfig():
            groups = attention.num_key_value_heads
            if groups == attention.num_attention_heads:
                return f"MHA, {groups} heads"
            return "MQA" if groups == 1 else f"GQA, {groups} groups"


def entry_widths(attention: MLAConfig | tuple[MLAConfig, ...]) -> tuple[str, str]:
    """d_c and d_R as text: '512' and '64', or from the narrowest to the widest layer, '96-224'."""
    layers = attention if isinstance(attention, tuple) else (attention,)
    return (
        _span([layer.kv_lora_rank for layer in layers]),
        _span([layer.qk_rope_head_dim for layer in layers]),
    )


def _span(widths: list[int]) -> str:
    low, high = min(widths), max(widths)
    return f"{low}" if low == high else f"{low}-{high}"
