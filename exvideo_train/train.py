"""``deepspeed launch/train.py``, and ``deepspeed --module exvideo_train.train`` for an installed package."""

from __future__ import annotations

import os
import sys

from exvideo_train.config.commands import Train
from exvideo_train.entry import run_command
from exvideo_train.training.interruption import end_process_after, find_launchers

USAGE = """\
Train a LoRA that extends a video diffusion model to longer videos, and export it.

  deepspeed launch/train.py +exp=129f latents=DIR run_dir=RUN

The same command again continues the run from its newest checkpoint. Exit status: 0 finished, 2 a mistake in options
or files, 75 interrupted after saving (run the same command again), 74 a rank died or hung.
On one GPU `python launch/train.py ...` does too; torchrun and srun work alike (docs/launch.md)."""


def train(config: Train) -> None:
    """Run the loop and exit with its status."""
    # Now: it may be killed while the imports below take their seconds.
    find_launchers()
    # Ranks of one machine share its cores; PyTorch would start a thread a core in each of them.
    num_local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", "1")))
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // num_local_ranks)))
    from exvideo_train.training.loop import run

    status = run(config)
    if status:
        sys.exit(status)


def main() -> None:
    end_process_after(lambda: run_command(Train, train, "train", USAGE))


if __name__ == "__main__":
    main()
