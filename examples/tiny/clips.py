"""Captioned clips from a seed: one coloured shape moves over a textured ground. Data for people without data.

Every clip is a function of its seed, at any length, size and rate that a model takes: what happens in frame n does not
depend on how many frames are drawn, so that a clip of 49 frames is the beginning of the clip of 129.

    python examples/tiny/clips.py FOLDER --clips 200 --seconds 16.2 --flawed 0.2

writes FOLDER/videos/clip_SEED.mp4 and FOLDER/metadata.jsonl in InternVid's format, which ``source=internvid`` reads.
Of the clips that ``--flawed`` asks for, each is too short, has a cut, stands still or goes black: work for the filters.

Axis letters: F video frames, H height, W width, C colour channel.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from exvideo_train.errors import UserError

Image = NDArray[np.floating]

# The canvas on which everything is laid out; other sizes show the same picture at another scale.
HEIGHT, WIDTH = 48, 64
FPS = 8.0

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (50, 80, 220),
    "yellow": (240, 220, 50),
    "white": (245, 245, 245),
    "purple": (150, 50, 170),
}
SHAPES = ("ball", "square", "triangle")
# What the words mean: see `positions`.
MOTIONS = ("sways", "bobs", "circles", "wanders")
GROUNDS: dict[str, tuple[tuple[int, int, int], tuple[int, int, int]]] = {
    "sand": ((205, 175, 120), (170, 135, 85)),
    "water": ((70, 130, 165), (35, 85, 125)),
    "grass": ((120, 165, 80), (75, 120, 50)),
    "bricks": ((165, 95, 75), (115, 110, 105)),
    "snow": ((215, 220, 230), (165, 180, 205)),
}
CAMERAS = {"still": 0.0, "left": -1.0, "right": 1.0}
# Of a clip's end: the share that is black in one that goes black.
BLACK_SHARE = 0.4
FLAWS = ("short", "cut", "still", "black")
# To the seed of what is seen after a cut.
CUT_TO = 1_000_003


@dataclass(frozen=True)
class Scene:
    """Everything about a clip, in pixels of the canvas and frames at `FPS`.

    Attributes:
        speed: of the shape along its path, pixels a frame.
        pan: of the ground under the camera, pixels a frame, signed.
        radius: of the circle around the shape.
        start_y, start_x: where the shape is at first, or where it circles around.
        heading: of the first step, or the first angle on the circle, in radians.
        period: of the ground's pattern, pixels.
        phase_y, phase_x: where the pattern begins.
    """

    colour: str
    shape: str
    motion: str
    ground: str
    camera: str
    speed: float
    pan: float
    radius: float
    start_y: float
    start_x: float
    heading: float
    period: float
    phase_y: float
    phase_x: float

    @property
    def caption(self) -> str:
        """What the clip shows, as its metadata say it."""
        return caption_of(self.colour, self.shape, self.motion, self.ground, self.camera)


def caption_of(colour: str, shape: str, motion: str, ground: str, camera: str) -> str:
    """Each word names one property, so that its meaning does not hang on the order of words."""
    moves = "stands still" if camera == "still" else f"moves {camera}"
    return f"a {colour} {shape} {motion} over {ground}, the camera {moves}"


def draw_scene(seed: int) -> Scene:
    """The scene of a seed; any two seeds give independent scenes."""
    rng = np.random.default_rng([20240621, seed])
    radius = float(rng.uniform(10.0, 12.0))
    motion, camera = str(rng.choice(MOTIONS)), str(rng.choice(list(CAMERAS)))
    return Scene(
        colour=str(rng.choice(list(COLOURS))),
        shape=str(rng.choice(SHAPES)),
        motion=motion,
        ground=str(rng.choice(list(GROUNDS))),
        camera=camera,
        speed=float(rng.uniform(0.7, 1.1)),
        pan=CAMERAS[camera] * float(rng.uniform(0.25, 0.45)),
        radius=radius,
        start_y=HEIGHT / 2 if motion in ("sways", "circles") else float(rng.uniform(radius, HEIGHT - radius)),
        start_x=float(rng.uniform(radius + 11, WIDTH - radius - 11)),
        heading=float(rng.uniform(0, 2 * np.pi)),
        period=float(rng.uniform(16.0, 24.0)),
        phase_y=float(rng.uniform(0, 24)),
        phase_x=float(rng.uniform(0, 24)),
    )


def positions(scene: Scene, times: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Rows and columns of the shape's centre at ``times``, counted in frames at `FPS`."""
    travelled = scene.speed * times
    if scene.motion == "circles":
        orbit = HEIGHT / 2 - scene.radius
        angle = scene.heading + travelled / orbit
        return scene.start_y + orbit * np.sin(angle), scene.start_x + orbit * np.cos(angle)
    heading = {"sways": 0.0, "bobs": np.pi / 2}.get(scene.motion, scene.heading)
    sign = 1.0 if scene.heading < np.pi else -1.0
    rows = _between_walls(scene.start_y + sign * travelled * np.sin(heading), scene.radius, HEIGHT - scene.radius)
    columns = _between_walls(scene.start_x + sign * travelled * np.cos(heading), scene.radius, WIDTH - scene.radius)
    return rows, columns


def _between_walls(straight: NDArray[np.float64], low: float, high: float) -> NDArray[np.float64]:
    """A straight path, reflected where it meets a wall."""
    folded = (straight - low) % (2 * (high - low))
    return low + np.minimum(folded, 2 * (high - low) - folded)


def render(
    scene: Scene, num_frames: int, height: int = HEIGHT, width: int = WIDTH, fps: float = FPS, first: int = 0
) -> NDArray[np.uint8]:
    """Frames_FHWC, uint8 RGB, of ``num_frames / fps`` seconds of the scene, from frame ``first`` at `FPS` on."""
    rows = (np.arange(height, dtype=np.float32) + 0.5) * HEIGHT / height
    columns = (np.arange(width, dtype=np.float32) + 0.5) * WIDTH / width
    y, x = np.meshgrid(rows, columns, indexing="ij")
    times = first + np.arange(num_frames, dtype=np.float64) * FPS / fps
    centre_rows, centre_columns = positions(scene, times)
    edge = WIDTH / width
    colour = np.array(COLOURS[scene.colour], np.float32)
    frames = np.empty((num_frames, height, width, 3), np.uint8)
    for number in range(num_frames):
        ground = _ground(scene, y, x + np.float32(scene.pan * times[number]))
        distance = _distance(scene.shape, y - centre_rows[number], x - centre_columns[number], scene.radius)
        covered = np.clip(0.5 - distance / edge, 0, 1)[..., None]
        # A darker rim: without it a white ball on snow has no outline.
        rim = np.clip(1.0 - np.abs(distance + 1.0) / 1.5, 0, 1)[..., None]
        frames[number] = np.rint(ground * (1 - covered) + colour * (1 - 0.55 * rim) * covered)
    return frames


def _distance(shape: str, dy: Image, dx: Image, radius: float) -> Image:
    """Pixels outside of the shape's outline, negative inside."""
    if shape == "ball":
        return np.hypot(dy, dx) - radius
    if shape == "square":
        return np.maximum(np.abs(dy), np.abs(dx)) - 0.8 * radius
    # A triangle that stands on its side.
    return np.maximum(dy - 0.6 * radius, (0.866 * np.abs(dx) - 0.5 * dy) - 0.5 * radius)


def _ground(scene: Scene, y: Image, x: Image) -> Image:
    """Ground_HWC in levels 0..255."""
    turn = np.float32(2 * np.pi / scene.period)
    row, column = turn * (y + scene.phase_y), turn * (x + scene.phase_x)
    if scene.ground == "sand":
        pattern = np.sin(row + column)
    elif scene.ground == "water":
        pattern = np.sin(1.5 * row + 0.8 * np.sin(column))
    elif scene.ground == "grass":
        pattern = np.sin(1.2 * column) * np.cos(1.2 * row)
    elif scene.ground == "bricks":
        odd = np.floor(row / np.pi) % 2
        joints = np.maximum(np.abs(np.cos(row)) ** 8, np.abs(np.cos(column / 1.0 + odd * np.pi / 2)) ** 8)
        pattern = 2 * joints - 1
    else:
        pattern = np.sin(column + 0.7 * np.sin(0.5 * row)) * 0.7
    low, high = (np.array(level, np.float32) for level in GROUNDS[scene.ground])
    share = (0.5 + 0.5 * pattern)[..., None]
    return np.asarray(low * (1 - share) + high * share, np.float32)


def draw_flaw(seed: int, share: float) -> str | None:
    """What is wrong with the clip of a seed, if anything: one of `FLAWS` in ``share`` of all seeds."""
    rng = np.random.default_rng([20240622, seed])
    return str(rng.choice(FLAWS)) if rng.random() < share else None


def render_flawed(
    seed: int, flaw: str | None, num_frames: int, height: int = HEIGHT, width: int = WIDTH, fps: float = FPS
) -> NDArray[np.uint8]:
    """Frames_FHWC of the clip of a seed with a flaw of `FLAWS`, or none."""
    scene = draw_scene(seed)
    if flaw == "short":
        return render(scene, max(1, num_frames // 3), height, width, fps)
    if flaw == "still":
        return np.repeat(render(scene, 1, height, width, fps), num_frames, axis=0)
    frames_FHWC = render(scene, num_frames, height, width, fps)
    if flaw == "cut":
        frames_FHWC[num_frames // 2 :] = render(draw_scene(seed + CUT_TO), num_frames, height, width, fps)[
            num_frames // 2 :
        ]
    elif flaw == "black":
        frames_FHWC[round((1 - BLACK_SHARE) * num_frames) :] = 0
    return frames_FHWC


def write_clips(
    folder: Path, seeds: Sequence[int], seconds: float, height: int, width: int, fps: float, flawed: float = 0.0
) -> Path:
    """Write ``videos/clip_SEED.mp4`` for each seed and ``metadata.jsonl``, whose path it returns.

    Args:
        seconds: length of each clip.
        fps: frames a second of the files.
        flawed: share of clips that have a flaw.
    """
    from tqdm import tqdm

    from exvideo_train.files import atomic_write_text
    from exvideo_train.sampling.video import write_mp4

    lines = []
    for seed in tqdm(seeds, "writing clips", unit="clip"):
        name = f"clip_{seed:06d}"
        frames_FHWC = render_flawed(seed, draw_flaw(seed, flawed), round(seconds * fps), height, width, fps)
        write_mp4(folder / "videos" / f"{name}.mp4", frames_FHWC, fps)
        row = {
            "YoutubeID": name,
            "Start_timestamp": _timestamp(0),
            "End_timestamp": _timestamp(len(frames_FHWC) / fps),
            "Caption": draw_scene(seed).caption,
            "Aesthetic_Score": 5.0,
            "UMT_Score": 0.4,
        }
        lines.append(json.dumps(row) + "\n")
    metadata = folder / "metadata.jsonl"
    atomic_write_text(metadata, "".join(lines))
    return metadata


def _timestamp(seconds: float) -> str:
    minutes, rest = divmod(seconds, 60)
    hours, minutes = divmod(int(minutes), 60)
    return f"{hours:02d}:{minutes:02d}:{rest:06.3f}"


def main() -> int:
    """Entry of ``python examples/tiny/clips.py``."""
    parser = argparse.ArgumentParser(
        description="Write a data set of captioned clips in InternVid's format: one shape moves over a ground.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("folder", type=Path, help="where to write videos/ and metadata.jsonl")
    parser.add_argument("--clips", type=int, default=100, help="number of clips")
    parser.add_argument(
        "--seconds", type=float, default=16.2, help="length of each clip; 129 frames at 8 fps need 16.1"
    )
    parser.add_argument("--height", type=int, default=96, help="pixels, even")
    parser.add_argument("--width", type=int, default=128, help="pixels, even")
    parser.add_argument("--fps", type=float, default=16.0, help="frames a second of the files")
    parser.add_argument("--first-seed", type=int, default=0, help="seed of the first clip; each next one's is one more")
    parser.add_argument(
        "--flawed", type=float, default=0.0, help="share of clips that are short, cut, still or partly black"
    )
    options = parser.parse_args()
    if options.clips < 1 or round(options.seconds * options.fps) < 1 or not 0 <= options.flawed <= 1:
        parser.error("--clips and --seconds must be positive, --flawed from 0 to 1")
    seeds = range(options.first_seed, options.first_seed + options.clips)
    size = options.height, options.width
    try:
        print(write_clips(options.folder, seeds, options.seconds, *size, options.fps, options.flawed))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
