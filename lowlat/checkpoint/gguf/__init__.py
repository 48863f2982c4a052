"""GGUF files: bytes and block formats, metadata, tensor names and layouts, both directions."""
