"""UserError: the one exception for user errors; the CLI prints one line and exits with code 2."""


class UserError(ValueError):
    """An error in user input: one line that names file, field or option, and the remedy."""
