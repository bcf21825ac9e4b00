"""Rows of metadata as strangers write them: a row costs a row, and the rows around it are kept."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path

import pytest
from support.attacked_sources import parse_all
from support.attacks import Attack, Ending, attacks, check_ending, dropped, held, refused

from exvideo_train.clips.bounds import MAX_CAPTION_LETTERS, MAX_LINE_BYTES
from exvideo_train.clips.sources.base import Source
from exvideo_train.clips.sources.folder import CaptionTable
from exvideo_train.clips.sources.internvid import InternVid
from exvideo_train.clips.sources.panda70m import Panda70M
from exvideo_train.clips.sources.text_files import MAX_ROW_LINES
from exvideo_train.clips.sources.video_index import VideoIndex, build_video_index

ROW = "malformed_row"
DAMAGED, CUT = "damaged_caption", "cut_caption"


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    (folder / "x__________.mp4").write_bytes(b"x")
    return folder


@pytest.fixture(scope="module")
def index(videos: Path, tmp_path_factory: pytest.TempPathFactory) -> VideoIndex:
    return build_video_index(videos, tmp_path_factory.mktemp("index"))


def check_rows(attack: Attack, source: Source, num_good: int) -> None:
    """The good rows around the attacked one are there, and it too where it is held."""

    def run() -> Mapping[str, str]:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            clips, drops = parse_all(source)
        assert not warned, "Python speaks of what a stranger wrote"
        words = [clip.caption for clip in clips if clip.caption == "good words"]
        assert len(words) == num_good
        is_kept = attack.ending is Ending.HELD or any(word in str(drops) for word in (DAMAGED, CUT))
        assert len(clips) == num_good + is_kept
        assert all(len(clip.caption) <= MAX_CAPTION_LETTERS for clip in clips)
        return drops

    check_ending(attack, run)


def line(**changes: object) -> bytes:
    row = {
        "YoutubeID": "x__________",
        "Start_timestamp": "00:00:01.000",
        "End_timestamp": "00:00:09.000",
        "Caption": "other words",
        "Aesthetic_Score": 4.5,
        "UMT_Score": 0.4,
    }
    return json.dumps({**row, **changes}).encode()


def raw(field: str, text: str) -> bytes:
    return line(**{field: "VALUE"}).replace(b'"VALUE"', text.encode())


INTERNVID = [
    held("as published", line()),
    held("a field more", line(Extra={"deep": [1, [2]]})),
    held("no scores", raw("UMT_Score", "null")),
    held("a score of 400 digits, which is none", raw("UMT_Score", "9" * 400)),
    held("a score of infinity, which is none", raw("Aesthetic_Score", "Infinity")),
    held("a score in a list of lists, which is none", raw("Aesthetic_Score", "[[1]]")),
    held("a caption of null", raw("Caption", "null")),
    held("two halves of one emoji", raw("Caption", r'"smile \ud83d\ude00"')),
    held("seconds as a number", raw("Start_timestamp", "1.5")),
    held("brackets in the caption", line(Caption="[{" * 5000)),
    dropped("nothing but brackets", b"[" * 100_000, ROW, "nested deeper"),
    dropped("objects in objects", b'{"a":' * 100_000, ROW, "nested deeper"),
    dropped("a caption of brackets", raw("Caption", "[" * 900 + "]" * 900), ROW, "nested deeper"),
    dropped("half an object", line()[:40], ROW, "not JSON"),
    dropped("a list", b"[1]", ROW, "not a JSON object"),
    dropped("a number", b"7", ROW, "not a JSON object"),
    dropped("null", b"null", ROW, "not a JSON object"),
    dropped("NULs", b"\0" * 50, ROW, "not JSON"),
    dropped("an empty object", b"{}", ROW, "'YoutubeID' is missing"),
    dropped("an id of an object", raw("YoutubeID", "{}"), ROW, "YoutubeID"),
    dropped("an id of 1 MB", line(YoutubeID="y" * 10**6), "missing"),
    dropped("an id that leads out", line(YoutubeID="../../etc/passwd"), "missing"),
    dropped("an id of half a character", raw("YoutubeID", r'"\ud83d"'), ROW, "surrogates"),
    dropped("an id that a terminal obeys", line(YoutubeID="\x1b[2J"), "missing"),
    dropped("a start of 400 digits", raw("Start_timestamp", "1" * 400), ROW, "timestamp"),
    dropped("a start of 5000 digits", raw("Start_timestamp", "1" * 5000), ROW, "digits"),
    dropped("hours of 4000 digits", line(Start_timestamp="9" * 4000 + ":00:00"), ROW, "timestamp"),
    dropped("hours of 30 digits", line(End_timestamp="9" * 30 + ":00:00"), "bad_span", "beyond"),
    dropped("an end of 1e306 seconds", raw("End_timestamp", "1e306"), "bad_span", "beyond"),
    dropped("an end of 1e999 seconds", raw("End_timestamp", "1e999"), "bad_span", "not finite"),
    dropped("a start of NaN", raw("Start_timestamp", "NaN"), "bad_span", "not finite"),
    dropped("a start of nan as text", line(Start_timestamp="nan"), "bad_span", "not finite"),
    dropped("a start of a list", raw("Start_timestamp", "[1]"), ROW, "timestamp"),
    dropped("a start of true", raw("Start_timestamp", "true"), ROW, "timestamp"),
    dropped("a negative start", raw("Start_timestamp", "-1"), "bad_span", "negative"),
    dropped("a caption of a number", raw("Caption", "5"), ROW, "Caption=5"),
    dropped("half an emoji in the caption", raw("Caption", r'"a dog \ud83d"'), DAMAGED, "1 letters"),
    dropped("the other half", raw("Caption", r'"\ude00 a dog"'), DAMAGED, "1 letters"),
    dropped("control characters in the caption", raw("Caption", r'"\u0000\u001b[31m\u009b"'), DAMAGED, "3 letters"),
    dropped("a caption that is not UTF-8", line(Caption="VALUE").replace(b"VALUE", b"caf\xe9"), DAMAGED, "1 letters"),
    dropped("a caption of 1 MB", line(Caption="word " * 200_000), CUT, "more than 20,000 letters"),
    dropped("a line of 17 MB", line(Caption="x" * (MAX_LINE_BYTES + 10**6)), ROW, "a line of more than"),
]


@attacks(INTERNVID)
def test_lines_of_internvid(attack: Attack, index: VideoIndex, tmp_path: Path) -> None:
    good = [line(Caption="good words", Start_timestamp=f"00:00:0{number}.500") for number in range(2)]
    metadata = tmp_path / "M.jsonl"
    metadata.write_bytes(b"\n".join([good[0], attack.content, good[1]]) + b"\n")
    check_rows(attack, InternVid(str(metadata), index, None), num_good=2)


@pytest.mark.parametrize("ending", [b"\n", b"\r\n"], ids=["lf", "crlf"])
def test_byte_order_marks_are_no_part_of_the_first_row(ending: bytes, index: VideoIndex, videos: Path, tmp_path: Path):
    (tmp_path / "M.jsonl").write_bytes(b"\xef\xbb\xbf" + line() + ending)
    (tmp_path / "t.csv").write_bytes(b"\xef\xbb\xbfpath,caption" + ending + b"x__________.mp4,words" + ending)
    for source in (
        InternVid(str(tmp_path / "M.jsonl"), index, None),
        CaptionTable(str(tmp_path / "t.csv"), str(videos), "path", "caption"),
    ):
        clips, drops = parse_all(source)
        assert len(clips) == 1
        assert not drops


def panda(**changes: str) -> bytes:
    row = {
        "videoID": "x__________",
        "url": "u",
        "timestamp": "[['0:00:01.000', '0:00:09.000']]",
        "caption": "['other words']",
        "matching_score": "[0.5]",
        **changes,
    }
    return ",".join('"' + text.replace('"', '""') + '"' for text in row.values()).encode()


PANDA = [
    held("as published", panda()),
    held("lists as JSON", panda(caption='["other words"]', timestamp='[["0:00:01", "0:00:09"]]')),
    held("a field more, empty", panda() + b","),
    held("no scores", panda(matching_score="")),
    held("a score of 400 digits, which is none", panda(matching_score=f"[{'9' * 400}]")),
    held("a score of a huge hexadecimal, which is none", panda(matching_score=f"[0x{'f' * 5000}]")),
    held("two halves of one emoji", panda(caption=r"['smile \ud83d\ude00']")),
    held("an empty line", b""),
    dropped("a short row", b"x__________,u", ROW, "'timestamp' is missing"),
    dropped("an id alone", b"x__________", ROW, "'timestamp' is missing"),
    dropped("a long row", panda() + b",a,b", ROW, "7 fields for 5 columns"),
    dropped("no spans", panda(timestamp=""), ROW, "is not a list"),
    dropped("an empty list of spans", panda(timestamp="[]", caption="[]"), ROW, "lists no clip"),
    held("what Python would warn of, in a caption", panda(caption=r"['a \d\e\f']")),
    dropped("what Python would warn of, in place of a list", panda(timestamp="1if 2else 3"), ROW, "is not a list"),
    dropped("a span of one", panda(timestamp="[['0:00:01']]"), ROW, "not a pair"),
    dropped("brackets in Python", panda(caption="['a', " + "[" * 50_000), ROW, "is not a list"),
    dropped("brackets in JSON", panda(caption="[" * 900 + "]" * 900), ROW, "is not a list"),
    dropped("a deep list for a caption", panda(caption="[" * 60 + "]" * 60), ROW, "is not text"),
    dropped("a sum of a thousand", panda(caption="1" + "+1" * 100_000), ROW, "is not a list"),
    dropped("minus minus", panda(caption="-" * 100_000 + "1"), ROW, "is not a list"),
    dropped("code", panda(caption="__import__('os').system('touch /tmp/owned')"), ROW, "is not a list"),
    dropped("a set", panda(caption="{'other words'}"), ROW, "is not a list"),
    dropped("a million entries", panda(caption="[" + "'x'," * 10**6 + "]"), ROW, "commas"),
    dropped("captions and spans of other numbers", panda(caption="['a', 'b']"), ROW, "1 timestamps but 2 captions"),
    dropped("scores of another number", panda(matching_score="[1, 2]"), ROW, "2 entries in matching_score"),
    dropped("a caption of a number", panda(caption="[5]"), ROW, "is not text"),
    dropped("hours of 30 digits", panda(timestamp=f"[['0:00:00', '{'9' * 30}:00:00']]"), "bad_span", "beyond"),
    dropped("1e306 seconds", panda(timestamp="[[0, 1e306]]"), "bad_span", "beyond"),
    dropped("half an emoji", panda(caption=r"['a dog \ud83d']"), DAMAGED, "1 letters"),
    dropped("NULs in the caption", panda(caption="['a\0b']"), DAMAGED, "1 letters"),
    dropped("not UTF-8", panda(caption="['VALUE']").replace(b"VALUE", b"caf\xe9"), DAMAGED, "1 letters"),
    dropped("a caption of 1 MB", panda(caption=f"['{'word ' * 200_000}']"), CUT, "more than 20,000 letters"),
    dropped("a quote that the next row closes", b'x__________,u,"[[', ROW, "only by one of another row"),
    dropped("a short row with a line break in quotes", b'x__________,u,"[[\n"', ROW, "is not a list"),
    dropped("a long row with a line break in quotes", panda() + b',"a\nb",c', ROW, "7 fields for 5 columns"),
    dropped("a field of 17 MB", panda(caption="x" * (MAX_LINE_BYTES + 10**6)), ROW, "a row of more than"),
]


@attacks(PANDA)
def test_rows_of_panda70m(attack: Attack, index: VideoIndex, tmp_path: Path) -> None:
    good = [panda(caption="['good words']", timestamp=f"[['0:00:00.{number}', '0:00:08.0']]") for number in range(2)]
    metadata = tmp_path / "M.csv"
    header = b"videoID,url,timestamp,caption,matching_score"
    metadata.write_bytes(b"\n".join([header, good[0], attack.content, good[1]]) + b"\n")
    if attack.name == "an empty line":
        assert len(parse_all(Panda70M(str(metadata), index, None))[0]) == 2
    else:
        check_rows(attack, Panda70M(str(metadata), index, None), num_good=2)


@pytest.mark.parametrize("num_rows", [3, MAX_ROW_LINES + 50], ids=["to_the_end", "within_the_lines"])
def test_a_quote_that_is_never_closed_costs_its_line_alone(num_rows: int, videos: Path, tmp_path: Path) -> None:
    table = tmp_path / "t.csv"
    rows = [f"x__________.mp4,words,{number}" for number in range(num_rows)]
    table.write_text("\n".join(["path,caption,start_seconds", 'x__________.mp4,"words,0', *rows]) + "\n")
    clips, drops = parse_all(CaptionTable(str(table), str(videos), "path", "caption"))
    assert [clip.start_seconds for clip in clips] == list(range(num_rows))
    assert [(place.split(":")[-1], drop) for place, drop in drops.items()] == [("2", next(iter(drops.values())))]
    assert "not closed" in next(iter(drops.values()))


def test_captions_of_several_lines_are_rows(videos: Path, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text('path,caption\nx__________.mp4,"one\ntwo, ""three"""\nx__________.mp4\n')
    clips, drops = parse_all(CaptionTable(str(tmp_path / "t.csv"), str(videos), "path", "caption"))
    assert [clip.caption for clip in clips] == ['one\ntwo, "three"']
    assert list(drops) == [f"0 {tmp_path}/t.csv:4"]


KINDS = [
    refused("gzip", b"\x1f\x8b\x08\0" + b"x" * 50, "metadata=", "gzip; unpack it"),
    refused("zip", b"PK\x03\x04" + b"x" * 50, "a zip file; unpack it"),
    refused("UTF-16", "path,caption\n".encode("utf-16"), "UTF-16 text; write it as UTF-8"),
    refused("Parquet", b"PAR1" + b"x" * 50, "Parquet; write it as CSV"),
    refused("another CSV", b"name,words\n1,2\n", "has no column path, caption"),
    refused("no line at all", b"\n\n", "has no column"),
    refused("a header of 17 MB", b"x" * (MAX_LINE_BYTES + 10**6), "its first line is not the header of a CSV"),
    refused("a header that is never closed", b'path,"caption\n' * 3, "has no column"),
]


@attacks(KINDS)
def test_files_of_another_kind(attack: Attack, videos: Path, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes(attack.content)
    check_ending(attack, lambda: parse_all(CaptionTable(str(tmp_path / "t.csv"), str(videos), "path", "caption"))[1])
