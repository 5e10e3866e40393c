"""The one exception that programs turn into a line for people and exit status 2."""


class UserError(ValueError):
    """Something the user gave (a flag, a field, a file) cannot be used.

    Its text is one line that names the thing, its value and what would be right.
    """
