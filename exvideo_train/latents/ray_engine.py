"""The same pipeline on a Ray cluster: Ray Data moves clips between decoding and encoding actors of many machines.

Decoding, encoding, quarantine and store are those of the local engine; Ray gives placement, backpressure and the
replacement of lost machines. The store's folder must be the same path on every node.
Axis letters: C channel, F video frames, H height, W width.
"""

from __future__ import annotations

import faulthandler
import hashlib
import logging
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exvideo_train.clips.record import ClipRecord, parse_record
from exvideo_train.clips.workers import Failure
from exvideo_train.errors import UserError
from exvideo_train.files import atomic_write_bytes, create_marker
from exvideo_train.geometry import Geometry
from exvideo_train.latents.decode import DecodeWorker
from exvideo_train.latents.encode_report import Totals
from exvideo_train.latents.encoder import ClipEncoder, not_finite
from exvideo_train.latents.quarantine import Quarantine, is_settled, quarantine_clip
from exvideo_train.latents.settings import EncodeSettings
from exvideo_train.latents.store import LatentStore

if TYPE_CHECKING:
    from torch import Tensor

# Many times what T5 takes for a caption on a GPU; whoever was to encode it has died then.
PATIENCE_SECONDS = 120.0
_POLL_SECONDS = 0.05
# Ray starts an actor again when it dies and gives it the same clip; after so many tries the clip is left out.
ATTEMPTS_A_CLIP = 2

Row = dict[str, Any]


class DecodeActor:
    """Decodes a row's clip in a process of its own that may die or hang."""

    def __init__(self, settings: EncodeSettings) -> None:
        self._worker = DecodeWorker(settings.decode_options)

    def __call__(self, row: Row) -> Row:
        """Adds ``frames`` (empty if there is a ``reason``) and the other fields of `Decoded`, the failure in two."""
        decoded = self._worker.decode(_record(row))
        failure = decoded.failure or Failure("", "")
        frames = b"" if decoded.frames_FHWC is None else decoded.frames_FHWC.numpy().tobytes()
        return {
            "record": row["record"],
            "shared": row["shared"],
            "frames": frames,
            "reason": failure.reason,
            "detail": failure.detail,
            "decord_refusal": decoded.decord_refusal or "",
            "decode_seconds": decoded.seconds,
        }


class SharedCaptions:
    """Embeddings of captions that several clips have, in a folder that all encoders see: one encodes, the others read.

    Args:
        folder: made when first written to; whoever starts and ends a run deletes it.
        patience_seconds: how long to wait for another encoder before encoding its caption as well.
    """

    def __init__(self, folder: Path, patience_seconds: float = PATIENCE_SECONDS) -> None:
        self.folder = folder
        self.patience_seconds = patience_seconds

    def tensors(self, caption: str, encode: Callable[[str], dict[str, Tensor]]) -> dict[str, Tensor]:
        """What a caption gives: another encoder's, when it has one or is about to, or else by `encode`.

        Raises:
            UserError: the disk is full or not writable.
        """
        from safetensors.torch import load, save

        path = self.folder / f"{hashlib.sha256(caption.encode()).hexdigest()[:32]}.safetensors"
        deadline = time.monotonic() + self.patience_seconds
        claim = path.with_suffix(".claim")
        while not path.exists() and not create_marker(claim) and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)
        if path.exists():
            return load(path.read_bytes())
        tensors = encode(caption)
        atomic_write_bytes(path, save({name: tensor.contiguous() for name, tensor in tensors.items()}))
        return tensors


class EncodeActor:
    """T5 and VAE on one device; writes what it encodes and returns how that went."""

    def __init__(self, settings: EncodeSettings) -> None:
        from exvideo_train.devices import gpus

        self._settings = settings
        self._store = LatentStore.open(settings.store_path)
        self._quarantine = Quarantine(settings.store_path, settings.geometry)
        device = (gpus() or ["cpu"])[0]
        self._timeout_seconds = settings.seconds_to_encode(device)
        # Within the time that a hanging encoder has: to wait for another one is not to hang.
        patience = min(PATIENCE_SECONDS, self._timeout_seconds / 4)
        self._captions = SharedCaptions(_captions_folder(settings), patience)
        self._encoder = self._load_encoder(device)
        self._waiting_since = time.monotonic()

    def _load_encoder(self, device: str) -> ClipEncoder:
        return ClipEncoder(self._settings, device)

    def __call__(self, row: Row) -> Row:
        """One clip's outcome: ``clip_id``, ``reason`` (empty when written), ``error``, bytes and seconds."""
        waited = time.monotonic() - self._waiting_since
        record = _record(row)
        outcome: Row = {"clip_id": record.clip_id, "reason": row["reason"], "error": "", "num_bytes": 0}
        began = time.monotonic()
        try:
            self._settle(record, row, outcome)
        except UserError as error:
            outcome["error"] = str(error)
        self._waiting_since = time.monotonic()
        times = {"decode_seconds": row["decode_seconds"], "encode_seconds": self._waiting_since - began}
        return outcome | times | {"wait_seconds": waited, "encoder": f"{os.uname().nodename}-{os.getpid()}"}

    def _settle(self, record: ClipRecord, row: Row, outcome: Row) -> None:
        if self._store.lacks_empty_prompt():
            with self._watched():
                tensors = self._encoder.caption_tensors("")
            self._store.write_empty_prompt(tensors)
        # Ray may give a clip a second time after it lost a machine.
        if is_settled(self._store, self._quarantine, record):
            return
        failure = Failure(row["reason"], row["detail"]) if row["reason"] else self._encode(record, row, outcome)
        if failure is not None:
            quarantine_clip(self._store, self._quarantine, record, failure)
            outcome["reason"] = failure.reason
        for path in self._attempt_paths(record):
            path.unlink(missing_ok=True)

    def _encode(self, record: ClipRecord, row: Row, outcome: Row) -> Failure | None:
        if not any(create_marker(path) for path in self._attempt_paths(record)):
            detail = f"its encoder died {ATTEMPTS_A_CLIP} times, or was killed after {self._timeout_seconds:g} s"
            return Failure("encoder_died", detail)
        with self._watched():
            encode, geometry = self._encoder.caption_tensors, self._settings.geometry
            caption = record.caption
            of_caption = self._captions.tensors(caption, encode) if row["shared"] else encode(caption)
            frames_FHWC = _frames(row["frames"], geometry)
            of_frames = self._encoder.frame_tensors(frames_FHWC, record.sampling_fps or geometry.fps)
        failure = not_finite(of_frames, of_caption)
        if failure is None:
            entry = self._store.write_clip(
                record.clip_id,
                self._settings.geometry,
                {**of_frames, **of_caption},
                record.caption,
                sampling_fps=record.sampling_fps,
                num_tokens_cut=self._encoder.num_tokens_cut(record.caption),
                decord_refusal=row["decord_refusal"] or None,
            )
            outcome["num_bytes"] = entry.num_bytes
        return failure

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """End this process when encoding hangs, even where Python cannot run; Ray then starts another."""
        faulthandler.dump_traceback_later(self._timeout_seconds, exit=True)
        try:
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()

    def _attempt_paths(self, record: ClipRecord) -> list[Path]:
        folder = _attempts_folder(self._settings) / record.clip_id[:3]
        return [folder / f"{record.clip_id}.{number}" for number in range(ATTEMPTS_A_CLIP)]


def _attempts_folder(settings: EncodeSettings) -> Path:
    return settings.store_path / "reports" / "attempts"


def _captions_folder(settings: EncodeSettings) -> Path:
    return settings.store_path / "reports" / "captions"


def _record(row: Row) -> ClipRecord:
    return parse_record(row["record"], Path("/"), 0)


def _frames(content: bytes, geometry: Geometry) -> Any:
    import torch

    frames = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    return frames.view(geometry.num_frames, geometry.height, geometry.width, 3)


class RayEngine:
    """Stands in for :class:`~exvideo_train.latents.local_engine.LocalEngine` on a Ray cluster.

    A running cluster is used if RAY_ADDRESS names one (or ``ray start`` made one on this machine); otherwise Ray
    starts on this machine alone.

    Raises:
        UserError: Ray is not installed.
    """

    def __init__(
        self, settings: EncodeSettings, records: Sequence[ClipRecord], on_progress: Callable[[str], None]
    ) -> None:
        try:
            import ray
            import ray.data  # noqa: F401
        except ImportError as error:
            raise UserError(f'engine=ray: {error}; install it with pip install "exvideo-train[ray]"') from error
        self.settings = settings
        self.records = list(records)
        self.on_progress = on_progress
        self._by_encoder: dict[str, Totals] = {}

    @property
    def totals(self) -> list[Totals]:
        """What each encoding actor did."""
        return list(self._by_encoder.values())

    def run(self) -> None:
        """Encode every clip.

        Raises:
            UserError: an encoder met a full disk or too little GPU memory, or the store is not writable.
        """
        import ray

        self._forget()
        if not self.records:
            encoder = ClipEncoder(self.settings, "cpu")
            LatentStore.open(self.settings.store_path).write_empty_prompt(encoder.caption_tensors(""))
            return
        ray.init(ignore_reinit_error=True, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
        try:
            began = time.monotonic()
            for outcome in self._pipeline().iter_rows():
                if outcome["error"]:
                    raise UserError(outcome["error"])
                self._count(outcome, time.monotonic() - began)
                self.on_progress(outcome["clip_id"])
            self._forget()
        finally:
            ray.shutdown()

    def _forget(self) -> None:
        """Notes of an earlier run: what ended it need not have been the clips in work, and captions are cheap.

        The caller holds the store's lock, so they are of no run that is still alive.
        """
        for folder in (_attempts_folder(self.settings), _captions_folder(self.settings)):
            try:
                shutil.rmtree(folder)
            except FileNotFoundError:
                pass
            except OSError as error:
                raise UserError(f"{error.filename} cannot be deleted ({error.strerror}); make it writable") from error

    def _rows(self) -> list[Row]:
        """The clips; those of a shared caption are spread, so that it is mostly encoded before it is needed again."""
        num_clips = Counter(record.caption for record in self.records)
        met: Counter[str] = Counter()
        rows: list[tuple[int, Row]] = []
        for record in self.records:
            rows.append((met[record.caption], {"record": record.to_json(), "shared": num_clips[record.caption] > 1}))
            met[record.caption] += 1
        return [row for _, row in sorted(rows, key=lambda entry: entry[0])]

    def _pipeline(self) -> Any:
        import ray

        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        logging.getLogger("ray.data").setLevel(logging.WARNING)
        # A block that is lost for good costs its clips alone; the next run finds them still to do.
        context.max_errored_blocks = -1
        num_gpus, num_cpus = (int(ray.cluster_resources().get(kind, 0)) for kind in ("GPU", "CPU"))
        num_encoders = max(1, num_gpus)
        encoder_needs: dict[str, Any] = {"num_gpus": 1, "num_cpus": 0} if num_gpus else {"num_cpus": 1}
        free_cpus = num_cpus - (0 if num_gpus else num_encoders)
        num_decoders = max(1, min(free_cpus, self.settings.decode_workers * num_encoders))
        options: dict[str, Any] = {"fn_constructor_args": (self.settings,)}
        rows = self._rows()
        clips = ray.data.from_items(rows, override_num_blocks=min(len(rows), 8 * num_decoders + 1000))
        decoder_cpus = min(1.0, max(free_cpus, 0.1))
        decoders, encoders = (ray.data.ActorPoolStrategy(size=size) for size in (num_decoders, num_encoders))
        decode: Any = DecodeActor
        encode: Any = EncodeActor
        decoded = clips.map(decode, compute=decoders, num_cpus=decoder_cpus, **options)
        return decoded.map(encode, compute=encoders, **encoder_needs, **options)

    def _count(self, outcome: Row, seconds: float) -> None:
        totals = self._by_encoder.setdefault(outcome["encoder"], Totals())
        first = totals.decode_seconds == 0
        totals.startup_seconds = seconds if first else totals.startup_seconds
        totals.loop_seconds = seconds - totals.startup_seconds + (outcome["encode_seconds"] if first else 0)
        totals.num_encoded += not outcome["reason"]
        totals.num_bytes += outcome["num_bytes"]
        totals.decode_seconds += outcome["decode_seconds"]
        totals.encode_seconds += outcome["encode_seconds"]
        totals.wait_seconds += 0 if first else outcome["wait_seconds"]
        if outcome["reason"]:
            totals.quarantined[outcome["reason"]] += 1
