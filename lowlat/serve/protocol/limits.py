"""Limits on the size of one request.

Configurable limits are fields of `serve.config`, with their defaults here; sampling ranges are in
`engine.params`, sizes of schemas, patterns and grammars in `generate.structured`.
"""

MAX_BODY_BYTES = 4 * 2**20
"""Largest request body; more gets 413."""
MAX_HEADER_BYTES = 32 * 2**10
"""Largest request line and headers together; more gets 431."""
MAX_JSON_DEPTH = 64
"""Deepest nesting of arrays and objects in a body."""
MAX_JSON_VALUES = 100_000
"""Values of a body, keys included; numbers in arrays, such as token ids, do not count."""
MAX_JSON_KEYS = 2048
"""Keys per object of a body."""
MAX_UNKNOWN_FIELDS = 32
"""Fields beyond those of a request object; more are not validated one by one."""
MAX_MESSAGES = 2048
"""Messages per chat."""
MAX_CONTENT_PARTS = 256
"""Text parts per message."""
MAX_PROMPTS = 128
"""Prompts of one completions request, and prompts times n."""
MAX_EMBEDDING_INPUTS = 2048
"""Texts of one embeddings request."""
MAX_LOGPROBS = 128
"""Completions times (top_logprobs + 1): the number of log-probabilities per position."""
MAX_PROMPT_LOGPROBS = 1 << 18
"""Completions times prompt tokens times (logprobs + 1), with echo or prompt_logprobs."""
MAX_PROMPT_TOKENS = 1 << 20
"""Token ids per prompt; the context length is checked later."""
MAX_TOOLS = 128
"""Functions per chat, and tool calls per message."""
MAX_NAME = 64
"""Characters of the name of a participant, or of a key of metadata."""
MAX_FUNCTION_NAME = 128
"""Characters of the name of a function or schema."""
MAX_ID = 256
"""Characters of an id or a user name."""
MAX_DESCRIPTION = 64 * 2**10
"""Characters of a description."""
MAX_METADATA = 16
"""Pairs of metadata."""
MAX_METADATA_VALUE = 512
"""Characters of one metadata value."""
MAX_TEMPLATE_VARIABLES = 16
"""Variables in chat_template_kwargs."""
MAX_PRIORITY = 100
"""Largest absolute value of priority."""
MAX_DEADLINE_SECONDS = 24 * 3600.0
"""Longest deadline a request may set."""
