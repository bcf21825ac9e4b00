"""The soak sees what grows and what is left behind: a process that leaks on purpose, and figures with known growth."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.processes import ended
from support.ranks import REPOSITORY

LEAK = """
import time
kept, files = [], []
while True:
    kept.append(bytearray(2**20))
    files.append(open('/dev/null'))
    time.sleep(0.01)
"""
MIB = 2**20


@pytest.fixture
def soak_modules(monkeypatch):
    monkeypatch.syspath_prepend(str(REPOSITORY / "benchmarks"))
    import soak_census
    import soak_report

    return soak_census, soak_report


def test_a_leaking_process_is_found_by_its_mark_and_seen_to_grow(soak_modules) -> None:
    census, report = soak_modules
    environment = {**os.environ, census.MARK: "a-test:train"}
    # Its parent ends at once: found all the same.
    start = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {LEAK!r}, 'launch/train.py'])"
    subprocess.run([sys.executable, "-c", start], env={**environment, "RANK": "1"}, check=True)
    samples = []
    try:
        for moment in range(30):
            rows = [census.look_at(marked) for marked in census.marked_processes("a-test")]
            samples.append({"elapsed": moment, "processes": [{**row, "warm": moment >= 3} for row in rows if row]})
            time.sleep(0.05)
        assert census.marked_processes("another-test") == []
    finally:
        assert census.end_marked("a-test") == 1
    assert census.wait_until_gone("a-test", "train", 10) == []
    row, *others = report.process_rows(samples)
    assert row.cells[0] == "rank 1"
    assert [(other.cells[0], other.holds) for other in others] == [
        ("rank 0", False),
        ("coordinator", False),
        ("encoder", False),
    ]
    assert row.cells[-1] == "grows: anonymous, rss, descriptors"
    assert not row.holds
    assert row.figures["anonymous"]["per_hour"] > 0


def test_shared_memory_that_nobody_holds_is_left_and_what_is_held_is_not(soak_modules) -> None:
    census, _ = soak_modules
    before = census.shared_memory()
    path = census.SHARED_MEMORY / f"soak_test_{os.getpid()}"
    hold = f"import time; file = open({str(path)!r}, 'wb'); file.write(b'123'); file.flush(); print(); time.sleep(60)"
    try:
        with ended(subprocess.Popen([sys.executable, "-c", hold], stdout=subprocess.PIPE)) as process:
            assert process.stdout is not None
            process.stdout.readline()
            assert path.name in census.shared_memory()
            assert path.name not in census.shared_memory_left(before)
        assert census.shared_memory_left(before)[path.name] == 3
    finally:
        path.unlink()


@pytest.mark.parametrize(
    ("first", "last", "grows"),
    [(100, 103.9, False), (100, 104.1, True), (1000, 1019, False), (1000, 1021, True), (500, 400, False)],
)
def test_memory_grows_by_more_than_two_percent_and_four_mib(soak_modules, first, last, grows) -> None:
    _, report = soak_modules
    points = [(float(t), MIB * (first if t < 50 else last)) for t in range(100)]
    found = report.growth(points)
    assert (found.first, found.last) == (MIB * first, MIB * last)
    assert report.memory_grows(found) == grows


def test_the_slope_is_by_the_hour(soak_modules) -> None:
    _, report = soak_modules
    assert report.growth([(t, 7 + t / 60) for t in range(600)]).per_hour == pytest.approx(60)


def turn(number: int, **changes: object) -> dict[str, object]:
    left = {key: [] for key in ("processes", "tmpdir", "working_folder", "unfinished")}
    command = {"name": "encode", "status": 0, "seconds": 1.0, "peak": 100 * MIB, "stopped": False}
    whole = {"number": number, "commands": [command], "zombies": 0, "shared_memory": {}, "elapsed": 60.0 * number}
    return {**whole, **left, "folders": {"run": {"files": 7, "bytes": 1000}}, **changes}


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({}, None),
        ({"processes": ["encoder 5"]}, "processes left, by a turn"),
        ({"tmpdir": ["pymp-1/socket"]}, "temporary files left in TMPDIR, by a turn"),
        ({"unfinished": ["run/.a.tmp"]}, "unfinished files left in stores and run folders, by a turn"),
        ({"shared_memory": {"torch_1": 9}}, "files left in /dev/shm (9 bytes)"),
        ({"folders": {"run": {"files": 8, "bytes": 1000}}}, "the loop's run, after a turn: files; MiB"),
        ({"commands": [{**turn(0)["commands"][0], "status": 1, "failure": "no"}]}, "commands that failed"),
    ],
)
def test_what_one_turn_leaves_behind_does_not_hold(soak_modules, tmp_path: Path, changes, what) -> None:
    _, report = soak_modules
    row = {"part": "train", "process": "1@1", "warm": True, "rss": MIB, "anonymous": MIB, "pss": MIB}
    row |= {"descriptors": 9, "threads": 3}
    rows = [{**row, "kind": kind} for kind in report.LONG_LIVED]
    sample = {"sitting": 1, "processes": rows, "zombies": 0, "shared_memory": 0, "files": {"train, files": 3}}
    samples = tmp_path / "samples.jsonl"
    samples.write_text("".join(json.dumps({"elapsed": 60.0 * minute, **sample}) + "\n" for minute in range(10)))
    state = {"elapsed": 600.0, "minutes": 10, "sittings": 1, "long": [], "commit": "abc"}
    state["turns"] = [*(turn(number) for number in range(9)), turn(9, **changes)]
    made = report.make_report(state, samples)
    broken = [row["cells"][0] for rows in made["tables"].values() for row in rows if not row["holds"]]
    if what == "commands that failed":
        assert broken == ["encode", what]
    else:
        assert broken == ([what] if what else [])
    assert made["holds"] == (what is None)
    report.write_report(made, tmp_path / "out")
    assert ("NOT everything holds" in (tmp_path / "out.md").read_text()) == (what is not None)
