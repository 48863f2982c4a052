"""One training step: passes over micro-batches, losses, load balancing, optimizers, distillation."""
