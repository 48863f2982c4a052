"""Checkpoint conversion: GQA to MLA, KV cache compression, data types, file formats."""
