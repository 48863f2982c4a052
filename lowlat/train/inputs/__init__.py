"""Inputs of a training run, checked before it starts: configs, data, base model, teacher."""
