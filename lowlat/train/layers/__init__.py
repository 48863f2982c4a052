"""Modules of training that replace those of `lowlat.model`: FP8, LoRA, deferred weight gradients,
fused backward passes, activation checkpointing, stacked experts.

A replacement takes over the parameters and submodules of the module it replaces under the same
names, so state dicts do not depend on how a model is trained. Nothing here knows of processes.
"""
