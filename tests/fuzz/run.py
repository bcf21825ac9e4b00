"""Fuzzing at length, a table, and a status of 1 if anything failed; ``make fuzz``.

PYTHONPATH=tests python -m fuzz.run                                          every target, seed 1
PYTHONPATH=tests python -m fuzz.run seed=5 cases=50000 target=tar_shard
PYTHONPATH=tests python -m fuzz.run seed=1 target=tar_shard case=123         one case, as a failure names it
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from dataclasses import asdict
from importlib import metadata
from pathlib import Path

# Before torch is imported.
os.environ.update({"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"})
os.environ.update({"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""})

from fuzz.running import Tally, run_target
from fuzz.targets import ALL

REPOSITORY = Path(__file__).resolve().parents[2]
_HEAD = """\
A case is one mutated example through one reader, in one process; kept and dropped are rows (or files, tensors), refused
are cases. Seconds are of processor time; memory is by how much the target raised the process's peak. What counts as a
failure: tests/fuzz/running.py.
"""
_COLUMNS = ("target", "cases", "seconds", "kept", "dropped", "refused", "slowest case, ms", "memory, MiB", "failures")


def main() -> int:
    options = dict(word.split("=", 1) for word in sys.argv[1:])
    seed, most, output = int(options.pop("seed", 1)), options.pop("cases", None), options.pop("output", None)
    name, case = options.pop("target", None), options.pop("case", None)
    targets = [target for target in ALL if name in (None, target.name)]
    if options or not targets:
        print(__doc__, f"targets: {', '.join(target.name for target in ALL)}", sep="\n", file=sys.stderr)
        return 2
    print(f"seed {seed}\n\n{_line(_COLUMNS)}\n{_line(['---', *['---:'] * (len(_COLUMNS) - 1)])}", flush=True)
    begun, tallies = time.time(), []
    for target in targets:
        numbers = range(int(most or target.cases)) if case is None else [int(case)]
        tallies.append(run_target(target, seed, numbers))
        print(_row(tallies[-1]), flush=True)
    failures = [failure for tally in tallies for failure in tally.failures]
    print(_row(_total(tallies)), *failures, sep="\n")
    if output is not None:
        _write(Path(output), seed, tallies, time.time() - begun)
    return 1 if failures else 0


def _total(tallies: list[Tally]) -> Tally:
    total = Tally("all")
    for tally in tallies:
        total.cases += tally.cases
        total.seconds += tally.seconds
        total.kept += tally.kept
        total.dropped += tally.dropped
        total.refused += tally.refused
        total.failures += tally.failures
        total.slowest_ms = max(total.slowest_ms, tally.slowest_ms)
        total.memory_mib += tally.memory_mib
    return total


def _row(tally: Tally) -> str:
    counts = (tally.kept, tally.dropped, tally.refused, round(tally.slowest_ms), round(tally.memory_mib))
    shown = [f"{count:,}" for count in (*counts, len(tally.failures))]
    return _line([tally.target, f"{tally.cases:,}", f"{tally.seconds:.1f}", *shown])


def _line(cells: list[str] | tuple[str, ...]) -> str:
    return f"| {' | '.join(cells)} |"


def _write(path: Path, seed: int, tallies: list[Tally], seconds: float) -> None:
    """The results as JSON, and beside it as a table."""
    machine = {**_machine(), "seed": str(seed), "seconds by the clock": f"{seconds:.0f}"}
    path.write_text(json.dumps({"machine": machine, "targets": [asdict(tally) for tally in tallies]}, indent=2) + "\n")
    lines = [
        *("; ".join(f"{name} {value}" for name, value in machine.items()), "", _HEAD),
        *(_line(_COLUMNS), _line(["---", *["---:"] * (len(_COLUMNS) - 1)])),
        *(_row(tally) for tally in [*tallies, _total(tallies)]),
    ]
    path.with_suffix(".md").write_text("\n".join(lines) + "\n")


def _machine() -> dict[str, str]:
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "cpu": names[0].split(":")[1].strip() if names else platform.machine(),
        "python": platform.python_version(),
        **{package: metadata.version(package) for package in ("torch", "safetensors", "transformers", "sentencepiece")},
        "commit": _git("rev-parse", "--short", "HEAD")
        + (" with changes" if _git("status", "--porcelain", "--untracked-files=no") else ""),
        "command": f'make fuzz FUZZ="{" ".join(sys.argv[1:])}"',
    }


def _git(*words: str) -> str:
    done = subprocess.run(["git", *words], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    return done.stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
