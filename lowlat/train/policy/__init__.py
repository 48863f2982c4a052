"""Policy of reinforcement learning: the engine's forward pass with gradients, rollouts, GRPO."""
