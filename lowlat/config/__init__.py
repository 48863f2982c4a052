"""Model configuration: what a model is, how config.json says it, and what it costs."""
