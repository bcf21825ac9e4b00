"""Limits of foreign text: JSON, numbers, captions."""

from __future__ import annotations

import json

import pytest

from exvideo_train.clips.bounds import (
    MAX_CAPTION_LETTERS,
    MAX_LINE_BYTES,
    Caption,
    bounded_number,
    clean_caption,
    parse_row,
)
from exvideo_train.files import MAX_JSON_DEPTH


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        "[" * (MAX_JSON_DEPTH + 1) + "]" * (MAX_JSON_DEPTH + 1),
        "1" * 5000,
        '{"a":',
        b"\xff",
        " " * MAX_LINE_BYTES + "1",
    ],
    ids=["endless_depth", "depth", "digits", "cut_off", "not_utf_8", "size"],
)
def test_json_beyond_the_limits_is_a_value_error_with_a_short_message(text):
    with pytest.raises(ValueError, match=r"nested deeper|digits|not JSON|not UTF-8|bytes of JSON") as error:
        parse_row(text)
    assert len(str(error.value)) < 200


def test_json_within_the_limits_is_read():
    for value in (
        {"a": [1, 2.5, None]},
        json.loads("[" * MAX_JSON_DEPTH + "]" * MAX_JSON_DEPTH),
        [[]] * 1000,
        int("1" * 4000),
    ):
        assert parse_row(json.dumps(value)) == value


def test_numbers_are_compared_before_they_are_converted():
    assert bounded_number("n", 3, 0, 5) == 3.0
    for value in (10**400, -(10**400), 1e306, float("nan"), float("inf"), True, "3", None):
        with pytest.raises(ValueError, match=r"^n=.* must be a number") as error:
            bounded_number("n", value, 0, 1e9)
        assert len(str(error.value)) < 200


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("a plain caption", Caption("a plain caption")),
        ("Zeilen\nund\tTabulatoren, 你好 \U0001f600", Caption("Zeilen\nund\tTabulatoren, 你好 \U0001f600")),
        ("a dog \ud83d", Caption("a dog", 1)),
        ("\ude00 a dog", Caption("a dog", 1)),
        ("a \ud83d\ude00 smiles", Caption("a \U0001f600 smiles")),
        ("red\x00\x1b[31mdog\x9b", Caption("red  [31mdog", 3)),
        ("caf\ufffd", Caption("caf\ufffd", 1)),
        ("x" * (MAX_CAPTION_LETTERS + 7), Caption("x" * MAX_CAPTION_LETTERS, 0, 7)),
        # The cut goes through a character of two halves.
        ("x" * (MAX_CAPTION_LETTERS - 1) + "\ud83d\ude00", Caption("x" * (MAX_CAPTION_LETTERS - 1), 1, 1)),
    ],
)
def test_captions_become_text_that_can_be_encoded(text, cleaned):
    assert clean_caption(text) == cleaned
    clean_caption(text).text.encode()
    assert clean_caption(cleaned.text).text == cleaned.text
