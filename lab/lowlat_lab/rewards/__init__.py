"""GRPO study: rewards over steps with several seeds, ablation of the trainer's arithmetic."""
