"""One training step: micro-batches, losses, load balancing, optimizers, distillation."""
