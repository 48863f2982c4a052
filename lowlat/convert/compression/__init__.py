"""KV cache compression: GQA to MLA with a smaller latent, calibrated on text."""
