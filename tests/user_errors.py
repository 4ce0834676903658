"""Users' mistakes, as tests look at them."""

import pytest

from common.errors import UserError


def error_of(call, *args) -> str:
    """The message of the UserError that a call raises; checked to be one line."""
    with pytest.raises(UserError) as caught:
        call(*args)
    message = str(caught.value)
    assert "\n" not in message
    return message
