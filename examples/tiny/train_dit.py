"""Trains a tiny model's DiT on 49 frames, or on 129 for the ceiling that an adapter is measured against.

    python examples/tiny/train_dit.py --positions sincos --frames 49 --steps 12000

The folder holds vae/ (train_vae.py). Goes on where it was stopped; the state is in FOLDER/POSITIONS_FRAMES_training.
Writes FOLDER/POSITIONS_FRAMES, a whole model in the published layout, which diffusers' CogVideoXPipeline loads.

Axis letters: B batch, T latent frames, C channel, H height, W width, L text tokens.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from assemble import write_model
from captions import TEXT_CHANNELS, TEXT_LENGTH, all_captions, embed, write_text_encoder
from clips import HEIGHT, WIDTH, draw_scene
from gap import HeldOut
from latents import FIRST_TRAINING_SEED, Latents
from loop import load_average, train
from optimizer import make_optimizers
from torch import Tensor, nn
from train_vae import FOLDER

from exvideo_train.models.cogvideox import published, weights
from exvideo_train.models.cogvideox.network import CogVideoXDiT
from exvideo_train.models.cogvideox.objective import alphas_cumprod
from exvideo_train.models.noise_levels import NoiseLevels, denoising_loss
from exvideo_train.randomness import generator_for
from exvideo_train.training.draws import draw

SIZE = {
    "attention_head_dim": 32,
    "max_text_seq_length": TEXT_LENGTH,
    "num_attention_heads": 4,
    "num_layers": 6,
    "sample_height": HEIGHT // 8,
    "sample_width": WIDTH // 8,
    "text_embed_dim": TEXT_CHANNELS,
    "time_embed_dim": 128,
}
CAPTION_DROPOUT = 0.1
SEED = 0
# Held-out clips behind the curve; `gap.py` measures with more.
SCORED_CLIPS = 16


def transformer_config(positions: str, num_frames: int) -> dict[str, object]:
    """``transformer/config.json``: CogVideoX-2B's kind of positions for sincos, 5B's for rotary."""
    mould = published.TRANSFORMER_5B if positions == "rotary" else published.TRANSFORMER_2B
    return {**mould, **SIZE, "sample_frames": num_frames}


def make_dit(config: dict[str, object]) -> CogVideoXDiT:
    """Modulation and output begin at zero, so that every block begins as the identity (DiT, arXiv 2212.09748)."""
    torch.manual_seed(SEED)
    model = CogVideoXDiT(weights.config_from_fields(config, "the tiny model"))
    for name, parameter in model.named_parameters():
        if name.startswith("proj_out.") or ".norm1.linear." in name or ".norm2.linear." in name:
            nn.init.zeros_(parameter)
    return model


class Objective:
    """The loss of a step."""

    def __init__(self, folder: Path, num_clips: int, num_frames: int, batch_size: int) -> None:
        self.batch_size = batch_size
        self.latents = Latents(folder, folder / "latents", FIRST_TRAINING_SEED, num_clips, num_frames)
        text = embed(folder, ["", *all_captions()])
        self.empty = text[""]
        self.text = [text[draw_scene(FIRST_TRAINING_SEED + number).caption] for number in range(num_clips)]
        self.levels = NoiseLevels.v_prediction(alphas_cumprod(published.SCHEDULER_5B))

    def loss(self, model: nn.Module, step: int) -> Tensor:
        """Of the step's batch; a function of its number."""
        numbers = torch.randint(len(self.latents), (self.batch_size,), generator=generator_for(SEED, "clips", step))
        latents, noise, rows, text = [], [], [], []
        for place, number in enumerate(numbers.tolist()):
            position = step * self.batch_size + place
            drawn = draw(SEED, position, self.latents.shape_TCHW, len(self.levels), CAPTION_DROPOUT)
            latents.append(self.latents.sample(number, drawn.posterior_noise_TCHW))
            noise.append(drawn.noise_TCHW)
            rows.append(drawn.row)
            text.append(self.empty if drawn.drop_condition else self.text[number])
        conditions = {"text_BLC": torch.stack(text)}
        return denoising_loss(
            model, self.levels, torch.stack(latents), torch.stack(noise), torch.tensor(rows), conditions
        ).mean


def main() -> None:
    """Entry of ``python examples/tiny/train_dit.py``."""
    parser = argparse.ArgumentParser(
        description="Train a tiny model's DiT; goes on where it was stopped.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where vae/ is and everything is kept")
    parser.add_argument("--positions", choices=("sincos", "rotary"), default="sincos", help="2B's kind or 5B's")
    parser.add_argument("--frames", type=int, default=49, help="8k+1 video frames at 8 a second")
    parser.add_argument("--steps", type=int, default=12_000, help="optimizer steps in all")
    parser.add_argument("--clips", type=int, default=2048, help="rendered clips to train on")
    parser.add_argument("--batch-size", type=int, default=8, help="clips a step")
    parser.add_argument("--score-steps", type=int, default=1000, help="steps between held-out losses")
    parser.add_argument("--write-now", action="store_true", help="write the model of the last state and stop")
    options = parser.parse_args()
    folder, name = options.folder, f"{options.positions}_{options.frames}"
    write_text_encoder(folder)
    config = transformer_config(options.positions, options.frames)
    model = make_dit(config)
    training = folder / f"{name}_training"
    if options.write_now:
        print(f"{folder / name} of step {load_average(training, model)}")
    else:
        objective = Objective(folder, options.clips, options.frames, options.batch_size)
        held_out = HeldOut(folder, folder / "latents", SCORED_CLIPS)
        matrices = {name for name, _ in model.named_parameters() if ".attn1.to_" in name or ".ff.net." in name}
        matrices = {name for name in matrices if name.endswith("weight")}
        train(
            model,
            make_optimizers(model, 5e-3, 1e-3, matrices),
            lambda step: objective.loss(model, step),
            num_steps=options.steps,
            folder=training,
            score=lambda network: held_out.summary(network, objective.levels),
            score_steps=options.score_steps,
            ema_decay=0.998,
        )
    write_model(folder, folder / name, model, config)


if __name__ == "__main__":
    main()
