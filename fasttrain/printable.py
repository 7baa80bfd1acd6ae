"""Text for a terminal or a log, whatever is in it."""

from __future__ import annotations

import os


def printable(text: object) -> str:
    """``text`` on one line that any terminal shows as it is: the name of a file may hold newlines, colours and worse.

    What is not printable is written as in a shell's ``$'…'``: ``\\n``, or byte by byte, ``\\xe9``, as it is on disk.
    What is printable stays as it is, so a second pass changes nothing.
    """
    return "".join(character if character.isprintable() else _escaped(character) for character in str(text))


def _escaped(character: str) -> str:
    if character in "\n\r\t":
        return {"\n": "\\n", "\r": "\\r", "\t": "\\t"}[character]
    try:
        return "".join(f"\\x{byte:02x}" for byte in os.fsencode(character))
    except UnicodeEncodeError:  # half of a pair, which no file name holds
        return f"\\u{ord(character):04x}"
