"""Text as people's programs write it, and file names that are no text."""

import json


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
