"""What the measures of evaluation say of a real clip and of the same clip spoilt; their speed and memory.

    python benchmarks/evaluation.py

The clip is examples/clips/bigbuckbunny.mp4, seen whole and through a window of its own pixels. Each way of spoiling
it is encoded well and poorly. Speed and memory are of one process and thread that reads an H.264 file of 480x720 and
takes all measures. Prints Markdown tables and writes benchmarks/results/evaluation.md and .json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from exvideo_train.evaluation.measures import make_measures, measure_track
from exvideo_train.files import atomic_write_json, atomic_write_text

REPOSITORY = Path(__file__).resolve().parent.parent
RESULTS = REPOSITORY / "benchmarks" / "results"
CLIP = REPOSITORY / "examples" / "clips" / "bigbuckbunny.mp4"
sys.path.insert(0, str(REPOSITORY / "tests"))
HEIGHT, WIDTH, FPS = 144, 256, 12
LENGTHS = (49, 129, 257)
PEAK_HEIGHT, PEAK_WIDTH, PEAK_FPS = 480, 720, 8


def views() -> dict[str, np.ndarray]:
    """frames_FHWC of the whole picture, and of a window in it that is not reduced."""
    from support.spoilt import real_frames

    full_FHWC = real_frames(CLIP, 720, 1280)
    whole = np.stack([cv2.resize(frame, (WIDTH, HEIGHT), interpolation=cv2.INTER_AREA) for frame in full_FHWC])
    return {"whole": whole, "window": full_FHWC[:, 200 : 200 + HEIGHT, 500 : 500 + WIDTH]}


def measure_spoilt(folder: Path) -> dict[str, dict[str, dict[str, list[float | None]]]]:
    """view -> measure -> way of spoiling -> values, well and poorly encoded."""
    from support.spoilt import LOOP_FRAMES, QUALITIES, SPOILT, track_of
    from support.videos import make_video

    measures = make_measures(LOOP_FRAMES / FPS)
    found: dict[str, dict[str, dict[str, list[float | None]]]] = {}
    for view, frames_FHWC in views().items():
        for name, spoil in SPOILT.items():
            for quality, crf in QUALITIES.items():
                path = folder / f"{view}-{name}-{quality}.mp4"
                make_video(path, spoil(frames_FHWC), fps=FPS, options={"crf": crf})
                for measure, value in measure_track(track_of(path), measures).items():
                    found.setdefault(view, {}).setdefault(measure, {}).setdefault(name, []).append(value)
            print(f"{view}, {name}", flush=True)
    return found


def write_long(path: Path, num_frames: int) -> None:
    """The clip forwards and backwards, at 480x720."""
    from support.spoilt import real_frames

    from exvideo_train.sampling.video import write_mp4

    frames_FHWC = real_frames(CLIP, PEAK_HEIGHT, 853)[:, :, 66 : 66 + PEAK_WIDTH]
    there = np.arange(num_frames) % (2 * len(frames_FHWC) - 2)
    write_mp4(path, frames_FHWC[np.minimum(there, 2 * len(frames_FHWC) - 2 - there)], PEAK_FPS)


def measure_cost(folder: Path) -> list[dict[str, float]]:
    """A process of its own for each length."""
    costs = []
    for num_frames in LENGTHS:
        path = folder / f"{num_frames}.mp4"
        write_long(path, num_frames)
        command = [sys.executable, __file__, "--cost-of", str(path)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        said = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
        costs.append({"frames": num_frames, **json.loads(said)})
        print(costs[-1], flush=True)
    return costs


def cost_of(path: Path) -> dict[str, float]:
    """Seconds and MiB of this process; memory before, and at most."""
    from exvideo_train.evaluation.reading import Reading, read_frames
    from exvideo_train.evaluation.track import track_video

    cv2.setNumThreads(1)
    measures = make_measures(10.0)
    before, started, processor = peak_mib(), time.perf_counter(), time.process_time()
    measure_track(track_video(read_frames(str(path), Reading(0.0, None, 2048)), 0.25), measures)
    return {
        "seconds": time.perf_counter() - started,
        "cpu_seconds": time.process_time() - processor,
        "before_mib": before,
        "peak_mib": peak_mib(),
    }


def peak_mib() -> float:
    """Not of getrusage, whose maximum begins with that of the process that started this one."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) / 1024


def report(results: dict[str, Any]) -> str:
    """The page of results."""
    lines = [
        "# Measures of evaluation",
        "",
        results["machine"],
        "",
        "## A real clip, and the same clip spoilt",
        "",
        f"66 frames of *Big Buck Bunny*, {HEIGHT}x{WIDTH}, {FPS} a second: whole, and a window of its own pixels.",
        "Spoilt as in `tests/support/spoilt.py`. A cell: encoded well (x264, crf 12) / poorly (crf 26). Bold is what",
        "the measure is for. Repetition is expected at 2 s.",
    ]
    for view, by_measure in results["spoilt"].items():
        names = list(next(iter(by_measure.values())))
        lines += ["", f"### {view}", "", "| measure | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
        for measure, by_name in by_measure.items():
            cells = [_cell(measure, name, values) for name, values in by_name.items()]
            lines.append(f"| `{measure}` | " + " | ".join(cells) + " |")
    lines += [
        "",
        "## Speed and memory",
        "",
        "One video of 480x720, H.264, all measures, one process with one thread, the machine busy with other work.",
        "",
        "| frames | CPU seconds | frames a CPU second | seconds | process before, MiB | peak, MiB |",
        "|---|---|---|---|---|---|",
    ]
    for cost in results["cost"]:
        lines.append(
            f"| {cost['frames']} | {cost['cpu_seconds']:.1f} | {cost['frames'] / cost['cpu_seconds']:.0f} | "
            f"{cost['seconds']:.1f} | {cost['before_mib']:.0f} | {cost['peak_mib']:.0f} |"
        )
    return "\n".join(lines) + "\n"


# What each way of spoiling is there for.
MEANT = {
    "blurred": ("sharpness", "high_band"),
    "frozen": ("still_share", "motion"),
    "looped": ("self_similarity", "repeat_distance", "no_repeat"),
    "flickering": ("flicker", "luminance_jitter"),
    "drifting": ("luminance_drift", "saturation_drift", "colour_drift"),
    "cut": ("cuts", "content_drift"),
    "jerky": ("smoothness",),
}


def _cell(measure: str, name: str, values: list[float | None]) -> str:
    text = " / ".join("–" if value is None else f"{value:.3g}" for value in values)
    return f"**{text}**" if measure.startswith(MEANT.get(name, ("-",))) else text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cost-of", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.cost_of is not None:
        print(json.dumps(cost_of(options.cost_of)))
        return
    # Here, as it brings torch, which would count in the memory of what is measured.
    from exvideo_train.extensions.provenance import source_commit

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    packages = ", ".join(f"{name} {version(name)}" for name in ("opencv-python-headless", "scipy", "av", "numpy"))
    with tempfile.TemporaryDirectory() as folder:
        results = {
            "machine": f"{os.cpu_count()} cores {platform.machine()}, {memory:.0f} GiB. {packages}, Python "
            f"{platform.python_version()}. Commit {source_commit()}. `python benchmarks/evaluation.py`",
            "cost": measure_cost(Path(folder)),
            "spoilt": measure_spoilt(Path(folder)),
        }
    atomic_write_json(RESULTS / "evaluation.json", results)
    page = report(results)
    atomic_write_text(RESULTS / "evaluation.md", page)
    print(page)


if __name__ == "__main__":
    main()
