"""``python -m exvideo_train.evaluation.samples FOLDER``: the measures of one folder of a run's sample videos.

Training starts this beside itself when videos are made, as it reads no video. All measures, of one pass over each
video, go to ``measures.json`` in the folder; where that stands already nothing is measured again.
"""

from __future__ import annotations

import fcntl
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import exvideo_train
from exvideo_train.config.evaluation import Evaluate
from exvideo_train.entry import USER_ERROR_STATUS
from exvideo_train.errors import UserError
from exvideo_train.evaluation.folders import sampled_variants
from exvideo_train.evaluation.measures import make_measures, measure_track
from exvideo_train.evaluation.reading import Reading
from exvideo_train.evaluation.run import measure_videos
from exvideo_train.files import atomic_write_json
from exvideo_train.terminal import escaped

MEASURES_FILE = "measures.json"
Values = dict[str, float | None]


def measure_samples(folder: Path) -> dict[str, Any]:
    """What ``measures.json`` holds: measures of every video and their means, by variant; and what failed, in words.

    Raises:
        UserError: a record beside a video is none.
    """
    variants = sampled_variants(folder)
    # One process, as the machine's cores are training's.
    options = Evaluate(num_workers=1)
    failed: list[str] = []
    files = [video for videos in variants.values() for video in videos]
    tracks = measure_videos(files, Reading(options.fps, None, options.max_frames), options, failed) if files else {}
    measures = make_measures(options.repeat_seconds)
    by_variant = {
        variant: {
            video.path.name: measure_track(tracks[video.path], measures) for video in videos if video.path in tracks
        }
        for variant, videos in variants.items()
    }
    return {
        "version": exvideo_train.__version__,
        "means": {variant: _means(list(videos.values())) for variant, videos in by_variant.items() if videos},
        "videos": by_variant,
        "num_prompts": max(map(len, variants.values()), default=0),
        "failed": failed,
    }


def _means(videos: Sequence[Values]) -> Values:
    """Of the videos that have a measure; None where none has."""
    means: Values = {}
    for name in videos[0]:
        values = [value for video in videos if (value := video[name]) is not None]
        means[name] = sum(values) / len(values) if values else None
    return means


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One process at a time: a killed run leaves its own at work while the next run starts another."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        # Where a file system has no such locks, both measure, with equal results.
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def main() -> None:
    folder = Path(sys.argv[1])
    try:
        with _alone(folder):
            if not (folder / MEASURES_FILE).exists():
                atomic_write_json(folder / MEASURES_FILE, measure_samples(folder))
    except (UserError, OSError) as error:
        print(f"error: {escaped(str(error))}", file=sys.stderr, flush=True)
        raise SystemExit(USER_ERROR_STATUS) from None


if __name__ == "__main__":
    main()
