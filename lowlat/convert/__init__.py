"""Checkpoint conversion: GQA to MLA, KV cache compression, number types, file formats."""
