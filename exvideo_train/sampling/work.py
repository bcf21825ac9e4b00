"""A list of videos, shared among the GPUs of a machine and among commands: each takes the next that nobody has.

A process claims a video by a lock beside it (:mod:`exvideo_train.locks`), so that commands on other machines, started
on the same output folder, take part without knowing of each other. What a dead process had claimed is free again.
Between the command and its processes, one a device, go

    ("steps", number)        so many denoising steps are done
    ("video", path, fault)   a video is written
    ("elsewhere",)           another process has made it, or is making it
    ("note", text)           what the user should know
    ("finished",)            nothing is left to be claimed
    ("error", text)          what the user can repair; ends the process
"""

from __future__ import annotations

import multiprocessing
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from exvideo_train import locks
from exvideo_train.clips.workers import exit_with_parent
from exvideo_train.errors import UserError
from exvideo_train.sampling.output import REMEDY, VideoFiles, compare_variants, comparison_files, make_record
from exvideo_train.sampling.pipeline import Sampler, Sampling
from exvideo_train.sampling.requests import VideoRequest
from exvideo_train.sampling.variants import Variant
from exvideo_train.terminal import escaped

# In a log file the bar's lines stack up: one every half minute is enough there.
SECONDS_BETWEEN_LINES = 30.0
Message = tuple[Any, ...]


@dataclass(frozen=True)
class Job:
    """The videos of one command.

    Args:
        model: as the user named it.
        requests: one video of every variant each.
        keep_latents: beside the videos.
        overwrite: videos that were made otherwise.
    """

    sampling: Sampling
    model: str
    requests: tuple[VideoRequest, ...]
    output: Path
    keep_latents: bool = False
    overwrite: bool = False

    def videos(self) -> Iterator[tuple[VideoRequest, Variant, VideoFiles, dict[str, Any]]]:
        """Each video with its files and the record that it will have."""
        for request in self.requests:
            for variant in self.sampling.variants:
                record = make_record(self.sampling, self.model, request, variant)
                yield request, variant, VideoFiles(self.output / variant.name, request.stem), record

    def targets(self) -> Iterator[Path]:
        """All files that it may write."""
        for request, _, files, _ in self.videos():
            yield from (files.video, files.record, files.latents, *comparison_files(self.output, request.stem))

    def num_unfinished(self) -> int:
        """Videos that are not there yet.

        Raises:
            UserError: one is there, made otherwise.
        """
        return sum(not files.is_finished(record, self.overwrite) for _, _, files, record in self.videos())


def make_videos(job: Job, device: str, tell: Callable[[Message], None]) -> None:
    """Make on one device whatever nobody else makes.

    Raises:
        UserError: a part of the model does not fit, or a file cannot be written.
    """
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    unfinished = [video for video in job.videos() if not video[2].is_finished(video[3], job.overwrite)]
    sampler: Sampler | None = None
    for request, variant, files, record in unfinished:
        with _claimed(files, record, job.overwrite) as is_mine:
            if is_mine and sampler is None:
                requests = list(dict.fromkeys(video[0] for video in unfinished))
                sampler = Sampler(job.sampling, torch.device(device), requests, lambda text: tell(("note", text)))
            if is_mine:
                assert sampler is not None
                _make_one(sampler, job, request, variant, files, record, tell)
                compare_variants(job.output, job.sampling.variants, request)
            else:
                tell(("elsewhere",))


def _make_one(
    sampler: Sampler,
    job: Job,
    request: VideoRequest,
    variant: Variant,
    files: VideoFiles,
    record: dict[str, Any],
    tell: Callable[[Message], None],
) -> None:
    latents_TCHW = files.kept_latents(record)
    if latents_TCHW is None:
        latents_TCHW = sampler.draw(request, variant, lambda: tell(("steps", 1)))
        if job.keep_latents:
            files.write_latents(latents_TCHW, record)
    else:
        tell(("steps", job.sampling.sampler.num_inference_steps))
    fault = files.write_video(sampler.decode(latents_TCHW), record)
    tell(("video", str(files.video), fault))


@contextmanager
def _claimed(files: VideoFiles, record: dict[str, Any], overwrite: bool) -> Iterator[bool]:
    """Whether the video is this process's to make; nobody else makes it within."""
    try:
        with locks.hold(files.lock, f"output={files.video}", "it is left to it"):
            # Another process may have finished it since the list was read.
            yield not files.is_finished(record, overwrite)
    except locks.Held:
        yield False


def finish_up(job: Job) -> None:
    """What a process did not come to after its last video, being killed: its lock's end, and comparisons."""
    for _, _, files, _ in job.videos():
        if files.lock.exists() and files.record.exists():
            with suppress(locks.Held), locks.hold(files.lock, f"output={files.video}", "it is left to it"):
                pass
    for request in job.requests:
        compare_variants(job.output, job.sampling.variants, request)


def run_job(job: Job, devices: Sequence[str]) -> None:
    """Make all videos of a job on some devices, with one progress bar over everything.

    Raises:
        UserError: something that the user can repair; what is finished stays.
    """
    num_unfinished = job.num_unfinished()
    num_videos = len(job.requests) * len(job.sampling.variants)
    if num_unfinished < num_videos:
        print(f"{num_videos - num_unfinished} of {num_videos} videos are there already", flush=True)
    bar = _Bar(num_unfinished, job.sampling.sampler.num_inference_steps)
    try:
        if num_unfinished and len(devices) == 1:
            make_videos(job, devices[0], bar)
        elif num_unfinished:
            _run_processes(job, devices[:num_unfinished], bar)
    finally:
        bar.close()
    finish_up(job)
    if (num_left := job.num_unfinished()) > 0:
        print(
            f"note: another command is at work on {num_left} of the videos; the same command again looks for them",
            flush=True,
        )


class _Bar:
    """What devices tell, as one bar over all denoising steps and lines above it."""

    def __init__(self, num_videos: int, num_steps: int) -> None:
        self._num_steps = num_steps
        self._num_videos = num_videos
        self._num_made = 0
        self._notes: set[str] = set()
        interval = 0.5 if sys.stderr.isatty() else SECONDS_BETWEEN_LINES
        self._bar = tqdm(total=num_videos * num_steps, unit="step", mininterval=interval, disable=not num_videos)
        self._describe()

    def _describe(self) -> None:
        self._bar.set_description_str(f"{self._num_made}/{self._num_videos} videos", refresh=False)

    def __call__(self, message: Message) -> None:
        kind = message[0]
        if kind == "steps":
            self._bar.update(message[1])
        elif kind == "video":
            self._num_made += 1
            self._say(message[1], sys.stdout)
            if message[2]:
                self._say(f"warning: {message[1]}: {message[2]}; {REMEDY}", sys.stderr)
        elif kind == "elsewhere":
            self._num_videos -= 1
            self._bar.total -= self._num_steps
        elif kind == "note" and message[1] not in self._notes:
            self._notes.add(message[1])
            self._say(message[1], sys.stderr)
        self._describe()

    def _say(self, line: str, stream: Any) -> None:
        self._bar.clear()
        print(escaped(line), file=stream, flush=True)
        self._bar.refresh()

    def close(self) -> None:
        self._bar.close()


def _run_processes(job: Job, devices: Sequence[str], tell: Callable[[Message], None]) -> None:
    """One process a device until all have ended; one that dies leaves its video to the others.

    Raises:
        UserError: what a process met, once the others have done what they could.
    """
    context = multiprocessing.get_context("spawn")
    running: dict[Connection, tuple[str, Any]] = {}
    troubles: list[str] = []
    try:
        for device in devices:
            ours, theirs = context.Pipe()
            process = context.Process(target=_device_main, args=(theirs, job, device))
            process.start()
            theirs.close()
            running[ours] = (device, process)
        while running:
            for connection in wait(list(running)):
                assert isinstance(connection, Connection)
                device, process = running[connection]
                try:
                    message = connection.recv()
                except (EOFError, OSError):
                    process.join()
                    troubles.append(f"the process on {device} died (exit code {process.exitcode})")
                    tell(("note", f"warning: {troubles[-1]}; its video is left to the others"))
                    message = ("finished",)
                if message[0] == "error":
                    troubles.append(f"{device}: {message[1]}")
                if message[0] in ("error", "finished"):
                    del running[connection]
                else:
                    tell(message)
    finally:
        for _, process in running.values():
            process.kill()
            process.join()
    if troubles and job.num_unfinished():
        raise UserError("; ".join(dict.fromkeys(troubles)) + "; the same command again goes on")


def _device_main(connection: Connection, job: Job, device: str) -> None:
    """Main function of a device's process."""
    # Ctrl-C reaches the whole group of processes: the command decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    exit_with_parent()
    try:
        make_videos(job, device, connection.send)
        connection.send(("finished",))
    except UserError as error:
        connection.send(("error", str(error)))
