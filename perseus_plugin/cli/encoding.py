"""What commands write where not every character can be written."""

from __future__ import annotations

import codecs
import io
import sys
import unicodedata

_IN_ASCII = {"·": "-", "–": "-", "—": "-", "×": "x", "→": "->", "≥": ">=", "≤": "<=", "±": "+-", "µ": "u", "…": "..."}


def speak_ascii_where_needed() -> None:
    """Have standard output and error replace what their encoding does not have, instead of failing."""
    codecs.register_error("perseus", _in_ascii)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="perseus")


def _in_ascii(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    plain = "".join(_IN_ASCII.get(one) or _unaccented(one) for one in error.object[error.start : error.end])
    return plain, error.end


def _unaccented(one: str) -> str:
    plain = unicodedata.normalize("NFKD", one).encode("ascii", "ignore")
    return (plain or one.encode("ascii", "backslashreplace")).decode()
