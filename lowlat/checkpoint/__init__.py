"""Model checkpoints: fetch, open, load, map names, quantize on load, save; safetensors and GGUF."""
