"""The whole road in minutes, on a CPU: a clip goes in, a 129-frame adapter and its videos come out. ``make demo``.

Writes a tiny CogVideoX with random weights and runs the five commands on it as anyone would, from the repository's
folder. With random weights the videos are coloured noise: the demo shows that the road is open, not where it leads.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
VIDEOS = REPOSITORY / "examples" / "clips"
# The clip has 132 frames at 25 a second: 129 of them fit in four ways.
FRAME_SECONDS = 1 / 25
NUM_SPANS = 4
SPAN_SECONDS = 129 * FRAME_SECONDS
CAPTIONS = [
    "A large white rabbit steps out of its burrow and stretches in the morning sun.",
    "Big Buck Bunny wakes up on a green meadow; trees and blue sky behind him.",
]
PROMPT = "A large white rabbit stands on a green meadow, looks around, and yawns."


def write_metadata(path: Path) -> None:
    """InternVid's format: one JSON line a span, the video named by its ``YoutubeID``."""
    with open(path, "w") as stream:
        for index in range(NUM_SPANS):
            start = index * FRAME_SECONDS
            row = {
                "YoutubeID": "bigbuckbunny",
                "Start_timestamp": timestamp(start),
                "End_timestamp": timestamp(start + SPAN_SECONDS),
                "Caption": CAPTIONS[index % len(CAPTIONS)],
                "Aesthetic_Score": 5.5,
                "UMT_Score": 0.4,
            }
            stream.write(json.dumps(row) + "\n")


def timestamp(seconds: float) -> str:
    return f"00:00:{seconds:06.3f}"


def num_ranks() -> int:
    """Two where two can run, to show gradients and optimizer states sharded."""
    import torch

    return min(2, torch.cuda.device_count() or os.cpu_count() or 1)


def run(command: str) -> float:
    """Print a command, run it, and return its seconds; ends the demo when it fails."""
    print(f"\n$ {command}", flush=True)
    started = time.monotonic()
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    # One thread a process: two ranks on few cores would wait for each other's threads.
    environment.setdefault("OMP_NUM_THREADS", "1")
    status = subprocess.run(shlex.split(command), cwd=REPOSITORY, env=environment, check=False).returncode
    if status:
        sys.exit(f"the demo stopped: status {status} of: {command}")
    return time.monotonic() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", default="demo", help="where everything is written, relative to the repository")
    parser.add_argument("--ranks", type=int, help="training processes; unset takes two where two can run")
    options = parser.parse_args()
    folder = options.folder
    absolute = REPOSITORY / folder
    for part in ("latents", "run", "videos"):
        shutil.rmtree(absolute / part, ignore_errors=True)
    absolute.mkdir(parents=True, exist_ok=True)
    write_metadata(absolute / "metadata.jsonl")

    at, videos = shlex.quote(folder), shlex.quote(str(VIDEOS.relative_to(REPOSITORY)))
    exp = "+exp=demo" if folder == "demo" else f"+exp=demo model.path={at}/model"
    ranks = options.ranks or num_ranks()
    commands = {
        "a tiny CogVideoX, random weights": f"python -m exvideo_train.models.cogvideox.tiny {at}/model",
        "videos and captions -> clips": (
            f"python data_prep/build_manifest.py source=internvid metadata={at}/metadata.jsonl videos={videos} "
            f"manifest={at}/clips.jsonl"
        ),
        "clips -> latents": f"python data_prep/encode_latents.py {exp} manifest={at}/clips.jsonl latents={at}/latents",
        f"latents -> adapter, {ranks} ranks": (
            f"deepspeed --num_gpus {ranks} launch/train.py {exp} latents={at}/latents run_dir={at}/run"
        ),
        "adapter -> diffusers": (
            f"python -m exvideo_train.export run_dir={at}/run format=diffusers adapter={at}/adapter.safetensors"
        ),
        "adapter -> DiffSynth": (
            f"python -m exvideo_train.export run_dir={at}/run format=diffsynth "
            f"adapter={at}/adapter_diffsynth.safetensors"
        ),
        "prompt -> videos with and without the adapter": (
            f"python -m exvideo_train.sample {exp} adapter={at}/adapter.safetensors prompt={shlex.quote(PROMPT)} "
            f"compare=true output={at}/videos"
        ),
    }
    seconds = {step: run(command) for step, command in commands.items()}

    print(f"\nDone in {sum(seconds.values()):.0f} seconds:")
    for step, taken in seconds.items():
        print(f"  {taken:5.0f} s  {step}")
    print("\nWhat came out:")
    (with_adapter,) = (absolute / "videos" / "with_adapter").glob("*.mp4")
    for label, path in (
        ("adapter, diffusers and PEFT", absolute / "adapter.safetensors"),
        ("adapter, DiffSynth", absolute / "adapter_diffsynth.safetensors"),
        ("video with the adapter", with_adapter),
        ("video without it, same noise", absolute / "videos" / "without_adapter" / with_adapter.name),
        ("side by side", absolute / "videos" / "side_by_side" / with_adapter.name),
        ("the run: metrics, checkpoints", absolute / "run"),
    ):
        if not path.exists():
            sys.exit(f"the demo stopped: {path} was not written")
        print(f"  {label:30s} {path}")


if __name__ == "__main__":
    main()
