"""Output of a conversion: Hugging Face folder or GGUF file, written in chunks of rows."""
