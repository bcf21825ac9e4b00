"""What data preparation costs: reading frames beside the shortest scripts for it, encoding, building a manifest.

    python benchmarks/data.py                     all parts, printed and written to benchmarks/results/data.{json,md}
    python benchmarks/data.py --rows 100000       a smaller manifest
    python benchmarks/data.py --only reader       or encoder, or manifest

Reader: ours and the scripts of bare_readers.py take turns on the same clips, each in a process of its own; each gives
uint8 frames (129, 480, 720, 3), centre-cropped. Ours is measured with decord, its default, and with PyAV; torchcodec
where it is installed.
Encoder: the share of its time that it waits for frames, while encode_latents.py encodes spans of a ten-minute video
with a VAE of the published size; full-size frames on a GPU. A CPU decodes as many seconds, its VAE gets small frames.
Manifest: Panda-70M metadata of --rows source videos, 19 of 20 of them downloaded, without probing.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import multiprocessing
import os
import platform
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from bare_readers import with_decord, with_pyav, with_torchcodec
from reader_clips import loop_packets, make_clips

from exvideo_train.clips.reader import read_frames
from exvideo_train.clips.record import ClipRecord, make_clip_id, write_manifest
from exvideo_train.files import atomic_write_json
from exvideo_train.geometry import Geometry
from exvideo_train.models.cogvideox import published
from exvideo_train.models.cogvideox.tiny import write_tiny_model

REPOSITORY = Path(__file__).resolve().parent.parent
Script = Callable[[str, float, Geometry], np.ndarray]


def ours(video: str, start: float, geometry: Geometry, decoder: str = "decord") -> np.ndarray:
    record = ClipRecord("benchmark", "benchmark", video, start, None, "")
    return read_frames(record, geometry, decoder=decoder).numpy()


def ours_pyav(video: str, start: float, geometry: Geometry) -> np.ndarray:
    return ours(video, start, geometry, "pyav")


def cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


OURS: dict[str, Script] = {"ours": ours, "ours, PyAV": ours_pyav}
BARE: dict[str, Script] = {"PyAV": with_pyav, "decord": with_decord, "torchcodec": with_torchcodec}
SCRIPTS = OURS | BARE


def take_turn(script: str, video: str, start: float, geometry: Geometry, frames_file: str) -> tuple[float, float, str]:
    """(wall seconds, CPU seconds, failure) of one reading, in the script's own process."""
    began, began_cpu = time.perf_counter(), cpu_seconds()
    try:
        frames = SCRIPTS[script](video, start, geometry)
    # A decoder that gives up on a clip, with whatever error of its own, is a result of this comparison.
    except Exception as error:  # noqa: BLE001
        return 0.0, 0.0, str(error).splitlines()[-1][-120:]
    seconds, seconds_cpu = time.perf_counter() - began, cpu_seconds() - began_cpu
    np.save(frames_file, frames)
    return seconds, seconds_cpu, ""


def measure_readers(folder: Path, rounds: int) -> list[dict[str, Any]]:
    """Scripts take turns, each in a process of its own: their FFmpeg libraries crash in one another's company."""
    scripts = [script for script in SCRIPTS if script != "torchcodec" or has("torchcodec")]
    context = multiprocessing.get_context("spawn")
    pools = {script: ProcessPoolExecutor(1, context) for script in scripts}
    rows = []
    for name, video, start, geometry in make_clips(folder):
        walls: dict[str, list[float]] = {script: [] for script in scripts}
        cpus: dict[str, list[float]] = {script: [] for script in scripts}
        failures: dict[str, str] = {}
        # The first round warms up: imports, page cache, allocator.
        for number, script in itertools.product(range(rounds + 1), scripts):
            frames_file = str(folder / f"{script}.npy")
            turn = pools[script].submit(take_turn, script, str(video), start, geometry, frames_file)
            seconds, seconds_cpu, failure = turn.result()
            if failure:
                failures[script] = failure
            elif number:
                walls[script].append(seconds)
                cpus[script].append(seconds_cpu)
        rows.append({"clip": name, **summary(folder, scripts, walls, cpus, failures)})
        print(f"{name}: {rows[-1]}", flush=True)
    for pool in pools.values():
        pool.shutdown()
    return rows


def summary(
    folder: Path,
    scripts: list[str],
    walls: dict[str, list[float]],
    cpus: dict[str, list[float]],
    failures: dict[str, str],
) -> dict[str, Any]:
    row: dict[str, Any] = {}
    reference = np.load(folder / "ours, PyAV.npy")
    for script in scripts:
        if script in failures:
            row[script] = {"failure": failures[script]}
            continue
        row[script] = {
            "seconds": round(statistics.median(walls[script]), 3),
            "least_seconds": round(min(walls[script]), 3),
            "cpu_seconds": round(min(cpus[script]), 3),
            "worst_frame_difference": round(worst_frame(np.load(folder / f"{script}.npy"), reference), 2),
        }
    for kind in ("least_seconds", "cpu_seconds"):
        fastest = min(row[script][kind] for script in BARE if script in scripts and script not in failures)
        for script in OURS:
            if script not in failures:
                row[script][f"{kind}_over_fastest"] = round(row[script][kind] / fastest, 3)
    return row


def worst_frame(frames: np.ndarray, reference: np.ndarray) -> float:
    """Largest mean difference of a frame: rounding and chroma give 1 to 3, another frame of this clip 8 and more."""
    pairs = zip(frames, reference, strict=True)
    return max(float(np.abs(first.astype(np.int16) - second).mean()) for first, second in pairs)


def has(package: str) -> bool:
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return False
    return True


# Of the encoder's measurement: the whole window of 16 s is decoded on both; the CPU's VAE gets a small part of it.
GPU_GEOMETRY = Geometry(129, 480, 720, 8)
CPU_GEOMETRY = Geometry(9, 96, 144, 0.5)


def measure_encoder(folder: Path, num_clips: int) -> dict[str, Any]:
    """Encode spans of a long video with the published VAE's size and read the run's own report."""
    model = write_model(folder / "model")
    video = loop_packets(folder / "long.mp4", 115)
    starts = [20.0 + 560.0 * number / num_clips for number in range(num_clips)]
    clips = [
        ClipRecord(make_clip_id("benchmark", video.name, start, None), "benchmark", str(video), start, None, "a rabbit")
        for start in starts
    ]
    write_manifest(folder / "encoded.jsonl", clips)
    geometry = GPU_GEOMETRY if torch.cuda.is_available() else CPU_GEOMETRY
    sizes = [f"{name}={getattr(geometry, name)}" for name in ("num_frames", "height", "width", "fps")]
    command = [sys.executable, str(REPOSITORY / "data_prep" / "encode_latents.py"), "+exp=129f", *sizes]
    paths = [f"model.path={model}", f"manifest={folder / 'encoded.jsonl'}", f"latents={folder / 'latents'}"]
    subprocess.run([*command, *paths], cwd=folder, check=True)
    report = json.loads((folder / "latents" / "reports" / f"encode_{geometry.name}.json").read_text())
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "geometry": geometry.name,
        "clips": report["encoded"],
        "clips_per_minute": round(60 * report["clips_per_second"], 1),
        "decode_s": round(report["decode_seconds_per_clip"], 2),
        "encode_s": round(report["encode_seconds_per_clip"], 2),
        "wait_s": round(report["wait_seconds_per_clip"], 3),
        "wait_share": f"{report['wait_share']:.2%}",
    }


def write_model(folder: Path) -> Path:
    """The tiny model with a VAE of the published size, random weights: T5's part of the time is small in any case."""
    from diffusers import AutoencoderKLCogVideoX

    write_tiny_model(folder)
    torch.manual_seed(0)
    vae: Any = AutoencoderKLCogVideoX(**published.VAE_5B)
    vae.to(torch.bfloat16).save_pretrained(folder / "vae")
    return folder


WORDS = ["a", "person", "is", "cooking", "while", "someone's", "dog", "runs", "across", "the", "green", "field"]


def write_panda70m(folder: Path, num_rows: int) -> int:
    """Metadata as published, one to five clips a row, and an empty file for 19 of 20 videos; returns the clips."""
    rng = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_"
    num_clips = 0
    (folder / "videos").mkdir()
    with open(folder / "M.csv", "w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["videoID", "url", "timestamp", "caption", "matching_score"])
        for row in range(num_rows):
            video = "".join(rng.choices(letters, k=11))
            moment, spans, captions = 0.0, [], []
            for _ in range(rng.randint(1, 5)):
                begin = moment + 5 * rng.random()
                moment = begin + 3 + 15 * rng.random()
                spans.append([stamp(begin), stamp(moment)])
                captions.append(" ".join(rng.choices(WORDS, k=12)) + ".")
            scores = [round(rng.random(), 4) for _ in spans]
            url = f"https://www.youtube.com/watch?v={video}"
            writer.writerow([video, url, str(spans), str(captions), str(scores)])
            num_clips += len(spans)
            if row % 20:
                shard = folder / "videos" / f"{row // 10000:05d}"
                shard.mkdir(exist_ok=True)
                (shard / f"{video}.mp4").touch()
    return num_clips


def stamp(seconds: float) -> str:
    return f"{int(seconds // 3600)}:{int(seconds % 3600 // 60):02d}:{seconds % 60:06.3f}"


def measure_manifest(folder: Path, num_rows: int) -> dict[str, Any]:
    num_clips = write_panda70m(folder, num_rows)
    command = [sys.executable, str(REPOSITORY / "data_prep" / "build_manifest.py"), "source=panda70m", "probe=false"]
    began = time.perf_counter()
    process = subprocess.Popen([*command, "metadata=M.csv", "videos=videos", "manifest=clips.jsonl"], cwd=folder)
    peak = PeakMemory(process.pid)
    status = process.wait()
    seconds = time.perf_counter() - began
    assert status == 0
    return {
        "rows": num_rows,
        "clips_in_metadata": num_clips,
        "clips_in_manifest": sum(1 for _ in open(folder / "clips.jsonl", "rb")),
        "metadata_mb": round((folder / "M.csv").stat().st_size / 1e6),
        "seconds": round(seconds, 1),
        "rows_per_second": round(num_rows / seconds),
        "clips_per_second": round(num_clips / seconds),
        "peak_memory_mib": round(peak.stop() / 2**20),
    }


class PeakMemory:
    """Largest memory of a process and its children together, looked at ten times a second (PSS: shared pages once)."""

    def __init__(self, process: int) -> None:
        self._process = psutil.Process(process)
        self._peak = 0
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._stopped.wait(0.1):
            try:
                family = [self._process, *self._process.children(recursive=True)]
                self._peak = max(self._peak, sum(member.memory_full_info().pss for member in family))
            except psutil.NoSuchProcess:
                continue

    def stop(self) -> int:
        self._stopped.set()
        self._thread.join()
        return self._peak


def machine() -> dict[str, str]:
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    model = names[0].split(":")[1].strip() if names else platform.machine()
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=REPOSITORY, capture_output=True, text=True, check=False
    ).stdout.strip()
    packages = ["av", "decord2", "torchcodec", "torch", "numpy"]
    return {
        "cpu": f"{len(os.sched_getaffinity(0))} cores of {model}",
        "python": platform.python_version(),
        **{package: metadata.version(package) for package in packages if has(package)},
        "commit": commit,
        "command": " ".join(["python", *(os.path.relpath(word) if "/" in word else word for word in sys.argv)]),
    }


def table(results: dict[str, Any]) -> str:
    lines = ["; ".join(f"{name} {value}" for name, value in results["machine"].items()), ""]
    if "reader" in results:
        scripts = [name for name in SCRIPTS if name in results["reader"][0]]
        heads = ["clip", *scripts, *(f"{name} / fastest bare script, wall and CPU" for name in OURS)]
        lines += ["| " + " | ".join(heads) + " |", "|---|" + "---:|" * (len(heads) - 1)]
        for row in results["reader"]:
            cells = [cell(row[script]) for script in scripts]
            ratios = [ratio(row[script]) for script in OURS]
            lines.append("| " + " | ".join([row["clip"], *cells, *ratios]) + " |")
        lines.append("")
    for part in ("encoder", "manifest"):
        if part not in results:
            continue
        values = results[part]
        lines += ["| " + " | ".join(values) + " |", "|" + "---:|" * len(values)]
        shown = [value if isinstance(value, str) else f"{value:,}" for value in values.values()]
        lines += ["| " + " | ".join(shown) + " |", ""]
    return "\n".join(lines)


def cell(values: dict[str, Any]) -> str:
    """Least wall and CPU seconds, and the largest difference of a frame from those of ours with PyAV."""
    if "failure" in values:
        return "fails"
    return f"{values['least_seconds']:.2f} s; CPU {values['cpu_seconds']:.2f} s; {values['worst_frame_difference']:.1f}"


def ratio(values: dict[str, Any]) -> str:
    if "failure" in values:
        return "fails"
    return f"{values['least_seconds_over_fastest']:.2f}, {values['cpu_seconds_over_fastest']:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000, help="source videos in the metadata")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each reader on each clip")
    parser.add_argument("--clips", type=int, default=30, help="clips that the encoder gets")
    parser.add_argument("--only", choices=["reader", "encoder", "manifest"])
    parser.add_argument("--output", type=Path, default=REPOSITORY / "benchmarks" / "results" / "data.json")
    options = parser.parse_args()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    results: dict[str, Any] = {"machine": machine()}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if options.only in (None, "reader"):
            results["reader"] = measure_readers(folder, options.rounds)
        if options.only in (None, "encoder"):
            results["encoder"] = measure_encoder(folder, options.clips)
        if options.only in (None, "manifest"):
            results["manifest"] = measure_manifest(folder, options.rows)
    atomic_write_json(options.output, results)
    options.output.with_suffix(".md").write_text(table(results))
    print(table(results))


if __name__ == "__main__":
    main()
