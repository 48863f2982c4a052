"""HTTP server: OpenAI-compatible API, chat page and metrics over one model's engine.

`run` listens, `app` assembles the ASGI application, `async_engine` runs the engine in its thread.
Sub-packages, each importing only those before it: `protocol` (chat requests),
`tool_parsers`, `http`, `chat`, `routes` (one module per API).
"""
