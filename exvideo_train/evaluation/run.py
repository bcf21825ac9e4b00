"""From the options to the report: find, pair, measure, compare, write."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

import exvideo_train
from exvideo_train.clips.container import UnreadableClip
from exvideo_train.clips.opening import bound_memory
from exvideo_train.clips.workers import Failure, Worker, map_by, num_cores
from exvideo_train.config.evaluation import Evaluate
from exvideo_train.errors import UserError
from exvideo_train.evaluation.folders import VideoFile, find_videos, pair_videos
from exvideo_train.evaluation.measures import Measure, given_measures, make_measures, measure_track, network_measures
from exvideo_train.evaluation.reading import Reading, read_frames
from exvideo_train.evaluation.statistics import NOT_TO_BE_TOLD, Comparison, compare
from exvideo_train.evaluation.track import SERIES, Track, track_video
from exvideo_train.evaluation.vbench import DIMENSIONS, check_vbench, run_vbench
from exvideo_train.files import atomic_write_json, refuse_inputs
from exvideo_train.terminal import escaped

REPORT, RESULTS = "report.html", "results.json"
REAL = "real videos"
_TASKS_PER_PROCESS = 200
# Rates are counted from rounded timestamps.
_SAME_FPS = 0.02
Result = TypeVar("Result")


@dataclass
class Measured:
    """One video, measured."""

    file: VideoFile
    track: Track
    values: dict[str, float | None] = field(default_factory=dict)


@dataclass
class Evaluation:
    """All that the report shows.

    Attributes:
        pairs: name of the pair -> variant -> video.
        reference: real videos, if there are any.
        comparisons: variant -> comparisons with the baseline.
        left_out: what was not compared, in words, each with its file and reason.
    """

    options: Evaluate
    measures: list[Measure]
    pairs: dict[str, dict[str, Measured]]
    reference: list[Measured]
    comparisons: dict[str, list[Comparison]]
    left_out: list[str]

    def tracks(self) -> dict[str, list[Track]]:
        """Of every variant, and of the real videos."""
        tracks = {variant: [pair[variant].track for pair in self.pairs.values()] for variant in self.options.variants}
        return tracks | ({REAL: [video.track for video in self.reference]} if self.reference else {})


def run_evaluation(options: Evaluate) -> None:
    """Evaluate, print the verdicts and write ``report.html`` and ``results.json``.

    Raises:
        UserError: a folder without videos, no pair that can be compared, or a folder that cannot be written.
    """
    from exvideo_train.evaluation.figures import log_evaluation
    from exvideo_train.evaluation.report import write_report

    output = Path(options.output)
    result = evaluate_folders(options)
    videos = [video.file.path for pair in result.pairs.values() for video in pair.values()]
    refuse_inputs("output", [output / REPORT, output / RESULTS], {"variants": videos})
    atomic_write_json(output / RESULTS, results(result))
    write_report(output / REPORT, result)
    log_evaluation(output, result)
    for line in result.left_out:
        print(f"left out: {escaped(line)}", file=sys.stderr)
    for variant, comparisons in result.comparisons.items():
        print(f"{variant} against {options.baseline}, {len(result.pairs)} pairs:")
        for comparison in comparisons:
            print(f"  {comparison.measure:18} {comparison.difference:+10.4g}  {verdict_words(comparison)}")
    print(f"report:  {output / REPORT}\nresults: {output / RESULTS}")


def verdict_words(comparison: Comparison) -> str:
    """The verdict, and where nothing can be told, how many videos it would take."""
    if comparison.verdict != NOT_TO_BE_TOLD:
        return comparison.verdict
    if comparison.difference == 0:
        return f"{NOT_TO_BE_TOLD}; no difference seen"
    if comparison.num_pairs < 2:
        return f"{NOT_TO_BE_TOLD}; of one pair nothing can be said"
    if comparison.num_needed is None:
        return f"{NOT_TO_BE_TOLD}; a million pairs would not tell this difference"
    return f"{NOT_TO_BE_TOLD}; about {comparison.num_needed:,} pairs would tell this difference"


def evaluate_folders(options: Evaluate) -> Evaluation:
    """Everything but the writing.

    Raises:
        UserError: see :func:`run_evaluation`.
    """
    if len(options.variants) < 2:
        raise UserError(f"variants={list(options.variants)}: two are compared; give with=DIR and without=DIR")
    if options.baseline not in options.variants:
        raise UserError(f"baseline={options.baseline}: not among the variants {', '.join(options.variants)}")
    short = {"with": "with", "without": "without"}
    files = {
        name: find_videos(short.get(name, f"variants.{name}"), Path(folder), name, options.follow_links)
        for name, folder in options.variants.items()
    }
    pairs, left_out = pair_videos(files)
    _check_networks(options)
    reading = Reading(options.fps, None, options.max_frames)
    every = [video for pair in pairs.values() for video in pair.values()]
    tracks = measure_videos(every, reading, options, left_out)
    measured: dict[str, dict[str, Measured]] = {}
    for name, pair in pairs.items():
        whole = {variant: Measured(file, tracks[file.path]) for variant, file in pair.items() if file.path in tracks}
        if len(whole) < len(pair):
            continue
        if reason := _why_unequal(whole, options.shorten):
            left_out.append(reason)
            continue
        if options.shorten:
            _shorten(whole)
        measured[name] = whole
    if not measured:
        raise UserError("no pair of videos can be compared:\n  " + "\n  ".join(left_out))
    reference = _reference(options, next(iter(next(iter(measured.values())).values())).track, left_out)
    if options.vbench_python is not None:
        _add_vbench(options, measured, reference, left_out)
    measures = all_measures(options)
    for video in [*reference, *(video for pair in measured.values() for video in pair.values())]:
        video.values = measure_track(video.track, measures)
    comparisons = {
        variant: _compare(variant, options, measures, list(measured.values()))
        for variant in options.variants
        if variant != options.baseline
    }
    return Evaluation(options, measures, measured, reference, comparisons, left_out)


def all_measures(options: Evaluate) -> list[Measure]:
    """In the order of the report; those of networks and of VBench where they are asked for."""
    vbench = {name: DIMENSIONS[name] for name in options.vbench_dimensions} if options.vbench_python else {}
    networks = network_measures(options.clip is not None, options.dino is not None)
    return [*make_measures(options.repeat_seconds), *networks, *given_measures("VBench", vbench)]


def _check_networks(options: Evaluate) -> None:
    """A mistake in a name must not cost the hour that measuring takes."""
    if options.vbench_python is not None:
        check_vbench(options.vbench_python, options.vbench_dimensions)
    if options.clip is not None or options.dino is not None:
        from exvideo_train.evaluation.embedding import load_networks

        load_networks(options.clip, options.dino, options.device)


def measure_videos(
    files: Iterable[VideoFile], reading: Reading, options: Evaluate, left_out: list[str]
) -> dict[Path, Track]:
    """Tracks by path, in processes that a foreign video may kill; one that cannot be read costs itself, and is told."""
    files = list(files)
    tracks = {}
    measure = partial(_measure_one, reading=reading, high_band=options.high_band)
    paths = list(dict.fromkeys(file.path for file in files))
    for path, track in _in_workers(measure, paths, options.num_workers or num_cores(), "measured", options, left_out):
        tracks[path] = track
    if options.clip is not None or options.dino is not None:
        _embed({file.path: file.prompt for file in files if file.path in tracks}, tracks, reading, options, left_out)
    return tracks


def _in_workers(
    function: Callable[[Path], Result | Failure],
    paths: list[Path],
    num_workers: int,
    done: str,
    options: Evaluate,
    left_out: list[str],
) -> Iterator[tuple[Path, Result]]:
    """Results by path, one after another; what fails is told in ``left_out``."""
    num_workers = min(num_workers, len(paths))

    def make_worker() -> Worker[Path, Result]:
        return Worker(function, options.timeout_seconds, _TASKS_PER_PROCESS, prepare=bound_memory)  # type: ignore[arg-type]

    for number, (path, result) in enumerate(map_by(make_worker, Worker.__call__, paths, num_workers, num_workers)):
        print(f"{number + 1} of {len(paths)} videos {done}: {path}", flush=True)
        if isinstance(result, Failure):
            left_out.append(
                result.detail if str(path) in result.detail else f"{path}: {result.reason}, {result.detail}"
            )
        else:
            yield path, result


def _embed(
    prompts: Mapping[Path, str], tracks: dict[Path, Track], reading: Reading, options: Evaluate, left_out: list[str]
) -> None:
    """Add to the tracks what networks see. Workers decode, and the networks stay here, on their device."""
    from exvideo_train.evaluation.embedding import load_networks, prepare_video

    networks = load_networks(options.clip, options.dino, options.device)
    prepare = partial(prepare_video, reading=reading, clip_side=networks.clip_side, with_dino=options.dino is not None)
    # One at a time: a video's frames are held while they are embedded.
    for path, prepared in _in_workers(prepare, list(prompts), 1, "shown to networks", options, left_out):
        clip_FD, dino_FD = networks.embed(prepared)
        text_F = clip_FD @ networks.embed_text(prompts[path]) if prompts[path] and len(clip_FD) else np.empty(0)
        tracks[path] = replace(tracks[path], clip_FD=clip_FD, dino_FD=dino_FD, text_F=text_F)


def _add_vbench(
    options: Evaluate, pairs: Mapping[str, dict[str, Measured]], reference: list[Measured], left_out: list[str]
) -> None:
    assert options.vbench_python is not None
    groups = [[pair[variant] for pair in pairs.values()] for variant in options.variants]
    for videos in (*groups, *([reference] if reference else [])):
        files = list({video.file.path: video.file for video in videos}.values())
        found, failed = run_vbench(
            options.vbench_python, options.vbench_dimensions, files, options.vbench_timeout_minutes
        )
        left_out += failed
        for video in videos:
            given = {f"vbench_{name}": value for name, value in found[video.file.path].items()}
            video.track = replace(video.track, given=given)


def _measure_one(path: Path, reading: Reading, high_band: float) -> Track | Failure:
    import cv2

    # As many processes as cores measure; each of them with threads for all cores would only wait.
    cv2.setNumThreads(1)
    try:
        return track_video(read_frames(str(path), reading), high_band)
    except UnreadableClip as error:
        return Failure(error.reason, error.detail)


def _why_unequal(pair: Mapping[str, Measured], shorten: bool) -> str | None:
    """In words, with the files, what keeps the videos of a pair from being compared."""
    (first_name, first), *others = pair.items()
    for name, other in others:
        files = f"{first.file.path} ({first_name}) and {other.file.path} ({name})"
        one, two = first.track, other.track
        if (one.height, one.width) != (two.height, two.width):
            sizes = f"{one.height}x{one.width} and {two.height}x{two.width}"
            return f"{files}: frames of {sizes}, of which no sharpness can be compared; make both at one size"
        if min(one.num_frames, two.num_frames) < 2:
            return f"{files}: {one.num_frames} and {two.num_frames} frames; a video has two or more"
        if abs(one.fps - two.fps) > _SAME_FPS * max(one.fps, two.fps):
            return f"{files}: {one.fps:.4g} and {two.fps:.4g} frames a second; give fps={min(one.fps, two.fps):.4g}"
        if one.num_frames != two.num_frames and not shorten:
            lengths = f"{one.num_frames} and {two.num_frames} frames"
            return f"{files}: {lengths}; shorten=true compares the time that both have"
    return None


def _shorten(pair: Mapping[str, Measured]) -> None:
    num_frames = min(video.track.num_frames for video in pair.values())
    for video in pair.values():
        video.track = video.track.first(num_frames)


def _reference(options: Evaluate, like: Track, left_out: list[str]) -> list[Measured]:
    if options.reference is None:
        return []
    files = find_videos("reference", Path(options.reference), "reference", options.follow_links)
    reading = Reading(options.fps or like.fps, (like.height, like.width), options.max_frames)
    tracks = measure_videos(files, reading, options, left_out)
    # Kept shares and drift depend on the length: a longer real clip counts as far as the variants' videos go.
    return [
        Measured(file, tracks[file.path].first(min(like.num_frames, tracks[file.path].num_frames)))
        for file in files
        if file.path in tracks
    ]


def _compare(
    variant: str, options: Evaluate, measures: list[Measure], pairs: list[dict[str, Measured]]
) -> list[Comparison]:
    comparisons = []
    for measure in measures:
        both = [
            (value, base)
            for pair in pairs
            if (value := pair[variant].values[measure.name]) is not None
            and (base := pair[options.baseline].values[measure.name]) is not None
        ]
        if both:
            values, baseline = zip(*both, strict=True)
            comparisons.append(compare(measure.name, measure.better, values, baseline, options.seed))
    return comparisons


def results(evaluation: Evaluation) -> dict[str, Any]:
    """What ``results.json`` holds; every number that is none is null."""
    return {
        "version": exvideo_train.__version__,
        "options": asdict(evaluation.options),
        "measures": {
            measure.name: {
                "title": measure.title,
                "unit": measure.unit,
                "better": measure.better.value,
                "source": measure.source,
            }
            for measure in evaluation.measures
        },
        "comparisons": {
            variant: [asdict(comparison) for comparison in comparisons]
            for variant, comparisons in evaluation.comparisons.items()
        },
        "pairs": {
            name: {variant: _as_json(video) for variant, video in pair.items()}
            for name, pair in evaluation.pairs.items()
        },
        "reference": [_as_json(video) for video in evaluation.reference],
        "left_out": evaluation.left_out,
    }


def _as_json(video: Measured) -> dict[str, Any]:
    track = video.track
    series = {name: getattr(track, name) for name in ("seconds", *SERIES)}
    return {
        "file": str(video.file.path),
        "prompt": video.file.prompt,
        "seed": video.file.seed,
        "num_frames": track.num_frames,
        "fps": round(track.fps, 4),
        "height": track.height,
        "width": track.width,
        "measures": video.values,
        "series": {name: [_rounded(value) for value in values] for name, values in series.items()},
    }


def _rounded(value: float) -> float | None:
    return float(f"{value:.6g}") if np.isfinite(value) else None
