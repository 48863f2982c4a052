"""Comparison of the weights of two checkpoints, and explanations of what differs."""
