"""Text to tokens to windows: documents are read, tokenised into a folder, and cut for training."""
