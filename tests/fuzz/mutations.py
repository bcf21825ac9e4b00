"""Mutations of valid examples: what is flipped, lost, doubled or swapped stays near enough to valid to get far.

All chance is a `random.Random` of a case's own, so that a case is reproduced by its seed and number alone.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from random import Random
from typing import Any


class Raw(str):
    """Text that goes into JSON as it stands, as no value of Python's would: 400 digits, a number beyond floats."""


# What stands in the place of a value: types, limits of numbers, and texts that somewhere have a meaning.
NASTY: list[Any] = [
    None, True, False, 0, -1, 1, 2**31, 2**63, 2**64, -(2**63) - 1, 0.5, -0.0, 1e-320, 1e15, 1e22, 1e306, -1e308,
    Raw("1e400"), Raw("-1e400"), Raw("NaN"), Raw("Infinity"), Raw("-Infinity"), Raw("1" * 400), Raw("-" + "9" * 5000),
    Raw("0." + "3" * 500), Raw("[" * 100 + "]" * 100), Raw("[" * 5000), Raw('{"a":' * 3000 + "1" + "}" * 3000),
    "", " ", "\n", "\t", "\x00", "\x01", "\x7f", "\x1b[2J\x1b]0;title\x07", "\r\n", "\u2028", "\ufeff", "\ufffd",
    "\ud83d", "\udc80", "a\ud83d", "\ude00\ud83d", "😀", "é", "e\u0301" * 50, "\u202egpj.exe", "０００:００", "١٢",
    "..", "../..", "/", "/etc/passwd", "/dev/zero", "~", ".", "a/b", "a\\b", "C:\\a", "::", "a.tar::b", "file:///a",
    "nan", "inf", "-inf", "1e999", "1" * 400, "0x10", "1_000", "00:00:00", "00:00:99999999999", "99:99:99.999",
    "-00:00:01", "0:00:01,5", "1:2:3:4", "True", "None", "null", "[]", "{}", "[[", "['a'", "__import__('os')",
    "${oc.env:HOME}", "%s%n", "{0.__class__}", "'", '"', "'''", ",", ";", "#", "=cmd()", "x" * 300, "ab " * 9000,
    [], {}, [[]], [None], [1, 2], ["a"], [[1, 2], [3]], {"": ""}, {"a": {"b": {"c": []}}}, [0] * 300,
]  # fmt: skip
# Pieces that are put into bytes.
PIECES = [
    b"", b"\x00", b"\xff", b"\xc3", b"\xed\xa0\x80", b"\xf0\x9f", b"\xef\xbb\xbf", b"\n", b"\r", b"\r\n", b"\n\n",
    b'"', b"'", b",", b"{", b"}", b"[", b"]", b":", b"\\", b"\\u", b"\\ud800", b"\\u0000", b"/", b"..", b"#", b" ",
    b"null", b"NaN", b"1e999", b"-", b"9" * 400, b"[" * 2000, b'{"a":' * 2000, b"\x1b[2J", b"A" * 300, b"\x80" * 9,
]  # fmt: skip
# A few letters that are drawn in the place of a text.
_LETTERS = "aZ0 .,:[]{}'\"\\/\n\x00\x9b\xe9\u0661\u202e\ud83d\ude00\U0001f600"


def dumps(value: Any) -> str:
    """JSON with raw pieces; half characters are escaped, as they are in files."""
    if isinstance(value, Raw):
        return str(value)
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)}: {dumps(entry)}" for key, entry in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(dumps, value)) + "]"
    return json.dumps(value)


def plain_copy(value: Any) -> Any:
    """A copy of what JSON can hold."""
    if isinstance(value, dict):
        return {key: plain_copy(entry) for key, entry in value.items()}
    return [plain_copy(entry) for entry in value] if isinstance(value, (list, tuple)) else value


def _places(value: Any) -> list[tuple[Any, Any]]:
    """(container, key) of everything in a value."""
    found = []
    stack = [value]
    while stack:
        container = stack.pop()
        for key in container.keys() if isinstance(container, dict) else range(len(container)):
            found.append((container, key))
            if isinstance(container[key], (dict, list)):
                stack.append(container[key])
    return found


class Mutator:
    """Draws mutations from one source of chance; each method makes from one to `most` changes."""

    def __init__(self, chance: Random) -> None:
        self.chance = chance

    def value(self, example: Any, most: int = 3) -> Any:
        """An object like the example, with changes of values, names and structure."""
        chance, value = self.chance, plain_copy(example)
        for _ in range(chance.randint(1, most)):
            places = _places(value)
            if not places:
                break
            container, key = chance.choice(places)
            kind = chance.randrange(8)
            if kind <= 2:
                container[key] = plain_copy(chance.choice(NASTY))
            elif kind == 3:
                other, other_key = chance.choice(places)
                container[key] = plain_copy(other[other_key])
            elif kind == 4:
                del container[key]
            elif kind == 5 and isinstance(container, dict):
                container[str(chance.choice(NASTY))] = container.pop(key)
            elif kind == 6 and type(container[key]) in (int, float):
                container[key] = self.number(container[key])
            elif isinstance(container[key], str):
                container[key] = self.text(container[key], 1)
            else:
                container[key] = [container[key]]
        return value

    def number(self, number: float) -> float:
        """A number near the given one, or of another order."""
        return self.chance.choice(
            [number + 1, number - 1, -number, number * 2, number * 1e6, number / 3, float(number)]
        )

    def text(self, example: str, most: int = 3) -> str:
        """A text with a piece put in, left out, doubled or replaced."""
        chance, text = self.chance, example
        for _ in range(chance.randint(1, most)):
            start = chance.randint(0, len(text))
            end = min(len(text), start + chance.randint(0, 8))
            kind = chance.randrange(4)
            if kind == 0:
                middle = str(chance.choice(NASTY))
            elif kind == 1:
                middle = ""
            elif kind == 2:
                middle = text[start:end] * 2
            else:
                middle = "".join(chance.choices(_LETTERS, k=4))
            text = text[:start] + middle + text[end:]
        return text

    def data(self, example: bytes, most: int = 3) -> bytes:
        """Bytes with a bit flipped, a byte or piece put in, a part lost, doubled or swapped, or the end cut off."""
        chance, content = self.chance, bytearray(example)
        for _ in range(chance.randint(1, most)):
            size = len(content)
            start = chance.randint(0, size)
            end = min(size, start + chance.randint(0, 40))
            kind = chance.randrange(13)
            if kind <= 2 and start < size:
                content[start] ^= 1 << chance.randrange(8)
            elif kind <= 4 and start < size:
                content[start] = chance.randrange(256)
            elif kind <= 7:
                content[start:end] = chance.choice(PIECES)
            elif kind <= 9:
                del content[start:end]
            elif kind == 10:
                content[start:start] = content[start:end] * chance.randint(1, 3)
            elif kind == 11:
                other = chance.randint(0, size)
                part = content[start:end]
                content[start:end] = content[other : other + len(part)]
                content[other : other + len(part)] = part
            else:
                del content[start:]
        return bytes(content)

    def json(self, example: Any, most: int = 3) -> bytes:
        """A JSON text: two in three changed as values, the others as bytes."""
        if self.chance.randrange(3):
            return dumps(self.value(example, most)).encode()
        return self.data(dumps(example).encode(), most)

    def among(self, examples: Sequence[Any]) -> tuple[int, Any]:
        """One of the examples, with its number."""
        number = self.chance.randrange(len(examples))
        return number, examples[number]
