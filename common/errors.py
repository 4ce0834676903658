"""The one exception that stands for a user's mistake."""


class UserError(ValueError):
    """A mistake of the user's. The message is one line: which file or option, what was found, what to do.

    Scripts print it without a traceback and exit with status 2 (`common/script.py`).
    """

    def __init__(self, message: str) -> None:
        # A data loading process hands its error on with its own traceback around the message.
        name = f"{type(self).__name__}: "
        super().__init__(message.rsplit(name, 1)[-1].strip() if "Original Traceback" in message else message)
