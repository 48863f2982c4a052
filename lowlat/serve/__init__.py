"""The HTTP server: an OpenAI-compatible API and a chat page over one engine."""
