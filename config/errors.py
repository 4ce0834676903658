"""The one exception that stands for a user's mistake."""


class UserError(ValueError):
    """A mistake in a file, an option or a configuration that the user can put right.

    The message is a single line that names the file or the option, what was found, what was expected and what to do.
    Scripts print it without a traceback and exit with status 2.
    """
