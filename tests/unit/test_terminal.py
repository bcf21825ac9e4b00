"""What a terminal would carry out is shown instead."""

from __future__ import annotations

import io
import sys

import pytest

from exvideo_train.terminal import EscapedStream, escaped


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\tb\nc 你好 \U0001f600 é", "a\tb\nc 你好 \U0001f600 é"),
        ("\x1b[2J\x1b]52;c;AAAA\x07", r"\x1b[2J\x1b]52;c;AAAA\x07"),
        ("hidden\rerror: none", r"hidden\rerror: none"),
        ("\x00\x08\x7f\x9b31m", r"\x00\x08\x7f\x9b31m"),
        ("\u202egpj.exe\u2066", r"\u202egpj.exe\u2066"),
        ("name-\udcff.mp4", r"name-\udcff.mp4"),
    ],
)
def test_escaped(text, shown):
    assert escaped(text) == shown
    escaped(text).encode()


def test_a_stream_is_otherwise_what_it_was(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    monkeypatch.setattr(sys, "stdout", EscapedStream(stream))
    print("a\x1bb", flush=True)
    assert stream.buffer.getvalue() == b"a\\x1bb\n"
    assert sys.stdout.encoding == "utf-8"
    assert not sys.stdout.isatty()
