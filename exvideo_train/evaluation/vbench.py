"""VBench's own measures, made by VBench itself: its package in another Python, one process a variant and dimension.

The command is that of vbench 0.1.5, ``python -m vbench.launch.evaluate`` (its console command ``vbench evaluate`` puts
the same line together as a shell's, unquoted, and takes whichever ``python`` is on the path). It needs a CUDA device,
and reads whole files at their own rate.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from exvideo_train.errors import UserError
from exvideo_train.evaluation.folders import VideoFile
from exvideo_train.files import atomic_write_json, parse_json, read_regular, short

MODULE = "vbench.launch.evaluate"
# Those that VBench gives for videos that are not of its own prompts; without a direction: how much moves.
DIMENSIONS = {
    "subject_consistency": "higher",
    "background_consistency": "higher",
    "motion_smoothness": "higher",
    "dynamic_degree": "neither",
    "aesthetic_quality": "higher",
    "imaging_quality": "higher",
    "overall_consistency": "higher",
    "temporal_flickering": "higher",
}
# Without them it would take our file names for prompts.
_OF_PROMPTS = ("overall_consistency",)
# What its folders are searched for.
_SUFFIXES = (".mp4", ".gif")
_RESULTS = "*_eval_results.json"
_MAX_BYTES = 256 << 20
_SHOWN_LINES = 5


def check_vbench(python: str, dimensions: Sequence[str]) -> None:
    """Before anything is measured.

    Raises:
        UserError: a dimension that VBench does not give for such videos, or a Python without it.
    """
    if unknown := [name for name in dimensions if name not in DIMENSIONS]:
        raise UserError(f"vbench_dimensions={unknown}: VBench gives {', '.join(DIMENSIONS)} for videos of any prompt")
    try:
        found = subprocess.run(
            [python, "-c", "import importlib.util as u, sys; sys.exit(u.find_spec('vbench') is None)"],
            capture_output=True,
            timeout=300,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(f"vbench_python={python}: cannot be run ({error}); name the Python that has vbench") from error
    if found.returncode:
        raise UserError(f"vbench_python={python}: has no package vbench; install it there, or name another Python")


def run_vbench(
    python: str, dimensions: Sequence[str], videos: Sequence[VideoFile], timeout_minutes: float
) -> tuple[dict[Path, dict[str, float]], list[str]]:
    """VBench's number for each video and dimension, and in words what it did not give.

    Args:
        timeout_minutes: of one dimension.
    """
    values: dict[Path, dict[str, float]] = {video.path: {} for video in videos}
    failed = [f"{video.path}: VBench reads {' and '.join(_SUFFIXES)} alone" for video in videos if not _reads(video)]
    readable = [video for video in videos if _reads(video)]
    if not readable:
        return values, failed
    with tempfile.TemporaryDirectory(prefix="exvideo_train_vbench_") as made:
        folder = Path(made) / "videos"
        folder.mkdir()
        # Names of our own: it takes names for prompts, and finds its results again by them.
        names = {f"{number:06d}{video.path.suffix.lower()}": video for number, video in enumerate(readable)}
        for name, video in names.items():
            (folder / name).symlink_to(video.path.resolve())
        prompts = Path(made) / "prompts.json"
        atomic_write_json(prompts, {name: video.prompt for name, video in names.items()})
        for dimension in dimensions:
            command = [python, "-m", MODULE, "--mode", "custom_input", "--dimension", dimension]
            command += ["--videos_path", str(folder), "--output_path", str(Path(made) / dimension)]
            if all(video.prompt for video in readable):
                command += ["--prompt_file", str(prompts)]
            elif dimension in _OF_PROMPTS:
                failed.append(f"VBench's {dimension} was not measured: not every video has a prompt")
                continue
            print(f"VBench: {dimension} of {len(readable)} videos", flush=True)
            try:
                found = _run(command, Path(made) / dimension, dimension, timeout_minutes)
            except UserError as error:
                print(f"warning: {error}", file=sys.stderr, flush=True)
                failed.append(str(error))
                continue
            for name, video in names.items():
                if name in found:
                    values[video.path][dimension] = found[name]
                else:
                    failed.append(f"{video.path}: VBench gives no {dimension}")
    return values, failed


def _reads(video: VideoFile) -> bool:
    return video.path.suffix.lower() in _SUFFIXES


def _run(command: Sequence[str], output: Path, dimension: str, timeout_minutes: float) -> dict[str, float]:
    """Numbers by file name; raises UserError with the end of what was said."""
    try:
        ended = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=60 * timeout_minutes, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(f"VBench's {dimension} was not measured: {error}") from error
    # Its own console command ends with 0 whatever happened; the results tell.
    results = sorted(output.glob(_RESULTS)) if output.is_dir() else []
    if ended.returncode or not results:
        said = " | ".join((ended.stderr or ended.stdout).strip().splitlines()[-_SHOWN_LINES:])
        raise UserError(f"VBench's {dimension} was not measured (status {ended.returncode}): {said}")
    return read_results(results[-1], dimension)


def read_results(path: Path, dimension: str) -> dict[str, float]:
    """Numbers by file name of a results file: {dimension: [mean, [{"video_path", "video_results"}, ...]]}.

    Raises:
        UserError: it is none.
    """
    try:
        content: Any = parse_json(read_regular(path, _MAX_BYTES))
        _, videos = content[dimension]
        return {Path(video["video_path"]).name: _number(video) for video in videos}
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"VBench's {dimension} was not measured: {path.name} is not its results ({error})") from error


def _number(video: Mapping[str, Any]) -> float:
    value = video["video_results"]
    # dynamic_degree says true or false.
    if not isinstance(value, (bool, int, float)):
        raise ValueError(f"video_results={short(value)}")
    return float(value)
