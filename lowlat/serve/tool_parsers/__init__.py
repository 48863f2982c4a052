"""Tool-call formats of model families: streaming parsers, and grammars that force valid calls."""
