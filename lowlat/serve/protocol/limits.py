"""Every cap on what one request may hold, in one place.

Owns the numbers alone. Those an operator may want to change are fields of `serve.config`, which
takes its defaults from here; sampling ranges are in `engine.params`, sizes of schemas, patterns and
grammars in `engine.structured`.
"""

MAX_BODY_BYTES = 4 * 2**20
"""Largest request body; 413 above."""
MAX_HEADER_BYTES = 32 * 2**10
"""Largest request line and headers together; the connection is refused above."""
MAX_JSON_DEPTH = 64
"""Deepest nesting of arrays and objects in a body."""
MAX_MESSAGES = 2048
"""Messages of one chat."""
MAX_CONTENT_PARTS = 256
"""Text parts of one message."""
MAX_PROMPTS = 128
"""Prompts of one completions request; with n, at most this many completions too."""
MAX_LOGPROBS = 128
"""Completions times (listed tokens + 1) of a request with logprobs: an answer holds as many figures
for each place.
"""
MAX_PROMPT_TOKENS = 1 << 20
"""Token ids of one prompt given as ids; the context is checked later."""
MAX_TOOLS = 128
"""Functions of one chat, and tool calls of one message."""
MAX_NAME = 64
"""Characters of a function's, participant's or schema's name."""
MAX_ID = 256
"""Characters of an id or of a user's name."""
MAX_DESCRIPTION = 16 * 2**10
"""Characters of a description."""
MAX_METADATA = 16
"""Pairs of metadata."""
MAX_METADATA_VALUE = 512
"""Characters of one value of metadata."""
MAX_TEMPLATE_VARIABLES = 16
"""Variables a request may pass to the chat template."""
MAX_PRIORITY = 100
"""Priorities run from minus this to this."""
MAX_DEADLINE_SECONDS = 24 * 3600.0
"""Longest deadline a request may set."""
