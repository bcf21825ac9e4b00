"""Commands run one after another in one process, which spares each the seconds of importing torch.

``python -m golden.commands < JOBS.json``, where JOBS is a list of command lines; prints a JSON list of what each gave:
status, stdout, stderr, and the latents that went into the VAE's decoder with the frames that came out of it. That is
the one thing that no file holds; it is taken from diffusers' class, not from ours.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import runpy
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]


def run_commands(commands: Sequence[Sequence[str]], folder: Path) -> list[dict[str, Any]]:
    """Run commands in one new process, in ``folder``; a first word that ends in .py is a script of the repository."""
    process = subprocess.run(
        [sys.executable, "-m", "golden.commands"],
        input=json.dumps([list(command) for command in commands]),
        cwd=folder,
        env=environment(),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=1800,
    )
    results: list[dict[str, Any]] = json.loads(process.stdout)
    return results


def environment() -> dict[str, str]:
    """For processes on the CPU that import this checkout."""
    ours = ("PYTEST", "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    return {
        **kept,
        "PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests")]),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "WANDB_MODE": "offline",
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
    }


@contextlib.contextmanager
def decoder_watched(found: list[dict[str, Any]]) -> Iterator[None]:
    """Note what diffusers' decoder decodes: a video in chunks, the first of which has no cache."""
    import torch
    from diffusers.models.autoencoders.autoencoder_kl_cogvideox import CogVideoXDecoder3D

    from golden.contents import tensor

    forward = CogVideoXDecoder3D.forward
    videos: list[list[tuple[Any, Any]]] = []

    def watched(self: Any, sample: Any, temb: Any = None, conv_cache: Any = None) -> Any:
        frames, cache = forward(self, sample, temb, conv_cache)
        if not conv_cache:
            videos.append([])
        videos[-1].append((sample, frames))
        return frames, cache

    CogVideoXDecoder3D.forward = watched
    try:
        yield
    finally:
        CogVideoXDecoder3D.forward = forward
        for chunks in videos:
            latents, frames = (torch.cat(parts, dim=2) for parts in zip(*chunks, strict=True))
            found.append({"latents": tensor(latents), "frames": tensor(frames)})


def _run(command: list[str]) -> dict[str, Any]:
    out, err = io.StringIO(), io.StringIO()
    decoded: list[dict[str, Any]] = []
    watch = "exvideo_train.sample" in command
    arguments, status = sys.argv, 0
    try:
        with (
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            decoder_watched(decoded) if watch else contextlib.nullcontext(),
        ):
            try:
                if command[0] == "-m":
                    sys.argv = command[1:]
                    runpy.run_module(command[1], run_name="__main__", alter_sys=True)
                else:
                    script = str(REPOSITORY / command[0])
                    sys.argv = [script, *command[1:]]
                    runpy.run_path(script, run_name="__main__")
            except SystemExit as end:
                status = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    finally:
        sys.argv = arguments
    result: dict[str, Any] = {"command": command, "status": status, "stdout": out.getvalue(), "stderr": err.getvalue()}
    return {**result, "decoded": decoded} if watch else result


if __name__ == "__main__":
    from exvideo_train.training import interruption

    # A rank ends its process; here the next command still needs it.
    interruption.end_process_after = lambda main: main()
    jobs = json.load(sys.stdin)
    # Whatever a library prints must not come between the JSON.
    answer = os.dup(1)
    os.dup2(2, 1)
    results = [_run(job) for job in jobs]
    with os.fdopen(answer, "w") as stream:
        json.dump(results, stream)
