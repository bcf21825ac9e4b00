"""What sampling leaves in its output folder, and what it finds there.

VARIANT/STEM.mp4            the video; its metadata hold the same as
VARIANT/STEM.json           all that is needed to make it again, written last: a video with it is finished
VARIANT/STEM.safetensors    its latents, with keep_latents=true
VARIANT/STEM.lock/          while a process makes it
side_by_side/STEM.mp4       all variants next to each other
contact_sheets/STEM.png     frames of all variants
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

import exvideo_train
from exvideo_train.errors import UserError
from exvideo_train.files import atomic_write_json, parse_json, read_regular, sha256_file, short
from exvideo_train.sampling.pipeline import Sampling
from exvideo_train.sampling.requests import VideoRequest
from exvideo_train.sampling.variants import Variant
from exvideo_train.sampling.video import Frame, compare_videos, write_mp4
from exvideo_train.tensor_files import atomic_save_safetensors, read_safetensors_header

SIDE_BY_SIDE, CONTACT_SHEETS = "side_by_side", "contact_sheets"
REMEDY = "try model.dtype=bf16 or fp32, a strength of 0.5 or an adapter of an earlier step"
# Of 255: no darker than the eye tells from black.
BLACKEST = 4
LATENTS, RECORD_KEY = "latents_TCHW", "exvideo_train_sample"
# Of a record: how, where and with what outcome a video was made, not what it is made of.
_MADE_BY = ("made_by", "fault")
_MAX_RECORD_BYTES = 1 << 20


def make_record(sampling: Sampling, model: str, request: VideoRequest, variant: Variant) -> dict[str, Any]:
    """All that a video is made of, as JSON values.

    Args:
        model: as the user named it.
    """
    sampler = asdict(sampling.sampler)
    levers = {"batched_guidance": sampler.pop("batched_guidance"), "vae_tiling": sampling.vae_tiling}
    geometry = request.geometry
    image = request.image and {"name": request.image.name, "sha256": sha256_file(request.image)}
    adapters = [
        {
            "name": part.path.name,
            "sha256": sampling.files[part.path].sha256,
            "strength": part.strength,
            "provenance": dict(sampling.files[part.path].provenance),
        }
        for part in variant.adapters
    ]
    return {
        "prompt": request.prompt,
        "negative_prompt": request.negative_prompt,
        "seed": request.seed,
        "num_frames": geometry.num_frames,
        "height": geometry.height,
        "width": geometry.width,
        "fps": geometry.fps,
        "image": image,
        "variant": variant.name,
        "adapters": adapters,
        "model": model,
        "family": sampling.family.name,
        "dtype": str(sampling.dtype).removeprefix("torch."),
        **sampler,
        "positions": sampling.positions,
        "made_by": {
            "exvideo_train": exvideo_train.__version__,
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "attention": sampling.attention.value,
            **levers,
            "adapter_files": [str(part.path) for part in variant.adapters],
        },
    }


@dataclass(frozen=True)
class VideoFiles:
    """The files of one video of one variant."""

    folder: Path
    stem: str

    @property
    def video(self) -> Path:
        return self.folder / f"{self.stem}.mp4"

    @property
    def record(self) -> Path:
        return self.folder / f"{self.stem}.json"

    @property
    def latents(self) -> Path:
        return self.folder / f"{self.stem}.safetensors"

    @property
    def lock(self) -> Path:
        return self.folder / f"{self.stem}.lock"

    def is_finished(self, wanted: Mapping[str, Any], overwrite: bool) -> bool:
        """Whether the video is there, made as ``wanted``.

        Raises:
            UserError: it was made otherwise, and ``overwrite`` is not set; names what differs.
        """
        if not (self.record.exists() and self.video.exists()):
            return False
        found = _read_record(self.record)
        if not (differing := differences(found, wanted)):
            return True
        if overwrite:
            return False
        raise UserError(
            f"{self.video} was made with other settings: {'; '.join(differing)}; choose another output, or "
            "overwrite=true to make it again"
        )

    def kept_latents(self, wanted: Mapping[str, Any]) -> Tensor | None:
        """latents_TCHW of a run that was ended before it decoded them; None where there are none of this video."""
        if not self.latents.exists():
            return None
        record, latents_TCHW = read_latents(self.latents)
        return None if differences(record, wanted) else latents_TCHW

    def write_latents(self, latents_TCHW: Tensor, record: Mapping[str, Any]) -> None:
        metadata = {RECORD_KEY: json.dumps(record, ensure_ascii=False)}
        atomic_save_safetensors(self.latents, {LATENTS: latents_TCHW.contiguous()}, metadata)

    def write_video(self, frames: Iterable[tuple[Tensor, float]], record: Mapping[str, Any]) -> str:
        """Write frames_FHWC as they come, then the record; returns what is wrong with the video, empty for nothing."""
        watched = _Watched(frames)
        write_mp4(self.video, watched, record["fps"], json.dumps(record, ensure_ascii=False))
        atomic_write_json(self.record, {**record, "fault": watched.fault()})
        return watched.fault()


class _Watched:
    """Frames one by one, of which it remembers what shows that numbers went wrong: NaN looks like night."""

    def __init__(self, frames: Iterable[tuple[Tensor, float]]) -> None:
        self._frames = frames
        self._num_finite = 0.0
        self._num_frames = 0
        self._brightest = 0

    def __iter__(self) -> Iterator[Frame]:
        for frames_FHWC, share_finite in self._frames:
            self._num_finite += share_finite * len(frames_FHWC)
            self._num_frames += len(frames_FHWC)
            self._brightest = max(self._brightest, int(frames_FHWC.max()))
            yield from np.asarray(frames_FHWC.numpy())

    def fault(self) -> str:
        share_finite = self._num_finite / self._num_frames
        if share_finite < 1:
            return f"{100 * (1 - share_finite):.3g} % of its numbers were not finite (NaN or infinity)"
        return "all black" if self._brightest <= BLACKEST else ""


def differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """What two records say differently of what their videos are made of."""
    return [
        f"{name} was {short(found.get(name))}, now {short(value)}"
        for name, value in json.loads(json.dumps(wanted)).items()
        if name not in _MADE_BY and found.get(name) != value
    ]


def _read_record(path: Path) -> dict[str, Any]:
    try:
        content = parse_json(read_regular(path, _MAX_RECORD_BYTES))
        if not isinstance(content, dict):
            raise ValueError("no object")
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not what this program writes ({error}); remove it with its video") from error
    return content


def read_latents(path: Path) -> tuple[dict[str, Any], Tensor]:
    """A video's record and latents_TCHW, from the file that ``keep_latents=true`` wrote.

    Raises:
        UserError: it is no such file.
    """
    header = read_safetensors_header(path)
    metadata = header.get("__metadata__", {})
    try:
        record = parse_json(metadata[RECORD_KEY])
        geometry = [record[name] for name in ("num_frames", "height", "width")]
        if not all(type(number) is int and number > 0 for number in geometry) or not record["fps"] > 0:
            raise ValueError("sizes that are none")
        if any(type(record[name]) is not str for name in ("prompt", "variant", "family")):
            raise ValueError("names that are no text")
        # It becomes the name of a folder.
        if not re.fullmatch(r"\w[\w.+-]*", record["variant"]):
            raise ValueError(f"variant={short(record['variant'])}")
        if len(header[LATENTS]["shape"]) != 4:
            raise ValueError("latents of another shape")
    except (LookupError, TypeError, ValueError) as error:
        raise UserError(f"{path}: no latents that keep_latents=true wrote ({error}); name others") from error
    return record, load_file(path)[LATENTS]


def prepare_folder(folder: Path) -> None:
    """Make the output folder now: a mistake in its name must not cost an hour of sampling.

    Raises:
        UserError: it cannot be made or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"output={folder}: {error.strerror}; name a folder that can be made") from error
    if not os.access(folder, os.W_OK):
        raise UserError(f"output={folder}: not writable; name another folder")


def comparison_files(folder: Path, stem: str) -> tuple[Path, Path]:
    """Where all variants of a video are shown next to each other, and its contact sheet."""
    return folder / SIDE_BY_SIDE / f"{stem}.mp4", folder / CONTACT_SHEETS / f"{stem}.png"


def compare_variants(folder: Path, variants: Sequence[Variant], request: VideoRequest) -> None:
    """Write the comparisons of a video, once all its variants are finished and unless they are there."""
    files = {variant.name: VideoFiles(folder / variant.name, request.stem) for variant in variants}
    if not all(one.video.exists() and one.record.exists() for one in files.values()):
        return
    both, sheet = comparison_files(folder, request.stem)
    newest = max(one.record.stat().st_mtime for one in files.values())
    made = [both, sheet] if len(files) > 1 else [sheet]
    if all(path.exists() and path.stat().st_mtime >= newest for path in made):
        return
    videos = {name.replace("_", " "): one.video for name, one in files.items()}
    compare_videos(videos, request.geometry.fps, both if len(files) > 1 else None, sheet)
