"""What a frame of the tiny world shows, read by a small network: colour, shape, ground, camera, place and motion.

    python examples/tiny/probe.py train
    python examples/tiny/probe.py accuracy --model MODEL
    python examples/tiny/probe.py read VIDEOS --variant with_adapter

It looks at two frames half a second apart. ``accuracy`` says how much of real clips it reads, as drawn and through a
model's VAE: the most that a generated video can be given. ``read`` says in how many frames of sampled videos the probe
sees what the prompt asks for, and how fast the shape moves.

Axis letters: B batch, F video frames, H height, W width, C colour channel.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from clips import CAMERAS, COLOURS, FPS, GROUNDS, HEIGHT, SHAPES, WIDTH, Scene, draw_scene, positions, render
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor, nn

from exvideo_train.errors import UserError
from exvideo_train.tensor_files import atomic_save_safetensors

WEIGHTS = Path(__file__).resolve().parent / "weights" / "probe.safetensors"
# Half a second, in frames of 8 a second.
APART = 4
WORDS: dict[str, list[str]] = {
    "colour": list(COLOURS),
    "shape": list(SHAPES),
    "ground": list(GROUNDS),
    "camera": list(CAMERAS),
}
# Seeds of scenes: others than those of the models, of adapters and of held-out clips.
FIRST_TRAINING_SEED, FIRST_HELD_OUT_SEED = 30_000_000, 40_000_000
NUM_FRAMES = 129
# Of the base's length, and of what comes after it.
SPANS = {"0-48": (0, 49), "49-88": (49, 89), "89-124": (89, NUM_FRAMES - APART)}


class Probe(nn.Module):
    """Words by name, and place and motion, of pairs of frames."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in ((6, 32), (32, 64), (64, 64)):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.GroupNorm(8, after), nn.SiLU()]
        features = 64 * (HEIGHT // 8) * (WIDTH // 8)
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(features, 128), nn.SiLU())
        self.words = nn.ModuleDict({name: nn.Linear(128, len(words)) for name, words in WORDS.items()})
        # Row and column of the centre, then pixels a frame of both, in tens of pixels of the canvas.
        self.place = nn.Linear(128, 4)

    def forward(self, pairs_BCHW: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Logits by name, and place_B4.

        Args:
            pairs_BCHW: a frame and the one half a second later, six channels in [-1, 1].
        """
        features = self.body(pairs_BCHW)
        return {name: head(features) for name, head in self.words.items()}, self.place(features)


@dataclass(frozen=True)
class Readings:
    """What the probe reads in a video's frames but the last `APART`.

    Attributes:
        words: by name the index of the word seen in each frame.
        centre_F2: row and column, pixels of the canvas.
        motion_F2: pixels a frame.
    """

    words: dict[str, NDArray[np.int64]]
    centre_F2: NDArray[np.float64]
    motion_F2: NDArray[np.float64]


def read(probe: Probe, frames_FHWC: NDArray[np.uint8]) -> Readings:
    """Look at every frame together with that of half a second later."""
    with torch.no_grad():
        logits, place_B4 = probe(pairs_of(torch.from_numpy(frames_FHWC)))
    words = {name: value.argmax(1).numpy() for name, value in logits.items()}
    place = place_B4.double().numpy() * 10
    return Readings(words, place[:, :2], place[:, 2:] / APART)


def pairs_of(frames_FHWC: Tensor, apart: int = APART) -> Tensor:
    """Every frame but the last with its later one, as the probe takes them."""
    frames_FCHW = frames_FHWC.permute(0, 3, 1, 2).float() / 127.5 - 1
    return torch.cat([frames_FCHW[:-apart], frames_FCHW[apart:]], dim=1)


def truth(scene: Scene, first: int, count: int) -> tuple[dict[str, Tensor], Tensor]:
    """Targets of the frames from ``first`` on: word indices by name, and place_F4."""
    times = np.arange(first, first + count, dtype=np.float64)
    here, later = (np.stack(positions(scene, moment), axis=1) for moment in (times, times + APART))
    place = torch.from_numpy(np.concatenate([here, later - here], axis=1) / 10).float()
    return {name: torch.full((count,), words.index(getattr(scene, name))) for name, words in WORDS.items()}, place


def training_batch(step: int, size: int) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """Pairs from scenes of their own, blurred, dimmed and noisy as what comes out of a VAE may be."""
    rng, generator = np.random.default_rng(step), torch.Generator().manual_seed(step)
    pairs, words, places = [], [], []
    for number in range(size):
        scene = draw_scene(FIRST_TRAINING_SEED + step * size + number)
        time = int(rng.integers(NUM_FRAMES))
        here_and_later = torch.from_numpy(render(scene, 2, fps=FPS / APART, first=time))
        pairs.append(pairs_of(here_and_later, apart=1)[0])
        of_words, place = truth(scene, time, 1)
        words.append(of_words)
        places.append(place)
    batch = torch.stack(pairs)
    for number in range(size):
        if rng.random() < 0.5:
            width = int(rng.choice([3, 5]))
            batch[number] = F.avg_pool2d(batch[number], width, 1, width // 2, count_include_pad=False)
    gain = 1 + 0.1 * torch.randn(size, 6, 1, 1, generator=generator).clamp(-2, 2)
    noise = torch.rand(size, 1, 1, 1, generator=generator) * 0.15 * torch.randn(batch.shape, generator=generator)
    targets = {name: torch.cat([of[name] for of in words]) for name in WORDS}
    return batch * gain + noise, targets, torch.cat(places)


def train_probe(num_steps: int, batch_size: int = 64) -> Probe:
    """A fresh probe, trained; prints its loss."""
    torch.manual_seed(0)
    probe = Probe()
    optimizer = torch.optim.AdamW(probe.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, num_steps, pct_start=0.1)
    for step in range(num_steps):
        pairs, targets, place = training_batch(step, batch_size)
        logits, seen = probe(pairs)
        losses = {name: F.cross_entropy(logits[name], target) for name, target in targets.items()}
        losses["place"] = F.smooth_l1_loss(seen, place) * 10
        optimizer.zero_grad()
        torch.stack(list(losses.values())).sum().backward()
        optimizer.step()
        schedule.step()
        if (step + 1) % 100 == 0:
            figures = "  ".join(f"{name} {loss.item():.3f}" for name, loss in losses.items())
            print(f"step {step + 1}/{num_steps}  {figures}", flush=True)
    return probe.eval()


def load_probe() -> Probe:
    """The kept probe."""
    probe = Probe()
    probe.load_state_dict(load_file(WEIGHTS))
    return probe.eval()


def accuracy(probe: Probe, videos: Sequence[NDArray[np.uint8]], scenes: Sequence[Scene]) -> dict[str, dict[str, float]]:
    """By name of what is read, and by span of frames: the share read rightly, or the error in pixels."""
    table: dict[str, dict[str, float]] = {}
    readings = [read(probe, video) for video in videos]
    for span, (begin, end) in SPANS.items():
        for name, words in WORDS.items():
            right = [
                np.mean(reading.words[name][begin:end] == words.index(getattr(scene, name)))
                for reading, scene in zip(readings, scenes, strict=True)
            ]
            table.setdefault(name, {})[span] = float(np.mean(right))
        centres, motions = [], []
        for reading, scene in zip(readings, scenes, strict=True):
            place = truth(scene, begin, end - begin)[1].numpy() * 10
            centres.append(np.abs(reading.centre_F2[begin:end] - place[:, :2]).mean())
            motions.append(np.abs(reading.motion_F2[begin:end] - place[:, 2:] / APART).mean())
        table.setdefault("place, pixels off", {})[span] = float(np.mean(centres))
        table.setdefault("motion, pixels a frame off", {})[span] = float(np.mean(motions))
    return table


def print_table(title: str, table: dict[str, dict[str, float]]) -> None:
    """A line for each thing that is read, a column for each span of frames."""
    print(f"{title:32s}" + "".join(f"{span:>10s}" for span in SPANS))
    for name, by_span in table.items():
        print(f"{name:32s}" + "".join(f"{value:10.3f}" for value in by_span.values()))


def through_vae(model: Path, video_FHWC: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """A clip encoded and decoded, from the posterior's mean."""
    from exvideo_train.models.cogvideox.encoders import VideoEncoder
    from exvideo_train.models.stages import decode_whole

    encoder = VideoEncoder(model, "cpu", torch.float32, tiling=False)
    mean_CTHW = encoder.encode(torch.from_numpy(video_FHWC)).chunk(2)[0]
    factor = torch.tensor(encoder.normalisation.factor_C).view(-1, 1, 1, 1)
    return decode_whole(encoder, (mean_CTHW * factor).transpose(0, 1)).numpy()


def print_accuracy(model: Path | None, num_clips: int) -> None:
    """Of clips that nothing was trained on, as drawn and through the model's VAE."""
    probe = load_probe()
    scenes = [draw_scene(FIRST_HELD_OUT_SEED + number) for number in range(num_clips)]
    videos = [render(scene, NUM_FRAMES) for scene in scenes]
    print_table("as drawn", accuracy(probe, videos, scenes))
    if model is not None:
        print_table("through the VAE", accuracy(probe, [through_vae(model, video) for video in videos], scenes))


def print_readings(folder: Path, variant: str) -> None:
    """How far sampled videos show what their prompts ask for."""
    from exvideo_train.evaluation.folders import find_videos
    from exvideo_train.evaluation.reading import Reading, read_frames

    probe = load_probe()
    figures: dict[str, dict[str, list[float]]] = {}
    found = find_videos("folder", folder, variant)
    for video in found:
        frames = [frame for _, frame in read_frames(str(video.path), Reading(FPS, (HEIGHT, WIDTH), 10_000))]
        seen = read(probe, np.stack(frames))
        prompt = video.prompt.replace(",", "").split()
        asked = {name: word for name, words in WORDS.items() if (word := asked_word(name, words, prompt))}
        for span, (begin, end) in SPANS.items():
            for name, word in asked.items():
                right = np.mean(seen.words[name][begin:end] == WORDS[name].index(word))
                figures.setdefault(name, {}).setdefault(span, []).append(float(right))
            speed = np.linalg.norm(seen.motion_F2[begin:end], axis=1).mean()
            figures.setdefault("speed, pixels a frame", {}).setdefault(span, []).append(float(speed))
    table = {name: {span: float(np.mean(values)) for span, values in by.items()} for name, by in figures.items()}
    print_table(f"{variant}, {len(found)} videos", table)


def asked_word(name: str, words: Sequence[str], prompt: Sequence[str]) -> str | None:
    """The one of ``words`` that a prompt names, in the captions' grammar."""
    if name == "camera":
        return next((word for word in words if list(prompt[-2:]) in (["moves", word], ["stands", word])), None)
    return next((word for word in words if word in prompt), None)


def main() -> int:
    """Entry of ``python examples/tiny/probe.py``."""
    parser = argparse.ArgumentParser(description="Train and use the probe of the tiny world.")
    actions = parser.add_subparsers(dest="action", required=True)
    train = actions.add_parser("train", help="train it and write its weights")
    train.add_argument("--steps", type=int, default=2000)
    measure = actions.add_parser("accuracy", help="how much of real clips it reads")
    measure.add_argument("--model", type=Path, help="a model in the published layout: read through its VAE too")
    measure.add_argument("--clips", type=int, default=32)
    show = actions.add_parser("read", help="how far sampled videos show what their prompts ask for")
    show.add_argument("folder", type=Path, help="output folder of exvideo_train.sample")
    show.add_argument("--variant", default="with_adapter", help="with_adapter or without_adapter")
    options: Any = parser.parse_args()
    try:
        if options.action == "train":
            probe = train_probe(options.steps)
            atomic_save_safetensors(WEIGHTS, {n: t.contiguous() for n, t in probe.state_dict().items()})
        elif options.action == "accuracy":
            print_accuracy(options.model, options.clips)
        else:
            print_readings(options.folder, options.variant)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
