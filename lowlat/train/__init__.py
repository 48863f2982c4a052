"""Training: recipes, data, the trainer, its saves and its logs."""
