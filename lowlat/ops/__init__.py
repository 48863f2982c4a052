"""Tensor functions in plain PyTorch: the definition of every computation and the oracle of its fast
twins.
"""
