"""Text as people's programs write it, and file names that are no text."""

import json
import os
import re
import reprlib
from typing import Any

CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")  # characters that a terminal obeys, or that end a name or line
_REPR = reprlib.Repr()
_REPR.maxlevel, _REPR.maxstring, _REPR.maxother = 3, 80, 80
_REPR.maxlist = _REPR.maxtuple = _REPR.maxdict = 12
LONGEST = 160  # of what is quoted in a message


def decode(content: bytes) -> str:
    """Text in UTF-8, or in UTF-16 or UTF-32 as Windows programs save it, with or without a byte order mark.

    UnicodeDecodeError (a ValueError) for any other encoding.
    """
    return content.decode(json.detect_encoding(content))  # by the mark, else by the zeros among the first characters


def is_plain(text: str) -> bool:
    """False with control characters, and with halves of characters but for those that are bytes of a file name."""
    try:
        return os.fsencode(text) is not None and CONTROL.search(text) is None
    except UnicodeEncodeError:
        return False


def printable(text: str) -> str:
    """Text with a question mark for each byte of a file name that is no UTF-8, and control characters escaped.

    What draws or encodes text refuses such bytes, and a terminal obeys such characters. Python has these bytes as
    halves of characters (PEP 383); as JSON they are escaped and come back as they were.
    """
    text = CONTROL.sub(lambda found: found[0] if found[0] in "\t\n" else f"\\x{ord(found[0]):02x}", text)
    return text.encode(errors="replace").decode()


def shown(value: Any) -> str:
    """A value as messages quote it: one short line of its repr, of large ones the beginning, whatever it is."""
    try:
        text = printable(" ".join(_REPR.repr(value).split()))
    except Exception:  # e.g. a number of 5000 digits; an object's own repr may fail in any way
        text = f"a {type(value).__name__}"
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."
