"""Reinforcement learning with GRPO: rollouts, advantages, policy loss, and the engine's forward
pass with gradients.
"""
