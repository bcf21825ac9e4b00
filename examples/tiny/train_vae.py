"""Trains the tiny models' VAE on rendered clips: AutoencoderKLCogVideoX in small, 1.9 million parameters.

    python examples/tiny/train_vae.py --steps 6000

Goes on where it was stopped; the state is in FOLDER/vae_training. Writes FOLDER/vae in the published layout.

Axis letters: B batch, C channel, F video frames, H height, W width.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from clips import HEIGHT, WIDTH, draw_scene, render
from diffusers import AutoencoderKLCogVideoX
from loop import load_average, train
from optimizer import make_optimizers
from torch import Tensor, nn

from exvideo_train.models.cogvideox import published

SIZE: dict[str, Any] = {
    "block_out_channels": [8, 16, 32, 64],
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "sample_height": HEIGHT,
    "sample_width": WIDTH,
    "scaling_factor": 1.0,
}
# Seeds of scenes: other ranges are other sets.
FIRST_TRAINING_SEED, FIRST_SCORED_SEED = 1_000_000, 2_000_000
# In nats; enough that latents are about normal, which is what noise is mixed with.
KL_WEIGHT = 2e-5
SCORED_CLIPS = 8
# Small pieces first: more of them a second, and all that a pixel depends on is in them.
CROP_STEPS, CROP = 0.4, 32
FOLDER = Path("tiny_training")


def make_vae() -> Any:
    """Fresh weights; scaling_factor is set when they are trained."""
    config = {name: value for name, value in published.VAE_5B.items() if not name.startswith("_")}
    return AutoencoderKLCogVideoX(**(config | SIZE))


def clip(seed: int, num_frames: int) -> Tensor:
    """video_CFHW in [-1, 1], drawn at twice the size and made smaller as a clip from a file is."""
    frames_FHWC = render(draw_scene(seed), num_frames, 2 * HEIGHT, 2 * WIDTH)
    frames_FCHW = torch.from_numpy(frames_FHWC).permute(0, 3, 1, 2).float()
    small_FCHW = F.interpolate(frames_FCHW, (HEIGHT, WIDTH), mode="bicubic", antialias=True)
    return small_FCHW.clamp(0, 255).permute(1, 0, 2, 3) / 127.5 - 1


def batch_of(step: int, num_steps: int) -> Tensor:
    """Videos of 9 frames, four small crops at first, then two whole; every fourth step one of 17 whole frames."""
    seed = FIRST_TRAINING_SEED + 4 * step
    if step < CROP_STEPS * num_steps:
        rng = np.random.default_rng(step)
        crops = []
        for number in range(4):
            top, left = int(rng.integers(0, HEIGHT - CROP + 1)), int(rng.integers(0, WIDTH - CROP + 1))
            crops.append(clip(seed + number, 9)[:, :, top : top + CROP, left : left + CROP])
        return torch.stack(crops)
    if step % 4 == 0:
        return clip(seed, 17)[None]
    return torch.stack([clip(seed, 9), clip(seed + 1, 9)])


def loss_of(vae: nn.Module, video_BCFHW: Tensor, step: int) -> Tensor:
    """Absolute and squared error, error of the differences between neighbours, and a little KL."""
    posterior = vae.encode(video_BCFHW).latent_dist  # type: ignore[operator]
    decoded_BCFHW = vae.decode(posterior.sample(torch.Generator().manual_seed(step))).sample  # type: ignore[operator]
    error = decoded_BCFHW - video_BCFHW
    steepness = sum(error.diff(dim=axis).abs().mean() for axis in (2, 3, 4))
    loss: Tensor = error.abs().mean() + error.square().mean() + 0.5 * steepness + KL_WEIGHT * posterior.kl().mean()
    return loss


@torch.no_grad()
def score(vae: nn.Module) -> dict[str, float]:
    """Peak signal to noise of clips that were not trained on, and the deviation of their posteriors' means."""
    errors, latents = [], []
    for seed in range(FIRST_SCORED_SEED, FIRST_SCORED_SEED + SCORED_CLIPS):
        video_BCFHW = clip(seed, 49)[None]
        mean = vae.encode(video_BCFHW).latent_dist.mean  # type: ignore[operator]
        decoded = vae.decode(mean).sample.clamp(-1, 1)  # type: ignore[operator]
        errors.append(float((decoded - video_BCFHW).square().mean()))
        latents.append(mean)
    return {
        "psnr_db": float(10 * np.log10(4 / np.mean(errors))),
        "latent_deviation": float(torch.cat(latents).std()),
    }


def main() -> None:
    """Entry of ``python examples/tiny/train_vae.py``."""
    parser = argparse.ArgumentParser(description="Train the tiny models' VAE; goes on where it was stopped.")
    parser.add_argument("--folder", type=Path, default=FOLDER, help=f"where everything is kept; default {FOLDER}")
    parser.add_argument("--steps", type=int, default=6000, help="optimizer steps in all; default 6000")
    parser.add_argument("--write-now", action="store_true", help="write vae/ of the training's last state and stop")
    options = parser.parse_args()
    torch.manual_seed(0)
    vae = make_vae()
    training = options.folder / "vae_training"
    if options.write_now:
        print(f"vae/ of step {load_average(training, vae)}")
    else:
        # Filters of three colour channels are few and short: Muon would make all of them equally strong.
        matrices = {name for name, parameter in vae.named_parameters() if parameter.ndim >= 2 and "conv_in" not in name}
        train(
            vae,
            make_optimizers(vae, 0.005, 1e-3, matrices),
            lambda step: loss_of(vae, batch_of(step, options.steps), step),
            num_steps=options.steps,
            folder=training,
            score=score,
            score_steps=250,
            ema_decay=0.999,
        )
    # Latents of deviation 1 are what the noise levels are made for.
    vae.register_to_config(scaling_factor=round(1 / score(vae)["latent_deviation"], 4))
    nn.Module.to(vae, torch.bfloat16)
    vae.save_pretrained(options.folder / "vae")
    # The library closes its files to other users.
    (options.folder / "vae" / "diffusion_pytorch_model.safetensors").chmod(0o644)


if __name__ == "__main__":
    main()
