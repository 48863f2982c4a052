"""safetensors files: a checked, memory-mapped reader and one writer."""
