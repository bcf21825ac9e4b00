"""Rendered clips through the trained VAE, kept on disk: what the DiT is trained on and measured with.

Axis letters: N clips, B batch, F video frames, T latent frames, C channel, H height, W width.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm
from train_vae import clip

from exvideo_train.files import atomic_write, sha256_file
from exvideo_train.models.cogvideox.encoder_weights import load_vae
from exvideo_train.models.cogvideox.encoding import read_normalisation

# Seeds of scenes; the VAE's, and those that clips.py gives out from 0 on for an adapter, come from other ranges.
FIRST_TRAINING_SEED, FIRST_HELD_OUT_SEED = 10_000_000, 20_000_000
CHUNK, BATCH = 64, 8


def encoded(model: Path, cache: Path, first_seed: int, num_clips: int, num_frames: int) -> Tensor:
    """Moments of the posterior, (N, 2C, T, H, W) float16, of the clips of consecutive seeds.

    Args:
        model: folder that holds ``vae/``.
        cache: where they are kept, in a folder named by the VAE's weights: what is there is not encoded again.
        num_clips: a multiple of 64, or less.
    """
    vae: Any = None
    digest = sha256_file(model / "vae" / "diffusion_pytorch_model.safetensors")
    chunks = []
    for first in tqdm(
        range(first_seed, first_seed + num_clips, CHUNK), f"latents of {num_frames} frames", unit="chunk"
    ):
        path = cache / digest[:12] / f"{num_frames}_frames_{first}.safetensors"
        if not path.exists():
            vae = vae or load_vae(model / "vae", torch.float32)
            tensors = {"moments": _encode_chunk(vae, first, num_frames)}
            atomic_write(path, partial(save_file, tensors))
        chunks.append(load_file(path)["moments"])
    return torch.cat(chunks)[:num_clips]


@torch.inference_mode()
def _encode_chunk(vae: Any, first_seed: int, num_frames: int) -> Tensor:
    moments = []
    for first in range(first_seed, first_seed + CHUNK, BATCH):
        video_BCFHW = torch.stack([clip(seed, num_frames) for seed in range(first, first + BATCH)])
        # Of whole levels, as frames of a file are.
        video_BCFHW = ((video_BCFHW + 1) * 127.5).round() / 127.5 - 1
        moments.append(vae.encode(video_BCFHW).latent_dist.parameters.half())
    return torch.cat(moments)


class Latents:
    """Encoded clips, as the trainer of adapters sees them: each time another sample of the posterior."""

    def __init__(self, model: Path, cache: Path, first_seed: int, num_clips: int, num_frames: int) -> None:
        self.moments = encoded(model, cache, first_seed, num_clips, num_frames)
        self.normalisation = read_normalisation(model)

    def __len__(self) -> int:
        return len(self.moments)

    def sample(self, number: int, noise_TCHW: Tensor) -> Tensor:
        """latents_TCHW of a clip, float32."""
        return self.normalisation.latents(self.moments[number].float(), noise_TCHW)

    @property
    def shape_TCHW(self) -> tuple[int, ...]:
        """Of one clip's latents."""
        _, channels, frames, height, width = self.moments.shape
        return frames, channels // 2, height, width
