"""Which videos a folder holds, and which of several folders belong together.

Folders come from anywhere. What ``exvideo_train.sample`` wrote says in its ``samples.json`` which prompt and seed a
video was made of; elsewhere equal file names say that two videos are the same one made twice.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exvideo_train.clips.sources.base import VIDEO_SUFFIXES
from exvideo_train.errors import UserError
from exvideo_train.files import parse_json, read_regular, short

INDEX = "samples.json"
_MAX_INDEX_BYTES = 64 << 20
_MAX_PROMPT_LETTERS = 2000
# What sampling writes beside the videos of one variant each.
_NOT_A_VARIANT = ("side_by_side", "contact_sheet")


@dataclass(frozen=True)
class VideoFile:
    """One video.

    Attributes:
        stem: its name without suffix and, in a sampling folder, without variant.
        prompt: what it was made of; empty where nothing says so.
        seed: of its noise, None where nothing says so.
    """

    path: Path
    stem: str
    prompt: str = ""
    seed: int | None = None


def find_videos(option: str, folder: Path, variant: str, follow_links: bool = False) -> list[VideoFile]:
    """The videos of a folder, in the order of their names or of its ``samples.json``.

    Args:
        option: what names the folder on the command line, for messages.
        variant: in a folder of sampling that holds several variants, the one taken: ``with`` takes ``with_adapter``.
        follow_links: take videos outside the folder to which links in it lead.

    Raises:
        UserError: no such folder, no video in it, a link that leads out of it, or a ``samples.json`` that is none.
    """
    if not os.path.isdir(folder):
        raise UserError(f"{option}={folder}: no such folder; name a folder of videos")
    index = folder / INDEX
    found = _sampled(index, variant) if os.path.lexists(index) else _listed(folder)
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
    """All videos that the ``samples.json`` of a folder names, by variant; none where there is no such file.

    Raises:
        UserError: the file is not what sampling writes.
    """
    index = folder / INDEX
    if not os.path.lexists(index):
        return {}
    with _told_as_foreign(index):
        settings, samples = _read_index(index)
        found: dict[str, list[VideoFile]] = {}
        for sample in samples:
            for variant in _variants_of(sample):
                found.setdefault(variant, []).append(_sample(index, sample, settings.get("seed"), variant))
    return found


def _listed(folder: Path) -> list[VideoFile]:
    try:
        names = sorted(entry.name for entry in os.scandir(folder) if entry.name.lower().endswith(VIDEO_SUFFIXES))
    except OSError as error:
        raise UserError(f"{folder}: cannot be listed ({error.strerror}); name a folder that you may read") from error
    return [VideoFile(folder / name, Path(name).stem) for name in names if not name.startswith(".")]


def _sampled(index: Path, variant: str) -> list[VideoFile]:
    with _told_as_foreign(index):
        settings, samples = _read_index(index)
        return [_sample(index, sample, settings.get("seed"), variant) for sample in samples]


@contextmanager
def _told_as_foreign(index: Path) -> Iterator[None]:
    try:
        yield
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{index}: not what exvideo_train.sample writes ({type(error).__name__}: {error}); remove it, and videos "
            "are paired by their names"
        ) from error


def _read_index(index: Path) -> tuple[Any, Any]:
    content: Any = parse_json(read_regular(index, _MAX_INDEX_BYTES))
    return content["settings"], content["samples"]


def _variants_of(sample: Mapping[str, Any]) -> dict[str, Any]:
    return {name: file for name, file in sample["files"].items() if name not in _NOT_A_VARIANT}


def _sample(index: Path, sample: Mapping[str, Any], seed: Any, variant: str) -> VideoFile:
    files = _variants_of(sample)
    chosen = next((name for name in (variant, f"{variant}_adapter") if name in files), None)
    if chosen is None and len(files) == 1:
        chosen = next(iter(files))
    if chosen is None:
        raise UserError(
            f"{index}: has {', '.join(map(short, files)) or 'no variant'}, none of them called {variant}; name the "
            "variant by one of these, +variants.NAME=DIR"
        )
    file, prompt, seed = files[chosen], sample["prompt"], sample.get("seed", seed)
    # A path could lead to any file of the user's, and the report shows what it finds.
    if not isinstance(file, str) or Path(file).name != file or "\0" in file:
        raise UserError(f"{index}: file {short(file)} is no plain name; videos lie beside {INDEX}")
    if not isinstance(prompt, str) or not (seed is None or type(seed) is int):
        raise UserError(f"{index}: prompt={short(prompt)}, seed={short(seed)} are not a text and a number")
    stem = Path(file).stem.removesuffix(f"_{chosen}")
    return VideoFile(index.parent / file, stem, prompt[:_MAX_PROMPT_LETTERS], seed)


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
