"""Measuring a latent store and looking at it.

Axis letters: C channel, T latent frames, F video frames, H height, W width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from exvideo_train.files import atomic_write_bytes
from exvideo_train.geometry import Geometry
from exvideo_train.latents.store import LatentStore
from exvideo_train.models.stages import VideoEncoder, decode_whole

_FRAMES_SHOWN = 8
_CAPTION_LETTERS = 110


def _spread(items: Sequence[str], count: int) -> list[str]:
    count = min(count, len(items))
    return [items[index * len(items) // count] for index in range(count)]


def describe_stats(store: LatentStore, num_clips: int) -> str:
    """Counts, sizes, and mean and standard deviation of each latent channel over some clips, scaled as in training."""
    lines = [f"store {store.path}, {store.normalisation.describe()}"]
    entries = store.read_index().values()
    for geometry in store.geometries():
        sizes = [entry.num_bytes for entry in entries if entry.geometry == geometry.name]
        if not sizes:
            lines.append(f"{geometry.name}: no finished clips")
            continue
        captions = len({entry.caption_sha256 for entry in entries if entry.geometry == geometry.name})
        lines.append(
            f"{geometry.name}: {len(sizes)} clips, {captions} captions, {sum(sizes) / 1e9:.3f} GB, "
            f"{len(sizes) * geometry.duration_seconds / 3600:.2f} h of video"
        )
        ids = _spread(store.clip_ids(geometry), num_clips)
        mean_C, deviation_C, noise_C = channel_stats(store, geometry, ids)
        lines += [f"  over {len(ids)} clips:", "  channel      mean       std  posterior std"]
        for channel, row in enumerate(zip(mean_C, deviation_C, noise_C, strict=True)):
            lines.append(f"  {channel:7d} {row[0]:9.4f} {row[1]:9.4f} {row[2]:14.5f}")
    return "\n".join(lines)


def channel_stats(store: LatentStore, geometry: Geometry, clip_ids: Sequence[str]) -> tuple[Tensor, Tensor, Tensor]:
    """(mean, standard deviation, mean posterior deviation) of each channel of the scaled latents, float64 (C,)."""
    sum_C, square_C, noise_C = (torch.zeros((), dtype=torch.float64) for _ in range(3))
    count = 0
    for clip_id in clip_ids:
        stored_CTHW = store.read(clip_id, geometry).tensors[store.family.latents_name].double()
        mean_CTHW = store.normalisation.mean(stored_CTHW).double()
        sum_C = sum_C + mean_CTHW.sum(dim=(1, 2, 3))
        square_C = square_C + mean_CTHW.square().sum(dim=(1, 2, 3))
        noise_C = noise_C + store.normalisation.deviation(stored_CTHW).double().sum(dim=(1, 2, 3))
        count += mean_CTHW[0].numel()
    mean_C = sum_C / count
    return mean_C, (square_C / count - mean_C.square()).clamp(min=0).sqrt(), noise_C / count


def write_previews(store: LatentStore, model_path: Path, device: str, num_clips: int, folder: Path) -> list[Path]:
    """Decode some clips of each geometry into a contact sheet; returns the pictures.

    Raises:
        UserError: the model is not the one that encoded the store.
    """
    from exvideo_train.latents.fingerprint import model_fingerprint

    pictures = []
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    for geometry in store.geometries():
        store.require(model_fingerprint(model_path, geometry))
    vae: VideoEncoder = store.family.video_encoder()(model_path, device, dtype, False)
    for geometry in store.geometries():
        rows = list(_preview_rows(store, geometry, vae, num_clips))
        path = folder / f"preview_{geometry.name}.png"
        atomic_write_bytes(path, _contact_sheet(rows))
        pictures.append(path)
    return pictures


def _preview_rows(
    store: LatentStore, geometry: Geometry, vae: VideoEncoder, num_clips: int
) -> Iterator[tuple[str, Tensor]]:
    """(label, frames) of each clip, _FRAMES_SHOWN evenly spread frames uint8 (F, H, W, C)."""
    for clip_id in _spread(store.clip_ids(geometry), num_clips):
        clip = store.read(clip_id, geometry)
        latents_CTHW = store.normalisation.mean(clip.tensors[store.family.latents_name])
        frames_FHWC = decode_whole(vae, latents_CTHW.transpose(0, 1))
        last = frames_FHWC.shape[0] - 1
        shown = [round(index * last / (_FRAMES_SHOWN - 1)) for index in range(_FRAMES_SHOWN)]
        yield f"{clip_id}  {clip.caption[:_CAPTION_LETTERS]}", frames_FHWC[shown]


def _contact_sheet(rows: list[tuple[str, Tensor]]) -> bytes:
    import io

    from PIL import Image, ImageDraw

    width, label_height = 240, 16
    height = round(width * rows[0][1].shape[1] / rows[0][1].shape[2])
    sheet = Image.new("RGB", (_FRAMES_SHOWN * width, len(rows) * (height + label_height)), "white")
    drawing = ImageDraw.Draw(sheet)
    for number, (label, frames_FHWC) in enumerate(rows):
        top = number * (height + label_height)
        # The built-in font knows no more than Latin letters.
        drawing.text((4, top + 2), label.encode("latin-1", "replace").decode("latin-1"), fill="black")
        for column, frame_HWC in enumerate(frames_FHWC):
            picture = Image.fromarray(frame_HWC.numpy()).resize((width, height))
            sheet.paste(picture, (column * width, top + label_height))
    stream = io.BytesIO()
    sheet.save(stream, "PNG")
    return stream.getvalue()
