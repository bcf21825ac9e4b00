"""The one exception class for mistakes that a user can repair."""


class UserError(ValueError):
    """A mistake in input or configuration.

    The message names the field or file, its value and the remedy; the entry points print it without a
    traceback and exit with status 2.
    """


class UnreadableFile(UserError):
    """A file that cannot be opened or read now: nothing is known of its content, so it is not a damaged one."""
