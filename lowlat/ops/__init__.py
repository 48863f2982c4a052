"""Tensor functions: reference implementations in plain PyTorch, and the native kernels that are
tested against them.
"""
