"""Sample videos while training goes on: a process of its own, at low priority, that can fail without harm."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path

from exvideo_train.config.experiment import Experiment, plain_config
from exvideo_train.files import atomic_write_text
from exvideo_train.training.sample_measures import AT_LOW_PRIORITY, LOG_FILE, MEASURES_FILE, PROMPTS_FILE


class SampleProcess:
    """Starts ``python -m exvideo_train.sample`` for an adapter file; at most one at a time.

    Args:
        config: geometry, sampler and prompts of the experiment.
        run_dir: videos go to samples/step_N/ in it.
        log: told when videos are made, or why not.
        on_end: called with the folder when there will be no more videos in it.
    """

    def __init__(
        self,
        config: Experiment,
        run_dir: Path,
        log: Callable[[str], None],
        on_end: Callable[[Path], None] = lambda folder: None,
    ) -> None:
        self.config = config
        self.run_dir = run_dir
        self.log = log
        self.on_end = on_end
        self._process: subprocess.Popen[bytes] | None = None
        self._folder = run_dir

    def start(self, adapter: Path, captions: Sequence[str]) -> None:
        """Begin videos for an adapter; when the last ones are still being made these are left out, and that is said."""
        self.poll()
        prompts = self.config.validation.sample_prompts or list(captions)
        if self._process is not None or not prompts:
            why = "the last ones are not finished" if prompts else "validation.sample_prompts is empty"
            self.log(f"no sample videos for {adapter.parent.name}: {why}")
            return
        self._folder = adapter.parent
        # Of a run that went on from before this step: they would tell of other videos.
        (self._folder / MEASURES_FILE).unlink(missing_ok=True)
        prompts_file = self._folder / PROMPTS_FILE
        atomic_write_text(prompts_file, "".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
        log_file = open(self._folder / LOG_FILE, "wb")  # noqa: SIM115 (the child keeps it)
        self._process = subprocess.Popen(
            [*AT_LOW_PRIORITY, *self._command(adapter, prompts_file)],
            stdout=log_file,
            stderr=subprocess.STDOUT,
            env=environment(),
            start_new_session=True,
        )
        log_file.close()

    def _command(self, adapter: Path, prompts_file: Path) -> list[str]:
        # All that the run's options say about sampling, with the groups that it reads. The model as given, not the
        # folder that training resolved: sampling needs the text encoder and the VAE too.
        plain = plain_config(self.config)
        of_every_command = {option.name for option in fields(Experiment)}
        options = {name: plain[name] for name in of_every_command if not isinstance(plain[name], dict)}
        options |= {f"{group}.{name}": plain[group][name] for group in ("model", "memory") for name in plain[group]}
        options |= {
            "adapter": adapter,
            "prompts_file": prompts_file,
            "output": adapter.parent,
            "device": self.config.validation.sample_device,
            # A run that went back to a checkpoint comes by here again.
            "overwrite": True,
        }
        overrides = [f"{name}={'null' if value is None else value}" for name, value in options.items()]
        return [sys.executable, "-m", "exvideo_train.sample", *overrides]

    def poll(self) -> None:
        """Tell the outcome of a process that has ended."""
        if self._process is None or self._process.poll() is None:
            return
        if self._process.returncode == 0:
            self.log(f"sample videos: {self._folder}")
        else:
            self.log(f"sample videos failed (status {self._process.returncode}); see {self._folder / LOG_FILE}")
        self._process = None
        self.on_end(self._folder)

    def finish(self) -> None:
        """Wait for the videos under way, but not for ever: the run is over and may hold rented GPUs."""
        if self._process is None:
            return
        minutes = self.config.validation.sample_wait_minutes
        try:
            self._process.wait(60 * minutes)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self.log(f"sample videos given up {minutes:g} minutes after the end of training: {self._folder}")
            self._process = None
            self.on_end(self._folder)
        self.poll()


def environment() -> dict[str, str]:
    """Without the launcher's variables: the process is no rank."""
    launcher = (
        "RANK",
        "WORLD_SIZE",
        "LOCAL_RANK",
        "LOCAL_SIZE",
        "MASTER_ADDR",
        "MASTER_PORT",
        "CROSS_RANK",
        "CROSS_SIZE",
    )
    # The deepspeed launcher (which alone sets CROSS_RANK) shows its ranks the GPUs that train, and no other.
    hidden = (*launcher, "CUDA_VISIBLE_DEVICES") if "CROSS_RANK" in os.environ else launcher
    return {name: value for name, value in os.environ.items() if name not in hidden}
