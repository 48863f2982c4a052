"""UserError: the one exception for user errors; the CLI prints one line and exits with code 2."""


class UserError(ValueError):
    """An error in user input: one line that names file, field or option, and the remedy."""


class ContextLengthError(UserError):
    """A prompt, or a prompt with its output, exceeds the context length of `context` tokens.

    `field`: the option to change, prompt or max_tokens.
    """

    def __init__(self, message: str, *, context: int, field: str) -> None:
        super().__init__(message)
        self.context = context
        self.field = field
