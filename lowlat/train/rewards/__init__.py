"""Reward functions for GRPO, in processes of their own with limits on time and memory.

`workers` scores samples; `functions` are the built-in rewards; `reasoning_gym` makes prompts.
"""
