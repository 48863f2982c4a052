"""Names of the model families and of config.json fields without effect; data only."""

ARCHITECTURES = {
    "deepseek_v2": "DeepseekV2ForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "deepseek_v32": "DeepseekV32ForCausalLM",
    "kimi_k2": "DeepseekV3ForCausalLM",
    "glm_moe_dsa": "GlmMoeDsaForCausalLM",
    "glm4_moe_lite": "Glm4MoeLiteForCausalLM",
    "youtu": "YoutuForCausalLM",
    "minicpm3": "MiniCPM3ForCausalLM",
    "mistral4": "Mistral4ForCausalLM",
    "axk1": "AXK1ForCausalLM",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
"""Supported model_type and the class name its checkpoints give in `architectures`."""

MULTIMODAL_FAMILIES = ("kimi_k25",)
"""Families with a vision tower; their language model, a text_config, is of the family kimi_k2."""

LOWLAT = "lowlat"
"""model_type of files in lowlat's own form."""

MAX_LAYERS = 100_000
"""Far above any model; keeps a hostile file from asking for lists of 2**31 layers."""

SPARSE_FAMILIES = ("deepseek_v32", "glm_moe_dsa")
"""Families with sparse attention (DSA): an indexer in every layer, in glm_moe_dsa in some."""

DENSE_MLA_FAMILIES = ("youtu", "minicpm3")
"""Families with Multi-head Latent Attention and no experts."""

MLA_FAMILIES = (
    *("deepseek_v2", "deepseek_v3", "kimi_k2", "glm4_moe_lite", "mistral4", "axk1"),
    *DENSE_MLA_FAMILIES,
    *SPARSE_FAMILIES,
)
"""Families with Multi-head Latent Attention; all others have grouped-query attention."""

MTP_FAMILIES = ("deepseek_v3", "kimi_k2", "glm4_moe_lite", *SPARSE_FAMILIES)
"""Families whose files may have MTP modules."""

ROPE_LAYOUT_FAMILIES = (*MTP_FAMILIES, "youtu", "mistral4", "axk1")
"""Families whose files say how rotary pairs are laid out (rope_interleave)."""

HARMLESS_FIELDS = (
    # where the file comes from
    "_name_or_path",
    "_attn_implementation",
    "_attn_implementation_autoset",
    "_experts_implementation",
    "_commit_hash",
    "auto_map",
    "is_llama_config",
    "name_or_path",
    "tokenizer_class",
    "transformers.js_config",
    "transformers_version",
    "unsloth_fixed",
    "unsloth_version",
    # storage and bookkeeping: the tensors have their own dtype
    "dtype",
    "torch_dtype",
    "model_max_length",
    "pad_token_id",
    "qk_head_dim",
    "torchscript",
    "use_bfloat16",
    "use_cache",
    "embedding_initializer_range",
    # what a forward pass returns
    "chunk_size_feed_forward",
    "id2label",
    "label2id",
    "num_labels",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "output_scores",
    "return_dict",
    "return_dict_in_generate",
    # training and parallel execution
    "aux_loss_alpha",
    "ep_size",
    "pretraining_tp",
    "router_aux_loss_coef",
    "seq_aux",
    # defaults of generate(), which belong to generation_config.json
    "diversity_penalty",
    "do_sample",
    "early_stopping",
    "length_penalty",
    "max_length",
    "min_length",
    "no_repeat_ngram_size",
    "num_beam_groups",
    "num_beams",
    "num_return_sequences",
    "repetition_penalty",
    "temperature",
    "top_k",
    "top_p",
    "typical_p",
)
"""Fields that never change what the model computes."""
