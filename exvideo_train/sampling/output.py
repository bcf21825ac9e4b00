"""What a sampled prompt leaves in the output folder.

000_with_adapter.mp4  000_without_adapter.mp4  000_side_by_side.mp4  000_frames.png
samples.json          prompts, files, settings and the adapter's provenance
"""

from __future__ import annotations

import json
import os
import re
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import exvideo_train
from exvideo_train.errors import UserError
from exvideo_train.files import atomic_write_json
from exvideo_train.sampling.pipeline import SampledVideo, Sampling
from exvideo_train.sampling.video import side_by_side, write_contact_sheet, write_mp4

INDEX = "samples.json"
_OUTPUT_NAME = re.compile(rf"\d{{3,}}_\w+\.(?:mp4|png)|{re.escape(INDEX)}")
REMEDY = "try model.dtype=bf16 or fp32, adapter_scale=0.5 or an adapter of an earlier step"


def own_files(folder: Path) -> list[Path]:
    """The files there that sampling into this folder could replace."""
    return [path for path in folder.iterdir() if _OUTPUT_NAME.fullmatch(path.name)]


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


class SampleWriter:
    """Writes videos as they come and keeps ``samples.json`` true to what lies there."""

    def __init__(self, folder: Path, sampling: Sampling) -> None:
        self.folder = folder
        self.fps = sampling.geometry.fps
        self.settings = {
            "geometry": sampling.geometry.name,
            **asdict(sampling.sampler),
            "dtype": str(sampling.dtype).removeprefix("torch."),
            "model": str(sampling.model_path),
            "adapter": sampling.adapter_source or None,
            "adapter_scale": sampling.adapter_scale,
            "version": exvideo_train.__version__,
        }
        self.provenance = sampling.adapter.provenance if sampling.adapter else {}
        self.samples: list[dict[str, Any]] = []

    def write(self, video: SampledVideo) -> list[Path]:
        """Write one prompt's files; returns them, videos first. What is wrong with a video is said and noted."""
        stem = f"{len(self.samples):03d}"
        files = {variant: f"{stem}_{variant}.mp4" for variant in video.frames}
        comment = json.dumps({"prompt": video.prompt, **self.settings}, ensure_ascii=False)
        for variant, name in files.items():
            write_mp4(self.folder / name, video.frames[variant], self.fps, f"{variant}: {comment}")
            if variant in video.faults:
                print(f"warning: {self.folder / name}: {video.faults[variant]}; {REMEDY}", file=sys.stderr, flush=True)
        if len(video.frames) > 1:
            files["side_by_side"] = f"{stem}_side_by_side.mp4"
            frames_FHWC = side_by_side(list(video.frames.values()))
            write_mp4(
                self.folder / files["side_by_side"], frames_FHWC, self.fps, f"{', '.join(video.frames)}: {comment}"
            )
        files["contact_sheet"] = f"{stem}_frames.png"
        rows = {variant.replace("_", " "): frames for variant, frames in video.frames.items()}
        write_contact_sheet(self.folder / files["contact_sheet"], rows, self.fps)
        self.samples.append({"prompt": video.prompt, "files": files, "faults": video.faults})
        atomic_write_json(
            self.folder / INDEX,
            {"settings": self.settings, "adapter_provenance": self.provenance, "samples": self.samples},
        )
        return [self.folder / name for name in files.values()]
