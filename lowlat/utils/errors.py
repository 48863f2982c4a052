"""The one exception for faults a user can cause; the command line turns it into one line and exit
code 2.
"""


class UserError(ValueError):
    """A fault in what the user gave: the message is one line that names the file, field or option
    and the remedy.
    """
