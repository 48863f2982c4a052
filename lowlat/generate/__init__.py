"""Text generation: prompts, structured outputs, completions, and the session over the engine."""
