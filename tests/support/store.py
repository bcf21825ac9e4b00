"""Latent stores with random content: what encoding would have written, in milliseconds."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from exvideo_train.config.experiment import Dtype
from exvideo_train.config.latents import EncodeLatents
from exvideo_train.geometry import Geometry
from exvideo_train.latents.fingerprint import model_fingerprint
from exvideo_train.latents.settings import EncodeSettings
from exvideo_train.latents.store import LatentStore
from exvideo_train.models.cogvideox.encoding import read_normalisation
from exvideo_train.models.cogvideox.family import GRID

SHORT = Geometry(17, 64, 96, 8.0)
BASE = Geometry(49, 64, 96, 8.0)
LONG = Geometry(57, 64, 96, 8.0)


def clip_ids(number: int, first: int = 0) -> list[str]:
    return [f"{index:020x}" for index in range(first, first + number)]


def write_store(
    folder: Path,
    model: Path,
    clips: Mapping[Geometry, Sequence[str]],
    *,
    nan_clips: Sequence[str] = (),
) -> LatentStore:
    """Write random moments and embeddings of the model's sizes; equal arguments give equal bytes.

    Args:
        clips: ids by geometry.
        nan_clips: ids whose latents hold a NaN, as a faulty encoder might have written them.
    """
    config = json.loads((model / "transformer" / "config.json").read_text())
    store = LatentStore.create(folder, read_normalisation(model))
    generator = torch.Generator().manual_seed(0)
    length, channels = config["max_text_seq_length"], config["text_embed_dim"]
    entries = []
    for geometry, ids in clips.items():
        store.add_geometry(model_fingerprint(model, geometry, vae_dtype="bf16", text_dtype="bf16", tiling=False))
        for clip_id in ids:
            shape = GRID.shape_THW(geometry)
            mean = torch.randn(config["in_channels"], *shape, generator=generator)
            if clip_id in nan_clips:
                mean[0, 0, 0, 0] = torch.nan
            log_variance = torch.randn(config["in_channels"], *shape, generator=generator) - 4
            entries.append(
                store.write_clip(
                    clip_id,
                    geometry,
                    {
                        "moments": torch.cat([mean, log_variance]).bfloat16(),
                        "text": torch.randn(length, channels, generator=generator).bfloat16(),
                    },
                    caption=f"clip {clip_id}",
                )
            )
    store.write_empty_prompt({"text": torch.randn(length, channels, generator=generator).bfloat16()})
    store.write_index(entries)
    return store


def settings_for(store: LatentStore, geometry: Geometry, model: Path | None = None, **options: Any) -> EncodeSettings:
    """How a run encodes into a store.

    Args:
        options: of the command, if other than a small machine's.
    """
    small = {"encoder_dtype": Dtype.fp32, "decode_workers": 1, "prefetch_clips": 2, "clip_timeout_seconds": 120.0}
    config = EncodeLatents(latents=str(store.path), **(small | options))
    return EncodeSettings(
        options=config,
        model_path=model or store.path / "no_model",
        store_path=store.path,
        fingerprint=store.fingerprints[geometry.name],
        normalisation=store.normalisation,
        decode_workers=config.decode_workers,
    )
