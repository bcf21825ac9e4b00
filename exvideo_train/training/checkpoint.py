"""Checkpoints: what is trained and nothing else, in safetensors and JSON, so that loading one can run no code.

    checkpoints/step_00000250/
        lora.safetensors            fp32 weights of what is trained (here a LoRA), published names
        exp_avg.safetensors         AdamW's moments, same names
        exp_avg_sq.safetensors
        ema.safetensors             if a moving average is kept
        metrics.jsonl               the run's records up to here
        state.json                  step, data position, counters, config, sha256 of each file and of these values

A folder appears under its name only when it is whole: it is written under a hidden name, flushed, then renamed. No
random state is stored because none lives across steps: noise, timesteps and caption dropout are functions of seed and
sample position, LoRA dropout of seed and step.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from exvideo_train.errors import UnreadableFile, UserError
from exvideo_train.files import open_regular, parse_json, read_regular, sha256_file, short
from exvideo_train.models.registry import FIRST_FAMILY
from exvideo_train.tensor_files import read_safetensors_header

FORMAT_VERSION = 1
STEP_NAME = re.compile(r"step_(\d{8,12})")
# What a state may be called besides the weights, whose file has the name of what is trained.
STATE_FILES = ("exp_avg.safetensors", "exp_avg_sq.safetensors", "ema.safetensors")
_WEIGHTS_NAME = re.compile(r"[a-z][a-z_]{0,40}\.safetensors")
_MAX_STATE_BYTES = 1 << 20
STATE_FILE = "state.json"
METRICS_FILE = "metrics.jsonl"
Log = Callable[[str], None]


@dataclass(frozen=True)
class TrainingState:
    """Everything about a run that is not a tensor.

    Attributes:
        step: optimizer steps finished, skipped updates included.
        position: samples consumed: the global position of the next one.
        num_updates: updates applied; step minus the skipped ones.
        num_skipped: updates skipped for non-finite gradients.
        config: the run's options as plain values.
        clips_sha256: of the geometries and ids of the training clips, on which the sample order depends.
        resumed_from: the checkpoint or run folder given as ``resume`` from which the run once began, else empty.
        family: of the model; the first one's is not written, as checkpoints were made before there were others.
    """

    step: int
    position: int
    num_updates: int
    num_skipped: int
    config: dict[str, Any]
    clips_sha256: str = ""
    resumed_from: str = ""
    family: str = FIRST_FAMILY

    def to_json(self) -> dict[str, Any]:
        content = asdict(self)
        if self.family == FIRST_FAMILY:
            del content["family"]
        return content


class CorruptCheckpoint(UserError):
    """A checkpoint that is incomplete, of another shape, not finite, or whose content differs from its checksums."""


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint on disk."""

    path: Path
    state: TrainingState

    def tensors(self, key: str) -> dict[str, Tensor]:
        """All tensors of one file, fp32 on the CPU. ``key``: of what is trained (lora), exp_avg, exp_avg_sq or ema."""
        with self.open(key) as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118

    def open(self, key: str) -> Any:
        """One file, memory-mapped; raises UserError when the run kept no such tensors."""
        path = self.path / f"{key}.safetensors"
        if not path.exists():
            raise UserError(
                f"{path} does not exist: the run kept no {key}; use weights=raw, or optim.ema_decay=0 to resume"
            )
        return safe_open(path, framework="pt")


def step_folder(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step_{step:08d}"


def step_of(path: Path) -> int:
    """The step of a checkpoint's folder, by its name."""
    return int(path.name.removeprefix("step_"))


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Finished checkpoint folders, oldest first; unverified. Other files and folders beside them are left alone.

    Raises:
        UnreadableFile: the folder cannot be listed now: taken for empty, the run would begin anew over its results.
    """
    folder = run_dir / "checkpoints"
    try:
        with os.scandir(folder) as entries:
            found = [folder / entry.name for entry in entries if STEP_NAME.fullmatch(entry.name) and entry.is_dir()]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UnreadableFile(f"run_dir={run_dir}: {folder} cannot be listed ({error.strerror}); repair it") from error
    return sorted(found, key=step_of)


def load_checkpoint(path: Path) -> Checkpoint:
    """Read and verify a checkpoint, which may come from strangers: nothing in it is believed or opened unchecked.

    Raises:
        CorruptCheckpoint: a file is missing, truncated, changed, of another shape or not finite.
        UnreadableFile: a file cannot be read now; it may be whole.
    """
    try:
        content = _read_state(path / STATE_FILE)
        version = content["format_version"]
        if version == FORMAT_VERSION:
            state, digests = _check_state(content)
            for name, digest in digests.items():
                open_regular(path / name).close()
                if sha256_file(path / name) != digest:
                    raise CorruptCheckpoint(f"{path / name} differs from its checksum")
            _check_tensors(path, digests)
    except (CorruptCheckpoint, UnreadableFile):
        raise
    except OSError as error:
        raise UnreadableFile(f"{path} cannot be read ({error.strerror or error}); try again") from error
    except (LookupError, TypeError, ValueError, SafetensorError) as error:
        raise CorruptCheckpoint(f"{path} is not a whole checkpoint ({error})") from error
    if version != FORMAT_VERSION:
        raise UserError(
            f"{path}: format_version={short(version)}, this version reads {FORMAT_VERSION}; "
            "resume with the version that wrote it"
        )
    return Checkpoint(path, state)


def _read_state(path: Path) -> Any:
    content = read_regular(path, _MAX_STATE_BYTES)
    try:
        return parse_json(content)
    except ValueError as error:
        raise ValueError(f"{path.name}: {error}") from error


def _check_state(content: Mapping[str, Any]) -> tuple[TrainingState, dict[str, str]]:
    """The state and the files' checksums.

    Raises:
        LookupError, TypeError, ValueError: they have another shape, or the state differs from its checksum.
    """
    unknown = set(content["state"]) - {field.name for field in fields(TrainingState)}
    if unknown:
        raise ValueError(f"{STATE_FILE}: state has a field {min(map(short, unknown))}, which is unknown")
    state = TrainingState(**content["state"])
    kinds = {"config": dict, "clips_sha256": str, "resumed_from": str, "family": str}
    values: dict[str, Any] = vars(state)
    for name, value in values.items():
        # type(), as True is an int too
        if type(value) is not kinds.get(name, int) or (type(value) is int and value < 0):
            raise ValueError(f"{STATE_FILE}: state.{name}={short(value)}")
    if content["state_sha256"] != _state_digest(state):
        raise ValueError(f"{STATE_FILE} differs from its checksum")
    digests = content["sha256"]
    weights = digests.keys() - {*STATE_FILES, METRICS_FILE} if isinstance(digests, dict) else set()
    if len(weights) != 1 or not all(_WEIGHTS_NAME.fullmatch(str(name)) for name in weights):
        raise ValueError(f"{STATE_FILE}: sha256={short(digests)} is not of a checkpoint's files")
    return state, digests


def _check_tensors(path: Path, digests: Mapping[str, str]) -> None:
    """All files hold finite fp32 tensors of the same names and shapes, and no other file is there to be opened."""
    if stray := sorted(file.name for file in path.glob("*.safetensors") if file.name not in digests):
        raise ValueError(f"{stray[0]} has no checksum")
    names = sorted(digests.keys() - {METRICS_FILE}, key=lambda name: (name in STATE_FILES, name))
    shapes = None
    for name in names:
        header = read_safetensors_header(path / name)
        header.pop("__metadata__", None)
        found = {tensor: (entry["dtype"], entry["shape"]) for tensor, entry in header.items()}
        if not found or any(dtype != "F32" for dtype, _ in found.values()):
            raise ValueError(f"{name} holds no tensors, or others than F32")
        shapes = shapes or found
        if found != shapes:
            raise ValueError(f"{name} holds other tensors than {names[0]}")
        with safe_open(path / name, framework="pt") as file:
            wrong = first_nonfinite({tensor: file.get_tensor(tensor) for tensor in found})
        if wrong is not None:
            raise CorruptCheckpoint(f"{path / name}: {short(wrong)} holds values that are not finite")


def first_nonfinite(tensors: Mapping[str, Tensor]) -> str | None:
    """The first name whose tensor holds NaN or infinity."""
    return next((name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()), None)


def _state_digest(state: TrainingState) -> str:
    return hashlib.sha256(json.dumps(state.to_json(), sort_keys=True).encode()).hexdigest()


class CheckpointWriter:
    """Writes checkpoints in the background, one at a time; lives on rank 0.

    Args:
        run_dir: the run folder.
        keep_last: newest checkpoints kept.
        keep_every: steps at whose multiples a checkpoint is kept for ever; 0 for none.
        log: called with what went wrong in a background save; the run goes on with the previous checkpoint.
    """

    def __init__(self, run_dir: Path, keep_last: int, keep_every: int, log: Log) -> None:
        self.run_dir = run_dir
        self.keep_last = max(1, keep_last)
        self.keep_every = keep_every
        self.log = log
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def save(self, state: TrainingState, tensors: Mapping[str, Mapping[str, Tensor]], *, wait: bool = False) -> None:
        """Begin to write a checkpoint; waits for the previous one first.

        Args:
            tensors: {file key: {name: CPU tensor}}; must not change afterwards.
            wait: return only when it is on disk.

        Raises:
            UserError: values that are not finite; or with ``wait``, it could not be written.
        """
        self.finish()
        for key, named in tensors.items():
            if (name := first_nonfinite(named)) is not None:
                raise UserError(self.not_finite(state.step, f"{key} of {name}"))
        self._thread = threading.Thread(target=self._run, args=(state, tensors), name="checkpoint")
        self._thread.start()
        if wait:
            self.finish(raise_error=True)

    def not_finite(self, step: int, what: str) -> str:
        """The message of a run that cannot go on: what is wrong, and where it was right last."""
        kept = list_checkpoints(self.run_dir)
        good = f"the last good checkpoint is {kept[-1]}, from which it resumes" if kept else "no checkpoint was made"
        return (
            f"step {step}: {what} is not finite (NaN or infinity) and is not saved; {good}. Lower optim.lr or "
            "optim.gradient_clip, or remove clips with losses out of range from the store, then run again"
        )

    def finish(self, *, raise_error: bool = False) -> None:
        """Wait for the write under way."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            if not isinstance(error, (OSError, SafetensorError)):
                raise error
            message = f"checkpoint not written: {error}; the previous one stays valid"
            if raise_error:
                raise UserError(message) from error
            self.log(message)

    def _run(self, state: TrainingState, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
        try:
            write_checkpoint(step_folder(self.run_dir, state.step), state, tensors)
            self._prune()
        except Exception as error:  # noqa: BLE001 (it is the main thread's to handle)
            self._error = error

    def _prune(self) -> None:
        paths = list_checkpoints(self.run_dir)
        for path in paths[: -self.keep_last]:
            if not (self.keep_every and step_of(path) % self.keep_every == 0):
                # Renamed first: a kill in the middle of deleting leaves no half checkpoint under a valid name.
                doomed = path.with_name(f".{path.name}.deleting")
                path.rename(doomed)
                shutil.rmtree(doomed)


def write_checkpoint(path: Path, state: TrainingState, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Write a checkpoint folder whole or not at all; a valid one of the same state is left as it is.

    The run's metrics.jsonl, two folders up, goes into it.

    Raises:
        OSError, SafetensorError: the disk is full or not writable; nothing is left behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for stale in path.parent.glob(".step_*"):
        shutil.rmtree(stale, ignore_errors=True)
    if path.exists() and _holds(path, state):
        return
    temporary = path.parent / f".{path.name}.writing"
    try:
        temporary.mkdir()
        digests = {}
        for key, named in tensors.items():
            file = temporary / f"{key}.safetensors"
            save_file(dict(named), file)
            _flush(file)
            digests[file.name] = sha256_file(file)
        metrics = path.parent.parent / METRICS_FILE
        if metrics.exists():
            shutil.copyfile(metrics, temporary / METRICS_FILE)
            _flush(temporary / METRICS_FILE)
            digests[METRICS_FILE] = sha256_file(temporary / METRICS_FILE)
        content = {
            "format_version": FORMAT_VERSION,
            "state": state.to_json(),
            "state_sha256": _state_digest(state),
            "sha256": digests,
        }
        (temporary / STATE_FILE).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
        _flush(temporary / STATE_FILE)
        _flush(temporary)
        if path.exists():
            path.rename(path.parent / f".{path.name}.deleting")
        temporary.rename(path)
        _flush(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(path.parent / f".{path.name}.deleting", ignore_errors=True)


def _holds(path: Path, state: TrainingState) -> bool:
    try:
        return load_checkpoint(path).state == state
    except UserError:
        return False


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
