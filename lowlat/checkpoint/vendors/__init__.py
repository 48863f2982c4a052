"""Safetensors files of other programs' quantizers: compressed-tensors, AWQ, GPTQ, FP8, MXFP4."""
