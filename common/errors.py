"""The one exception that stands for a user's mistake."""

BEGINNING, END = 1200, 600  # characters that stay of a message that is longer than both


class UserError(ValueError):
    """A mistake of the user's. The message is one line: which file or option, what was found, what to do.

    Names and values out of files may be of any length; of a message that nobody would read the middle is left out.
    Scripts print it without a traceback and exit with status 2 (`common/script.py`).
    """

    def __init__(self, message: str) -> None:
        # A data loading process hands its error on with its own traceback around the message.
        name = f"{type(self).__name__}: "
        message = message.rsplit(name, 1)[-1].strip() if "Original Traceback" in message else message
        is_long = len(message) > BEGINNING + END
        super().__init__(f"{message[:BEGINNING]} … {message[-END:]}" if is_long else message)
