"""Which videos a folder holds, and which of several folders belong together.

Folders come from anywhere. What ``exvideo_train.sample`` wrote has a record beside each video that says which prompt
and seed it was made of; elsewhere equal file names say that two videos are the same one made twice.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exvideo_train.clips.sources.base import VIDEO_SUFFIXES
from exvideo_train.errors import UserError
from exvideo_train.files import parse_json, read_regular, short

# What sampling calls the folder of comparisons.
SIDE_BY_SIDE = "side_by_side"
_MAX_RECORD_BYTES = 1 << 20
_MAX_PROMPT_LETTERS = 2000


@dataclass(frozen=True)
class VideoFile:
    """One video.

    Attributes:
        stem: its name without suffix.
        prompt: what it was made of; empty where nothing says so.
        seed: of its noise, None where nothing says so.
    """

    path: Path
    stem: str
    prompt: str = ""
    seed: int | None = None


def find_videos(option: str, folder: Path, variant: str, follow_links: bool = False) -> list[VideoFile]:
    """The videos of a folder, in the order of their names.

    Args:
        option: what names the folder on the command line, for messages.
        variant: in an output folder of sampling, which has a folder for each variant, the one taken: ``with`` takes
            ``with`` or ``with_adapter``.
        follow_links: take videos outside the folder to which links in it lead.

    Raises:
        UserError: no such folder, no video in it, a link that leads out of it, or a record that is none.
    """
    if not os.path.isdir(folder):
        raise UserError(f"{option}={folder}: no such folder; name a folder of videos")
    found = _listed(folder)
    within = [folder / name for name in (variant, f"{variant}_adapter") if (folder / name).is_dir()]
    if not found and within:
        found = _listed(within[0])
    if not found:
        raise UserError(f"{option}={folder}: holds no video ({', '.join(VIDEO_SUFFIXES)}); name a folder of videos")
    for video in found:
        # The report shows what it finds: a folder of another's must not show one's own videos.
        if not follow_links and folder.resolve() not in video.path.resolve().parents:
            raise UserError(
                f"{option}={folder}: {video.path} is a link out of the folder; follow_links=true takes your own"
            )
    return found


def sampled_variants(folder: Path) -> dict[str, list[VideoFile]]:
    """The videos of an output folder of sampling, by variant; those of all variants next to each other are left out."""
    found = {
        path.name: _listed(path) for path in sorted(folder.iterdir()) if path.is_dir() and path.name != SIDE_BY_SIDE
    }
    return {variant: videos for variant, videos in found.items() if videos}


def _listed(folder: Path) -> list[VideoFile]:
    try:
        names = sorted(entry.name for entry in os.scandir(folder) if entry.name.lower().endswith(VIDEO_SUFFIXES))
    except OSError as error:
        raise UserError(f"{folder}: cannot be listed ({error.strerror}); name a folder that you may read") from error
    return [_video(folder / name) for name in names if not name.startswith(".")]


def _video(path: Path) -> VideoFile:
    """With what its record says, where it has one that sampling wrote."""
    record_path = path.with_suffix(".json")
    if not os.path.lexists(record_path):
        return VideoFile(path, path.stem)
    try:
        record: Any = parse_json(read_regular(record_path, _MAX_RECORD_BYTES))
    except (OSError, ValueError) as error:
        raise UserError(f"{record_path}: cannot be read ({error}); remove it, and videos pair by name") from error
    if not isinstance(record, dict) or not {"prompt", "seed", "variant"} <= record.keys():
        # Some other program's.
        return VideoFile(path, path.stem)
    prompt, seed = record["prompt"], record["seed"]
    if not isinstance(prompt, str) or type(seed) is not int:
        raise UserError(f"{record_path}: prompt={short(prompt)}, seed={short(seed)} are not a text and a number")
    return VideoFile(path, path.stem, prompt[:_MAX_PROMPT_LETTERS], seed)


def pair_videos(variants: Mapping[str, list[VideoFile]]) -> tuple[dict[str, dict[str, VideoFile]], list[str]]:
    """Videos that belong together, and in words those that have no counterpart.

    By prompt and seed where all variants know their prompts (the first of two equal ones goes with the first), else by
    stem.

    Returns:
        name of the pair -> variant -> video, complete ones only; what was left over.

    Raises:
        UserError: no video has a counterpart in every variant, or two have the same name.
    """
    by_prompt = all(video.prompt for videos in variants.values() for video in videos)
    keyed = {variant: _by_key(videos, by_prompt) for variant, videos in variants.items()}
    first = next(iter(keyed))
    common = [key for key in keyed[first] if all(key in videos for videos in keyed.values())]
    left_over = [
        f"{videos[key].path}: {variant} alone has it"
        if len(keyed) == 2
        else f"{videos[key].path}: not every variant has it"
        for variant, videos in keyed.items()
        for key in videos
        if key not in common
    ]
    if not common:
        examples = "; ".join(f"{variant} has {next(iter(videos.values())).path}" for variant, videos in keyed.items())
        how = "prompt and seed" if by_prompt else "file name"
        raise UserError(f"no two videos belong together by {how}: {examples}; give counterparts equal names")
    names = _pair_names([keyed[first][key] for key in common])
    pairs = {
        name: {variant: videos[key] for variant, videos in keyed.items()}
        for name, key in zip(names, common, strict=True)
    }
    return pairs, left_over


def _by_key(videos: Iterable[VideoFile], by_prompt: bool) -> dict[object, VideoFile]:
    keyed: dict[object, VideoFile] = {}
    seen: Counter[object] = Counter()
    for video in videos:
        if by_prompt:
            seen[video.prompt, video.seed] += 1
            keyed[video.prompt, video.seed, seen[video.prompt, video.seed]] = video
        elif video.stem in keyed:
            other = keyed[video.stem]
            raise UserError(f"{other.path.name!r} and {video.path.name!r} in {video.path.parent} have one name; rename")
        else:
            keyed[video.stem] = video
    return keyed


def _pair_names(videos: list[VideoFile]) -> list[str]:
    """Stems, told apart where two are equal."""
    counts = Counter(video.stem for video in videos)
    return [video.stem if counts[video.stem] == 1 else f"{video.stem}#{number}" for number, video in enumerate(videos)]
