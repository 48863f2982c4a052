"""Model configuration: dataclasses, config.json, presets, parameter and memory counts."""
