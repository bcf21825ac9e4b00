"""Manifests and journals of a wrong shape."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path

from support.attacks import Attack, attacks, check_ending, held, refused

from exvideo_train.clips.bounds import MAX_DEPTH, MAX_LINE_BYTES
from exvideo_train.clips.journal import Journal
from exvideo_train.clips.probing import probe_videos
from exvideo_train.clips.record import ClipRecord, read_manifest

RECORD = ClipRecord("a" * 32, "folder", "/videos/x.mp4", 0.0, 5.0, "words of a caption")


def line(**changes: object) -> bytes:
    return json.dumps({**json.loads(RECORD.to_json()), **changes}).encode()


def raw(field: str, text: str) -> bytes:
    """A field's value as JSON text that Python would not write."""
    return line(**{field: "VALUE"}).replace(b'"VALUE"', text.encode())


LINES = [
    held("as written", line()),
    held("a caption full of brackets", line(caption="[{" * 500)),
    held("a file name that is not UTF-8", line(video="/videos/\udcff.mp4")),
    held("brackets as deep as may be", raw("scores", "{}").replace(b"words", b"[" * 900)),
    refused("nothing but brackets", b"[" * 200_000, "line 2", "brackets nested deeper"),
    refused("scores of brackets", raw("scores", "[" * 500 + "]" * 500), "line 2", f"deeper than {MAX_DEPTH}"),
    refused("objects in objects", raw("scores", '{"a":' * 70 + "1" + "}" * 70), "line 2", f"deeper than {MAX_DEPTH}"),
    refused("half an object", line()[:50], "line 2", "not JSON"),
    refused("a list", b"[1, 2]", "line 2", "list"),
    refused("a number alone", b"7", "line 2", "int"),
    refused("not UTF-8", b'{"caption": "\xff\xfe"}', "UTF-8"),
    refused("UTF-16", '{"caption": ""}'.encode("utf-16"), "UTF-8"),
    refused("no end of line", b'"' + b"x" * MAX_LINE_BYTES, "line 2", "bytes of JSON"),
    refused("400 digits", raw("start_seconds", "1" * 400), "line 2", "start_seconds=1111"),
    refused("5000 digits", raw("end_seconds", "1" * 5000), "line 2", "thousands of digits"),
    refused("1e306 seconds", raw("end_seconds", "1e306"), "line 2", "end_seconds=1e+306"),
    refused("1e999 seconds", raw("start_seconds", "1e999"), "line 2", "start_seconds=inf"),
    refused("NaN", raw("start_seconds", "NaN"), "line 2", "start_seconds=nan"),
    refused("minus infinity", raw("duration_seconds", "-Infinity"), "line 2", "duration_seconds=-inf"),
    refused("a rate of NaN", raw("fps", "NaN"), "line 2", "fps=nan"),
    refused("a sampling rate of 0", line(sampling_fps=0), "line 2", "sampling_fps=0"),
    refused("a width of 1e300", line(width=1e300), "line 2", "width=1e+300"),
    refused("a score of 1e308", line(scores={"umt": 1e308}), "line 2", "scores.umt=1e+308"),
    refused("a score of infinity", raw("scores", '{"umt": Infinity}'), "line 2", "scores.umt=inf"),
    refused("true for a number", line(fps=True), "line 2", "fps=True"),
    held("half a character in the caption, which is left out", line(caption="cut \ud83d")),
    held("NUL in the caption, which is left out", line(caption="cut\0")),
    held("a caption of 10 MB, which is cut", line(caption="x" * 10**7)),
    refused("half a character in the video", line(video="cut \ud83d.mp4"), "line 2", "video="),
    refused("NUL in the video", line(video="a\0.mp4"), "line 2", "NUL"),
    refused("an id of 300 letters", line(clip_id="a" * 300), "line 2", "clip_id="),
    refused("an id that leaves the folder", line(clip_id="../../x"), "line 2", "clip_id="),
    refused("a codec of numbers", line(codec=[1]), "line 2", "codec="),
]


@attacks(LINES)
def test_lines_of_a_manifest(attack: Attack, tmp_path: Path) -> None:
    path = tmp_path / "clips.jsonl"
    path.write_bytes(RECORD.to_json().encode() + b"\n" + attack.content + b"\n")

    def read() -> dict[str, str]:
        assert len(list(read_manifest(path))) == 2
        return {}

    check_ending(attack, read)


def a_table(sql: str, *rows: tuple[object, ...]):
    """Write a database with one table."""

    def write(path: Path) -> None:
        connection = sqlite3.connect(path)
        connection.execute(sql)
        for row in rows:
            connection.execute(f"INSERT INTO found VALUES ({', '.join('?' * len(row))})", row)
        connection.commit()
        connection.close()

    return write


FOUND = "CREATE TABLE found (key TEXT PRIMARY KEY, stamp TEXT, content TEXT)"
JOURNALS = [
    held("empty", lambda path: path.write_bytes(b"")),
    held("without rows", a_table(FOUND)),
    refused("text", lambda path: path.write_text("no database\n" * 100), "delete it"),
    refused("zeros", lambda path: path.write_bytes(bytes(8192)), "delete it"),
    refused("a folder", lambda path: path.mkdir(), "delete it"),
    refused("cut off", lambda path: (a_table(FOUND)(path), path.write_bytes(path.read_bytes()[:5000])), "delete it"),
    refused("of an older schema", a_table("CREATE TABLE found (key TEXT, content TEXT)"), "another", "found"),
    refused("of another program", a_table("CREATE TABLE photos (name TEXT)"), "another program", "photos"),
    refused("content that is no JSON", a_table(FOUND, ("/gone.mp4", "", "{")), "/gone.mp4", "delete it"),
    refused("content of other fields", a_table(FOUND, ("/gone.mp4", "", '{"colour": 1}')), "colour", "delete it"),
    refused("content of another type", a_table(FOUND, ("/gone.mp4", "", "[]")), "/gone.mp4", "delete it"),
    refused("content that is null", a_table(FOUND, ("/gone.mp4", "", None)), "/gone.mp4", "delete it"),
]


@attacks(JOURNALS)
def test_journals(attack: Attack, tmp_path: Path) -> None:
    path = tmp_path / "probes.sqlite"
    attack.content(path)
    before = path.read_bytes() if path.is_file() else b""

    def probe() -> dict[str, str]:
        if attack.says:
            list(probe_videos([("/gone.mp4", None)], path, 1, 60))
            return {}
        with Journal(path) as journal:
            journal.put("a", "", "1")
            assert journal.get("a", "", str) == "1"
        return {}

    check_ending(attack, probe)
    if attack.says and path.is_file():
        assert path.read_bytes() == before, "what is not ours is left as it is"
