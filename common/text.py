"""Text as people's programs write it, and file names that are no text."""

import json
import reprlib
from typing import Any

_REPR = reprlib.Repr()
_REPR.maxlevel, _REPR.maxstring, _REPR.maxother = 3, 80, 80
_REPR.maxlist = _REPR.maxtuple = _REPR.maxdict = 12
LONGEST = 160  # of what is quoted in a message


def decode(content: bytes) -> str:
    """Text in UTF-8, or in UTF-16 or UTF-32 as Windows programs save it, with or without a byte order mark.

    UnicodeDecodeError (a ValueError) for any other encoding.
    """
    return content.decode(json.detect_encoding(content))  # by the mark, else by the zeros among the first characters


def printable(text: str) -> str:
    """Text with a question mark for each byte of a file name that is no UTF-8: what draws or encodes text refuses it.

    Python has such bytes as halves of characters (PEP 383); as JSON they are escaped and come back as they were.
    """
    return text.encode(errors="replace").decode()


def shown(value: Any) -> str:
    """A value as messages quote it: its repr, of large ones the beginning, without making the whole."""
    text = _REPR.repr(value)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."
