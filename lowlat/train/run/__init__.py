"""Training runs: build, training loop, state, distillation, export."""
