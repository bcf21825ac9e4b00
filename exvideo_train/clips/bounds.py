"""How large a part of a data set's metadata may be: whatever lies outside is a ValueError, with a message to show.

Metadata comes from strangers. A file of a million brackets ends Python's recursion, a number of 400 digits cannot
become a float, 1e306 seconds overflow when they are counted in milliseconds: each costs its own row, not the build.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any, NamedTuple

from exvideo_train.files import parse_json

MAX_LINE_BYTES = 16 << 20
"""Of a line of JSON, or of a file with one object."""
MAX_SECONDS = 1e9
"""Thirty years; in milliseconds it still fits the sixteen digits of a sorting key."""
MAX_SCORE = 1e9
MAX_CAPTION_LETTERS = 20_000
"""What T5 reads of a caption, 226 tokens, is about 1,000 letters of English. Its tokenizer takes a text whole before it
cuts, and one of 100 MB takes all memory."""
_SHOWN_LETTERS = 80


def parse_row(text: str | bytes) -> Any:
    """A JSON value of bounded size and depth; NaN and infinities come through, for `bounded_number` to refuse.

    Raises:
        ValueError: it is not JSON, or beyond the limits.
    """
    if len(text) > MAX_LINE_BYTES:
        raise ValueError(f"{len(text):,} bytes of JSON, more than {MAX_LINE_BYTES:,}")
    try:
        return parse_json(text, strict=False)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error})") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 text ({error})") from None
    except ValueError as error:
        # Python's own hint is for programmers.
        raise ValueError("a number of thousands of digits" if "digits" in str(error) else str(error)) from None


def bounded_number(name: str, value: object, least: float, most: float) -> float:
    """A number within limits; text is none, nor are true and false.

    Raises:
        ValueError: it is none, or outside; the message has the name and the value.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value:
        raise ValueError(f"{name[:_SHOWN_LETTERS]}={shown(value)} must be a number")
    # Compared before it is converted: an integer of any length compares, but does not fit a float.
    if not least <= value <= most:
        raise ValueError(f"{name[:_SHOWN_LETTERS]}={shown(value)} must be a number from {least:g} to {most:g}")
    return float(value)


def shown(value: object) -> str:
    """A value for a message, cut where it is long."""
    try:
        text = f"{value:.6g}" if isinstance(value, float) else repr(value)
    except ValueError:
        # Python prints no integer of thousands of digits.
        assert isinstance(value, int)
        text = f"a number of about {int(math.log10(2) * value.bit_length())} digits"
    return text if len(text) <= _SHOWN_LETTERS else f"{text[:_SHOWN_LETTERS]}..."


# Control characters but for tabs and line breaks, halves of characters (as of an emoji cut in two), and what stands for
# bytes that were no UTF-8.
_DAMAGE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffd]")
_REPLACED = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")


class Caption(NamedTuple):
    """A caption that every text encoder can take.

    Attributes:
        text: without what no text can hold, and cut.
        num_damaged: letters that were no text: those replaced by a space, and U+FFFD, which stays.
        num_cut: letters left out at its end.
    """

    text: str
    num_damaged: int = 0
    num_cut: int = 0


def is_clean_caption(text: str) -> bool:
    """Whether :func:`clean_caption` has nothing to do."""
    # Most captions are ASCII, of which this tells in a fifth of the time of a search.
    return len(text) <= MAX_CAPTION_LETTERS and ((text.isascii() and text.isprintable()) or not _DAMAGE.search(text))


def clean_caption(text: str) -> Caption:
    """Replace by spaces what is no text, and cut at `MAX_CAPTION_LETTERS`; a clean caption stays as it is."""
    if is_clean_caption(text):
        return Caption(text)
    num_letters = len(text)
    text = text[:MAX_CAPTION_LETTERS]
    # Two halves that belong together become one character; Python's own literals may spell one so.
    text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "surrogatepass")
    num_damaged = len(_DAMAGE.findall(text))
    return Caption(_REPLACED.sub(" ", text).strip(), num_damaged, max(0, num_letters - MAX_CAPTION_LETTERS))
