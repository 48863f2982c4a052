"""The model as modules, one file per idea: DeepSeek-V3 (MLA, DeepSeekMoE, MTP), and GQA, GLA, GTA
and TPA attention.

Read `transformer`, `block`, `mla`, `moe`, `mtp`. File formats, KV cache layouts, sharding and the
modules of training are elsewhere.
"""
