"""Files <-> parameters: safetensors folders and GGUF files, read lazily and written atomically."""
