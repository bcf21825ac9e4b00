"""How far a model keeps its word beyond the length that it was trained on: held-out loss by latent frame.

    python examples/tiny/gap.py MODEL --adapter none --adapter RUN/adapter.safetensors --csv gap.csv

The extension gap is the held-out loss of the latent frames beyond the base's 13 over that of its first 13, both of one
pass over 129 frames: 1 is a model to which later frames are like any. Every model is given the same clips, noise and
noise levels; intervals are 95 % of a bootstrap over clips.

Axis letters: N clips, B batch, T latent frames, C channel, H height, W width, L text tokens.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from captions import embed
from clips import draw_scene
from latents import FIRST_HELD_OUT_SEED, Latents
from numpy.typing import NDArray
from torch import nn
from train_vae import FOLDER

from exvideo_train.errors import UserError
from exvideo_train.extensions.lora import LoraExtension
from exvideo_train.files import atomic_write_text
from exvideo_train.models.cogvideox.objective import noise_levels
from exvideo_train.models.noise_levels import NoiseLevels, denoising_loss
from exvideo_train.models.registry import load_backbone
from exvideo_train.randomness import generator_for

NUM_FRAMES, BASE_LATENTS = 129, 13
TIMESTEPS = (125, 375, 625, 875)
SEED = 1
BASE = "none"


class HeldOut:
    """Clips of 129 frames that nothing was trained on.

    Args:
        model: folder with vae/, text_encoder/ and tokenizer/.
        cache: where encoded clips are kept.
    """

    def __init__(self, model: Path, cache: Path, num_clips: int) -> None:
        self.latents = Latents(model, cache, FIRST_HELD_OUT_SEED, num_clips, NUM_FRAMES)
        captions = [draw_scene(FIRST_HELD_OUT_SEED + number).caption for number in range(num_clips)]
        text = embed(model, sorted(set(captions)))
        self.text_NLC = torch.stack([text[caption] for caption in captions])

    @torch.no_grad()
    def losses(self, network: nn.Module, levels: NoiseLevels, num_latents: int) -> NDArray[np.float64]:
        """Loss_NT of each clip's first latent frames, the mean over `TIMESTEPS`."""
        rows_B, shape = torch.tensor(TIMESTEPS), self.latents.shape_TCHW
        losses = []
        for number in range(len(self.latents)):
            noises = [torch.randn(shape, generator=generator_for(SEED, f"{number}", row)) for row in TIMESTEPS]
            posterior = torch.randn(shape, generator=generator_for(SEED, "posterior", number))
            latents_TCHW = self.latents.sample(number, posterior)[:num_latents]
            loss = denoising_loss(
                network,
                levels,
                latents_TCHW.expand(len(TIMESTEPS), -1, -1, -1, -1),
                torch.stack(noises)[:, :num_latents],
                rows_B,
                {"text_BLC": self.text_NLC[number].expand(len(TIMESTEPS), -1, -1)},
            )
            losses.append(loss.per_position_BT.mean(0).double().numpy())
        return np.stack(losses)

    def summary(self, network: nn.Module, levels: NoiseLevels) -> dict[str, float]:
        """Loss of the base's length alone, and of 129 frames: within that length and beyond it."""
        short_NT = self.losses(network, levels, BASE_LATENTS)
        long_NT = self.losses(network, levels, self.latents.shape_TCHW[0])
        within, beyond = long_NT[:, :BASE_LATENTS].mean(), long_NT[:, BASE_LATENTS:].mean()
        return {"loss_49": float(short_NT.mean()), "within": float(within), "beyond": float(beyond),
                "gap": float(beyond / within)}  # fmt: skip


def gap_with_interval(loss_NT: NDArray[np.float64], num_draws: int = 2000) -> tuple[float, float, float]:
    """The extension gap and the ends of its interval."""
    sides_N2 = np.stack([loss_NT[:, :BASE_LATENTS].mean(1), loss_NT[:, BASE_LATENTS:].mean(1)], axis=1)
    chosen = np.random.default_rng(SEED).integers(len(sides_N2), size=(num_draws, len(sides_N2)))
    within, beyond = sides_N2[chosen].mean(1).T
    low, high = np.quantile(beyond / within, (0.025, 0.975))
    whole = sides_N2.mean(0)
    return float(whole[1] / whole[0]), float(low), float(high)


def load_network(model: Path, adapter: str) -> nn.Module:
    """The model's DiT in float32, with an adapter on it or, for ``none``, without."""
    network: nn.Module = load_backbone(model, torch.float32)
    if adapter != BASE:
        trained = LoraExtension.read(Path(adapter))
        trained.extension.place(network, "adapter", trained, torch.float32, adapter)
        trained.extension.choose(network, {"adapter": 1.0})
    return network.eval()


def draw_curves(path: Path, losses: dict[str, NDArray[np.float64]]) -> None:
    """Write a PNG of loss over latent frame, a line a model."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for name, loss_NT in losses.items():
        axes.plot(loss_NT.mean(0), label=f"{name}: gap {gap_with_interval(loss_NT)[0]:.3f}")
    axes.axvline(BASE_LATENTS - 0.5, color="grey", linestyle=":")
    axes.set(xlabel="latent frame", ylabel="held-out loss", ylim=(0, None))
    axes.legend()
    figure.savefig(path, dpi=110)


def main() -> int:
    """Entry of ``python examples/tiny/gap.py``."""
    parser = argparse.ArgumentParser(
        description="Held-out loss by latent frame and the extension gap, of a model with and without adapters."
    )
    parser.add_argument("model", type=Path, help="folder in the published layout")
    parser.add_argument(
        "--adapter",
        action="append",
        help=f"adapter file, {BASE} for the model itself; may be given again; default {BASE}",
    )
    parser.add_argument("--clips", type=int, default=64, help="held-out clips; default 64")
    parser.add_argument("--cache", type=Path, default=FOLDER / "latents", help="where encoded clips are kept")
    parser.add_argument("--csv", type=Path, help="file to write: a line a latent frame, a column a model")
    parser.add_argument("--png", type=Path, help="drawing to write")
    options = parser.parse_args()
    try:
        measure(options.model, options.adapter or [BASE], options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def measure(model: Path, adapters: list[str], options: argparse.Namespace) -> None:
    """Print the figures of each adapter, and write what is asked for."""
    held_out, levels = HeldOut(model, options.cache, options.clips), noise_levels(model)
    losses = {}
    print(f"{'':40s} {'49 frames':>10s} {'129: first 49':>14s} {'beyond':>7s}  gap [95 %]")
    for adapter in adapters:
        network = load_network(model, adapter)
        alone = held_out.losses(network, levels, BASE_LATENTS).mean()
        losses[adapter] = loss_NT = held_out.losses(network, levels, held_out.latents.shape_TCHW[0])
        within, beyond = loss_NT[:, :BASE_LATENTS].mean(), loss_NT[:, BASE_LATENTS:].mean()
        gap = "{:.3f} [{:.3f}, {:.3f}]".format(*gap_with_interval(loss_NT))
        print(f"{adapter[-40:]:40s} {alone:10.4f} {within:14.4f} {beyond:7.4f}  {gap}", flush=True)
    if options.csv:
        columns = [[f"{loss:.5f}" for loss in loss_NT.mean(0)] for loss_NT in losses.values()]
        rows = [["latent_frame", *losses], *zip(map(str, range(len(columns[0]))), *columns, strict=True)]
        atomic_write_text(options.csv, "".join(",".join(row) + "\n" for row in rows))
    if options.png:
        draw_curves(options.png, losses)


if __name__ == "__main__":
    sys.exit(main())
