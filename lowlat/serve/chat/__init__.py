"""Chat requests: message history, chat template features, output parsing, constrained output."""
