"""Latents that sampling kept, decoded again: elsewhere, with or without tiles."""

from __future__ import annotations

import sys
from contextlib import closing
from pathlib import Path

import torch
from tqdm import tqdm

from exvideo_train.config.commands import Sample
from exvideo_train.errors import UserError
from exvideo_train.geometry import Geometry
from exvideo_train.models.hub import resolve_model_path
from exvideo_train.models.registry import encoders_family
from exvideo_train.models.stages import VideoEncoder, torch_dtype
from exvideo_train.sampling.output import REMEDY, VideoFiles, prepare_folder, read_latents


def decode_kept(config: Sample, device: str) -> None:
    """Decode the latents that ``latents=`` names into ``output=``, by variant as they were made.

    Only the VAE of the model is read. Records and names are those of the videos that the latents are of.

    Raises:
        UserError: no such files, or latents of another family or size.
    """
    source = Path(str(config.latents))
    paths = sorted(source.rglob("*.safetensors")) if source.is_dir() else [source]
    if not paths:
        raise UserError(f"latents={source}: holds no .safetensors; name what keep_latents=true wrote")
    model_path = resolve_model_path(config.model.path, config.model.revision, ("vae",))
    family = encoders_family(model_path)
    output = Path(config.output)
    if not config.dry_run:
        prepare_folder(output)
    dtype = torch_dtype(config.model.dtype.value)
    vae: VideoEncoder = family.video_encoder()(model_path, torch.device(device), dtype, config.vae_tiling)
    with closing(vae):
        for path in tqdm(paths, unit="video", disable=config.dry_run):
            record, latents_TCHW = read_latents(path)
            if record["family"] != family.name:
                raise UserError(f"{path}: latents of {record['family']}, the model is {family.name}; name its model")
            geometry = Geometry(*(record[name] for name in ("num_frames", "height", "width", "fps")))
            if (found := (*latents_TCHW.shape[:1], *latents_TCHW.shape[2:])) != family.grid.shape_THW(geometry):
                raise UserError(f"{path}: latents of {found} are no video of {geometry.name}; the file is damaged")
            files = VideoFiles(output / record["variant"], path.stem)
            if config.dry_run or files.is_finished(record, config.overwrite):
                print(f"{files.video}: {'would be' if config.dry_run else 'is'} decoded from {path}")
                continue
            if fault := files.write_video(vae.decode(latents_TCHW), record):
                print(f"warning: {files.video}: {fault}; {REMEDY}", file=sys.stderr, flush=True)
