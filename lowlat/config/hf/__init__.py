"""config.json: strict reader, writer, and lowlat's extensions of Hugging Face's format."""
