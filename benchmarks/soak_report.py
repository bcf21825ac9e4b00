"""The figures of a soak as tables, each row with a verdict by one of three rules. See RULES."""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

MIB = 2**20
MEMORY_SHARE, MEMORY_BYTES = 0.02, 4 * MIB
# A process seen less often was between fork and exec, or a short helper.
LEAST_LOOKS = 3
# These are replaced in a long run: each counts with the largest that was seen of it.
REPLACED = ("decoder", "sampling")
LONG_LIVED = ("rank 0", "rank 1", "coordinator", "encoder")
KINDS = ("rank", "reader of data", "launcher", "node launcher", "coordinator", "encoder", "decoder", "sampling")
RULES = f"""\
First and last are medians over the first and the last tenth of the time (of the turns, for commands). Memory grows when
the last exceeds the first by more than {MEMORY_SHARE:.0%} and by more than {MEMORY_BYTES / MIB:.0f} MiB; a count grows
when the last exceeds the first by one or more; what must not be left behind holds when none was, in any turn."""


@dataclass(frozen=True)
class Growth:
    """A quantity over time."""

    first: float
    last: float
    per_hour: float
    num_points: int


def growth(points: Sequence[tuple[float, float]]) -> Growth:
    """Medians of the first and the last tenth of the time, and the slope of a straight line through all points.

    Args:
        points: (seconds, value), at least one.
    """
    start, end = min(t for t, _ in points), max(t for t, _ in points)
    tenth = (end - start) / 10
    first = statistics.median(value for t, value in points if t <= start + tenth)
    last = statistics.median(value for t, value in points if t >= end - tenth)
    slope = 3600 * statistics.linear_regression(*zip(*points, strict=True)).slope if end > start else 0.0
    return Growth(first, last, slope, len(points))


def memory_grows(found: Growth) -> bool:
    return found.last - found.first > max(MEMORY_SHARE * found.first, MEMORY_BYTES)


def count_grows(found: Growth) -> bool:
    return found.last - found.first >= 1


@dataclass(frozen=True)
class Row:
    """A line of a table; ``holds`` is its verdict, said in the last cell."""

    cells: list[str]
    holds: bool
    figures: dict[str, Any]


def make_report(state: dict[str, Any], samples_path: Path) -> dict[str, Any]:
    """All tables of a soak, as JSON values."""
    samples = [json.loads(line) for line in samples_path.read_text().splitlines()]
    sittings: defaultdict[int, list[dict[str, Any]]] = defaultdict(list)
    for sample in samples:
        sittings[sample["sitting"]].append(sample)
    # A restart begins memory anew: of several sittings the longest counts.
    longest = max(sittings.values(), key=lambda some: some[-1]["elapsed"] - some[0]["elapsed"])
    turns = state["turns"]
    tables = {
        "processes": process_rows(longest),
        "commands": command_rows(turns),
        "machine": machine_rows(longest, turns, state["long"]),
    }
    return {
        "holds": all(row.holds for rows in tables.values() for row in rows),
        "machine": machine(state),
        "minutes": state["elapsed"] / 60,
        "measured_minutes": (longest[-1]["elapsed"] - longest[0]["elapsed"]) / 60,
        "sittings": state["sittings"],
        "turns": len(turns),
        "num_commands": sum(len(turn["commands"]) for turn in turns),
        "tables": {name: [asdict(row) for row in rows] for name, rows in tables.items()},
        "long_runs": state["long"],
    }


def process_rows(samples: Sequence[dict[str, Any]]) -> list[Row]:
    """A row a kind of process of the long runs."""
    by_kind: defaultdict[str, defaultdict[str, list[tuple[float, dict[str, Any]]]]]
    by_kind = defaultdict(lambda: defaultdict(list))
    for sample in samples:
        for row in sample["processes"]:
            if row["warm"] and row["kind"].rstrip(" 0123456789") in KINDS:
                by_kind[row["kind"]][row["process"]].append((sample["elapsed"], row))
    order = sorted(by_kind, key=lambda kind: (KINDS.index(kind.rstrip(" 0123456789")), kind))
    rows = [row for kind in order if (row := _process_row(kind, list(by_kind[kind].values()))) is not None]
    missing = [kind for kind in LONG_LIVED if kind not in {row.cells[0] for row in rows}]
    return rows + [Row([kind, "0", *["-"] * 6, "not measured: too short"], False, {}) for kind in missing]


def _process_row(kind: str, lives: list[list[tuple[float, dict[str, Any]]]]) -> Row | None:
    lives = [life for life in lives if len(life) >= LEAST_LOOKS]
    if not lives:
        return None
    longest = max(lives, key=len)
    keys = ("anonymous", "rss", "pss", "descriptors", "threads")
    one_life = kind not in REPLACED
    figures: dict[str, Growth] = {}
    for key in keys:
        if one_life:
            points = [(t, float(row[key])) for t, row in longest]
        else:
            points = [(life[-1][0], _settled([row[key] for _, row in life])) for life in lives]
        figures[key] = growth(points)
    growing = [key for key in keys[:2] if memory_grows(figures[key])]
    growing += [key for key in keys[3:] if count_grows(figures[key])]
    cells = [
        kind,
        "1, the whole time" if one_life else f"{len(lives)}, the second half of each",
        _mib(figures["anonymous"]),
        f"{figures['anonymous'].per_hour / MIB:+.1f}",
        _mib(figures["rss"]),
        _mib(figures["pss"]),
        _count(figures["descriptors"]),
        _count(figures["threads"]),
        f"grows: {', '.join(growing)}" if growing else "flat",
    ]
    return Row(cells, not growing, {key: asdict(found) for key, found in figures.items()})


def _settled(values: Sequence[int]) -> float:
    """Of a process that is replaced: the median of the second half of its life.

    Not the largest: of a decoder that takes and frees pictures the largest that is *seen* grows with how long one
    looks, and on a machine where other work slows it down it lives longer.
    """
    return statistics.median(values[len(values) // 2 :])


def command_rows(turns: Sequence[dict[str, Any]]) -> list[Row]:
    """A row a command of the loop."""
    names: dict[str, list[dict[str, Any]]] = {}
    for turn in turns:
        for command in turn["commands"]:
            names.setdefault(command["name"], []).append({**command, "turn": turn["number"]})
    rows = []
    for name, runs in names.items():
        peak, seconds = (growth([(run["turn"], float(run[key])) for run in runs]) for key in ("peak", "seconds"))
        failures = [run for run in runs if "failure" in run]
        # The largest memory of a stopped command, and of what it left to do, depends on where it was stopped.
        judged = "stopped" not in name
        grows = judged and memory_grows(peak)
        statuses = sorted({run["status"] for run in runs})
        verdict = [f"{len(failures)} failed"] if failures else []
        verdict += ["grows: memory"] if grows else []
        cells = [name, str(len(runs)), ", ".join(map(str, statuses)), _mib(peak)]
        cells += [
            f"{seconds.first:.1f} -> {seconds.last:.1f}",
            ", ".join(verdict) or ("flat" if judged else "ends well"),
        ]
        rows.append(Row(cells, not verdict, {"peak": asdict(peak), "seconds": asdict(seconds)}))
    return rows


def machine_rows(
    samples: Sequence[dict[str, Any]],
    turns: Sequence[dict[str, Any]],
    long_runs: Sequence[dict[str, Any]],
) -> list[Row]:
    """Rows of what the machine holds besides memory."""
    endings = [run for run in long_runs if run["at"] == "end"]
    rows = [
        _none_left("commands that failed", [c["name"] for turn in turns for c in turn["commands"] if "failure" in c]),
        _none_left("long runs that ended early", [run["part"] for run in long_runs if run["at"] == "soak"]),
        _none_left(
            "long runs that did not stop when asked",
            [f"{run['part']}: {run['status']}" for run in endings if run["status"] is None or not run["said"]],
        ),
    ]
    left = {
        "processes left": "processes",
        "temporary files left in TMPDIR": "tmpdir",
        "unfinished files left in stores and run folders": "unfinished",
    }
    for what, key in left.items():
        rows.append(_none_left(f"{what}, by a turn", _all(turns, key)))
        rows.append(_none_left(f"{what}, by the long runs", _all(endings, key)))
    rows.append(_none_left("files left in the working folder", _all(turns, "working_folder")))
    shared = {name: size for turn in turns for name, size in turn["shared_memory"].items()}
    rows.append(_none_left(f"files left in /dev/shm ({sum(shared.values())} bytes)", sorted(shared)))
    warm = [s for s in samples if s["processes"] and all(row["warm"] for row in s["processes"])] or list(samples)
    numbers = {
        "processes of the long runs, without sampling": [
            (s["elapsed"], float(sum(row["kind"] != "sampling" for row in s["processes"]))) for s in warm
        ],
        "ended processes that are not waited for": [(s["elapsed"], float(s["zombies"])) for s in warm],
        **{place: [(s["elapsed"], float(s["files"][place])) for s in warm] for place in warm[0]["files"]},
    }
    for what, points in numbers.items():
        found = growth(points)
        verdict = "grows" if count_grows(found) else "flat"
        rows.append(Row([what, f"{found.first:g}", f"{found.last:g}", verdict], verdict == "flat", asdict(found)))
    for part in sorted({part for turn in turns for part in turn["folders"]}):
        sizes = [(turn["number"], turn["folders"][part]) for turn in turns if part in turn["folders"]]
        files, size = (growth([(number, float(each[key])) for number, each in sizes]) for key in ("files", "bytes"))
        growing = [name for name, grows in {"files": count_grows(files), "bytes": memory_grows(size)}.items() if grows]
        cells = [f"the loop's {part}, after a turn: files; MiB"]
        cells += [f"{files.first:g}; {size.first / MIB:.2f}", f"{files.last:g}; {size.last / MIB:.2f}"]
        verdict = f"grows: {', '.join(growing)}" if growing else "flat"
        rows.append(Row([*cells, verdict], not growing, {"files": asdict(files), "bytes": asdict(size)}))
    return rows


def _all(records: Iterable[dict[str, Any]], key: str) -> list[str]:
    return [entry for record in records for entry in record[key]]


def _none_left(what: str, left: Sequence[str]) -> Row:
    verdict = f"left: {', '.join(left[:3])}" if left else "none"
    return Row([what, "0", str(len(left)), verdict], not left, {"left": list(left)})


def _mib(found: Growth) -> str:
    return f"{found.first / MIB:.1f} -> {found.last / MIB:.1f}"


def _count(found: Growth) -> str:
    return f"{found.first:g} -> {found.last:g}"


def machine(state: dict[str, Any]) -> dict[str, str]:
    """Where and with what it was measured."""
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    versions = {name: metadata.version(name) for name in ("torch", "deepspeed", "diffusers", "decord2", "av")}
    return {
        "cpu": f"{len(os.sched_getaffinity(0))} cores of {names[0].split(':')[1].strip() if names else 'unknown'}",
        "system": platform.platform(),
        "Python": platform.python_version(),
        **versions,
        "commit": state["commit"],
        "command": " ".join(["python", *(os.path.relpath(word) if "/" in word else word for word in sys.argv)]),
    }


HEADS = {
    "processes": (
        "The long runs: memory in MiB, first -> last",
        [
            "process",
            "how many",
            "anonymous",
            "MiB an hour",
            "resident",
            "proportional",
            "descriptors",
            "threads",
            "verdict",
        ],
    ),
    "commands": (
        "The commands of the loop: memory of the largest process in MiB, first -> last",
        ["command", "runs", "status", "memory", "seconds", "verdict"],
    ),
    "machine": ("What is left and what lies about", ["what", "first", "last or total", "verdict"]),
}


def write_report(report: dict[str, Any], output: Path) -> None:
    """``output``.json and ``output``.md; the Markdown is printed too."""
    output.parent.mkdir(parents=True, exist_ok=True)
    output.with_suffix(".json").write_text(json.dumps(report, indent=1, sort_keys=True) + "\n")
    about = report["machine"]
    lines = [
        "# A soak",
        "",
        "; ".join(f"{name} {value}" for name, value in about.items() if name not in ("command", "cpu")) + ".",
        f"{about['cpu']}.",
        "",
        f"    {about['command']}",
        "",
        f"{report['minutes']:.0f} minutes, {report['turns']} turns of the loop with {report['num_commands']} commands; "
        f"sittings: {report['sittings']}, of which the longest counts for the long runs "
        f"({report['measured_minutes']:.0f} minutes, from the first sample videos and the first replaced decoder on). "
        f"{'Everything holds.' if report['holds'] else 'NOT everything holds.'}",
        "",
        RULES,
    ]
    for name, (title, heads) in HEADS.items():
        lines += ["", f"## {title}", "", "| " + " | ".join(heads) + " |", "|---|" + "---:|" * (len(heads) - 2) + "---|"]
        lines += ["| " + " | ".join(row["cells"]) + " |" for row in report["tables"][name]]
    output.with_suffix(".md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
