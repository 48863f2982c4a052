"""Text to token ids and back: tokenizers, chat templates, detokenising, stops. No tensors."""
