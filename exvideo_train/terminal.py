"""What comes from data is shown, never obeyed: names and headers may hold sequences that a terminal carries out.

A file name can clear the screen, hide a line, write into the clipboard. Commands print through :func:`escaped`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, TextIO

# All control characters but tabs and line breaks, marks that turn the direction of text, and halves of characters.
_UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def escaped(text: str) -> str:
    r"""The text with whatever a terminal could obey or not print written as Python writes it, e.g. ``\x1b``."""
    return _UNSEEN.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


class EscapedStream:
    """A text stream on which nothing but text can be written; all else is the stream's own."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write the text escaped; the number of its letters."""
        self._stream.write(escaped(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write each line escaped."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
