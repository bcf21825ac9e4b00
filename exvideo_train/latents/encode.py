"""From a manifest to a latent store: the road of one run of encode_latents.

One process coordinates: it plans, starts an encoding process a device, watches them, and at the end brings the index
up to date and reports. It loads no model itself. Under accelerate launch one process of each machine does the same
with a share of the clips, dealt out beforehand; the first rank plans and reports for all.
"""

from __future__ import annotations

import os
import shutil
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exvideo_train import locks
from exvideo_train.clips.record import ClipRecord
from exvideo_train.config.latents import EncodeEngine, EncodeLatents
from exvideo_train.devices import choose_devices
from exvideo_train.errors import UserError
from exvideo_train.files import atomic_write_bytes, atomic_write_json, parse_json, read_regular
from exvideo_train.geometry import Geometry
from exvideo_train.latents.encode_plan import (
    EncodePlan,
    make_plan,
    set_damaged_aside,
    sweep_temporary_files,
    take_from_index,
    write_index,
)
from exvideo_train.latents.encode_report import (
    Progress,
    Totals,
    earlier_refusals,
    make_report,
    totals_from_json,
    totals_to_json,
    write_report,
)
from exvideo_train.latents.local_engine import EncodersDied, LocalEngine
from exvideo_train.latents.quarantine import Quarantine
from exvideo_train.latents.settings import EncodeSettings, resolve_settings
from exvideo_train.latents.store import LatentStore
from exvideo_train.latents.untrusted import folders_below, hold_store, refuse_links
from exvideo_train.signals import INTERRUPTED_STATUS, sigterm_interrupts

if TYPE_CHECKING:
    from exvideo_train.latents.ray_engine import RayEngine

LOOK_AGAIN_SECONDS = 1.0
_MAX_TOTALS_BYTES = 1 << 24


@dataclass(frozen=True)
class Launch:
    """This process among those that were launched together.

    Attributes:
        devices: what this process encodes on; none where another process of its machine has them all.
        num_devices: of each rank.
    """

    rank: int
    devices: list[str]
    num_devices: list[int]


def encode_latents(config: EncodeLatents) -> None:
    """Run the command.

    Raises:
        UserError: bad options or manifest, a store of another model, a full disk or a read-only folder.
    """
    launch = find_launch(config.device)
    if config.engine is EncodeEngine.ray and len(launch.num_devices) > 1:
        raise UserError("engine=ray: Ray deals clips out to its own machines; start it without accelerate launch")
    settings = resolve_settings(config, len(launch.devices))
    if config.dry_run:
        if launch.rank == 0:
            store = LatentStore.create(settings.store_path, settings.normalisation)
            print(_plan(config, settings, store).describe(settings))
        return
    if launch.rank == 0:
        _run_first_rank(config, settings, launch)
    else:
        _run_other_rank(settings, launch)


def find_launch(device: str) -> Launch:
    """This process's rank and devices, under ``accelerate launch``, torchrun or none of them.

    Raises:
        UserError: a device that is not there.
    """
    is_alone = int(os.environ.get("WORLD_SIZE", "1")) <= 1
    rank = local_rank = 0
    if not is_alone:
        from datetime import timedelta

        from accelerate import PartialState

        # Over the CPU: coordinating needs no GPU memory. The first rank may plan a million clips meanwhile.
        state = PartialState(cpu=True, backend="gloo", timeout=timedelta(hours=6))
        rank, local_rank = state.process_index, state.local_process_index
    devices = choose_devices(device)
    # One process deals a machine's clips out to all its devices as they ask: a slow one holds up nobody.
    devices = [] if local_rank else devices
    if is_alone:
        return Launch(rank, devices, [len(devices)])
    from accelerate.utils import gather_object

    return Launch(rank, devices, gather_object([len(devices)]))


def share_out(records: Sequence[ClipRecord], num_devices: Sequence[int]) -> list[list[ClipRecord]]:
    """A share a rank, in proportion to its devices; neighbours stay together, as do clips of one caption mostly."""
    ends = [len(records) * sum(num_devices[: rank + 1]) // sum(num_devices) for rank in range(len(num_devices))]
    return [list(records[begin:end]) for begin, end in zip([0, *ends], ends, strict=False)]


def _scatter(shares: Sequence[Any] | None) -> Any:
    """This rank's part of what the first rank has: its share, or the message of an error."""
    from torch.distributed import scatter_object_list

    box: list[Any] = [None]
    scatter_object_list(box, None if shares is None else list(shares))
    return box[0]


def _plan(config: EncodeLatents, settings: EncodeSettings, store: LatentStore) -> EncodePlan:
    if settings.fingerprint.geometry.name in store.fingerprints:
        store.require(settings.fingerprint)
    return make_plan(settings, store, Path(config.manifest), config.retry_quarantined, config.max_clips)


def refuse_linked_store(store_path: Path, geometry: Geometry) -> None:
    """Fail before any work if writing into the store would leave it through a link.

    Raises:
        UserError: names the links.
    """
    clips = store_path / "clips"
    reports = folders_below(store_path, store_path / "reports")
    refuse_links(store_path, [store_path, clips, clips / geometry.name, *reports])


def check_writable(store_path: Path, geometry: Geometry) -> None:
    """Fail before any work if the store cannot be written.

    Raises:
        UserError: names the folder.
    """
    clips = store_path / "clips" / geometry.name
    for folder in (store_path / "reports", store_path, *([clips] if clips.is_dir() else [])):
        probe = folder / "writable"
        try:
            atomic_write_bytes(probe, b"")
            probe.unlink()
        except (UserError, OSError) as error:
            raise UserError(
                f"latents={store_path}: not writable ({error}); make it writable or choose another folder"
            ) from error


def _prepare(config: EncodeLatents, settings: EncodeSettings) -> tuple[LatentStore, EncodePlan]:
    """Everything before the first clip."""
    store = LatentStore.create(settings.store_path, settings.normalisation)
    plan = _plan(config, settings, store)
    print(plan.describe(settings), flush=True)
    store.add_geometry(settings.fingerprint)
    sweep_temporary_files(store, settings.geometry)
    # Figures of a run whose first rank was killed before it took them.
    shutil.rmtree(_totals_path(store.path, 0).parent, ignore_errors=True)
    take_from_index(store, settings.geometry, plan.outdated)
    set_damaged_aside(store, settings.geometry, plan.damaged)
    quarantine = Quarantine(store.path, settings.geometry)
    if config.retry_quarantined:
        for record in plan.pending:
            quarantine.remove(record.clip_id)
    return store, plan


def _run_first_rank(config: EncodeLatents, settings: EncodeSettings, launch: Launch) -> None:
    began = time.monotonic()
    path = settings.store_path
    world_size = len(launch.num_devices)
    with ExitStack() as stack:
        try:
            refuse_linked_store(path, settings.geometry)
            check_writable(path, settings.geometry)
            stack.enter_context(hold_store(path))
            store, plan = _prepare(config, settings)
        except UserError as error:
            if world_size > 1:
                _scatter([str(error)] * world_size)
            raise
        shares = share_out(plan.pending, launch.num_devices)
        if world_size > 1:
            _scatter(shares)
        outcome = _encode(settings, launch, store, shares[0])
        _finish(settings, store, plan, outcome, time.monotonic() - began)
        _say_what_is_left(settings, store, shares)
    if outcome.failure is not None:
        raise outcome.failure
    if outcome.is_interrupted:
        print("interrupted; the same command again continues", flush=True)
        raise SystemExit(INTERRUPTED_STATUS)


@dataclass
class _Outcome:
    """How encoding ended; ``missing`` are the ranks that gave no figures."""

    totals: list[Totals] = field(default_factory=list)
    missing: list[int] = field(default_factory=list)
    failure: UserError | None = None
    is_interrupted: bool = False


def _encode(settings: EncodeSettings, launch: Launch, store: LatentStore, records: list[ClipRecord]) -> _Outcome:
    outcome = _Outcome()
    progress = Progress(len(records))
    engine: LocalEngine | RayEngine
    if settings.options.engine is EncodeEngine.ray:
        from exvideo_train.latents.ray_engine import RayEngine

        engine = RayEngine(settings, records, progress)
    else:
        engine = LocalEngine(settings, launch.devices, records, progress)
    others: list[Totals] = []
    with sigterm_interrupts():
        try:
            if records or store.lacks_empty_prompt():
                outcome.failure = _run_to_the_end(engine, launch)
            others, outcome.missing = _wait_for_others(store.path, launch)
        except KeyboardInterrupt:
            outcome.is_interrupted = True
        except UserError as error:
            outcome.failure = error
        finally:
            progress.close()
    outcome.totals = [*engine.totals, *others]
    return outcome


def _run_to_the_end(engine: LocalEngine | RayEngine, launch: Launch) -> UserError | None:
    """Encode; that all devices of this machine are broken is returned where others go on."""
    try:
        engine.run()
    except EncodersDied as error:
        if len(launch.num_devices) == 1:
            raise
        print(f"warning: rank {launch.rank} stops encoding, the others go on: {error}", flush=True)
        return error
    return None


def _run_other_rank(settings: EncodeSettings, launch: Launch) -> None:
    share = _scatter(None)
    if isinstance(share, str):
        # The first rank prints the message.
        raise SystemExit(2)
    if not launch.devices:
        return
    engine = LocalEngine(settings, launch.devices, share, lambda clip_id: None)
    path = _totals_path(settings.store_path, launch.rank)
    # By the lock the first rank knows that this one lives.
    with locks.hold(path.with_suffix(""), f"rank {launch.rank}", "wait until it has ended"), sigterm_interrupts():
        try:
            if share:
                # For one rank's exit status the launcher would end them all.
                _run_to_the_end(engine, launch)
        except KeyboardInterrupt:
            raise SystemExit(INTERRUPTED_STATUS) from None
        finally:
            atomic_write_json(path, totals_to_json(engine.totals))


def _totals_path(store_path: Path, rank: int) -> Path:
    return store_path / "reports" / "ranks" / f"{rank:05d}.json"


def _wait_for_others(store_path: Path, launch: Launch) -> tuple[list[Totals], list[int]]:
    """Totals of the other ranks once they have ended, and the ranks that gave none."""
    totals: list[Totals] = []
    missing: list[int] = []
    for rank in range(1, len(launch.num_devices)):
        if not launch.num_devices[rank]:
            continue
        path = _totals_path(store_path, rank)
        _wait_for(rank, path)
        try:
            totals += totals_from_json(parse_json(read_regular(path, _MAX_TOTALS_BYTES)))
            path.unlink()
        except (ValueError, OSError) as error:
            print(f"note: no figures from rank {rank}: {error}", flush=True)
            missing.append(rank)
    return totals, missing


def _wait_for(rank: int, totals_path: Path) -> None:
    """Wait until a rank has left its totals, or died."""
    lock = totals_path.with_suffix("")
    deadline = time.monotonic() + locks.SILENCE_SECONDS
    while not (lock.exists() or totals_path.exists()) and time.monotonic() < deadline:
        time.sleep(LOOK_AGAIN_SECONDS)
    while lock.exists() and not totals_path.exists():
        with suppress(UserError), locks.hold(lock, f"rank {rank}", "it is waited for"):
            return
        time.sleep(LOOK_AGAIN_SECONDS)


def _finish(
    settings: EncodeSettings, store: LatentStore, plan: EncodePlan, outcome: _Outcome, wall_seconds: float
) -> None:
    """Index, report and tidying up; on a full disk as much of it as fits."""
    try:
        sweep_temporary_files(store, settings.geometry)
        existing = write_index(store, settings.geometry, plan.outdated)
        entries = existing.entries
        quarantine = Quarantine(store.path, settings.geometry)
        quarantined: Counter[str] = Counter(plan.num_held_back)
        pending = {record.clip_id: record for record in plan.pending}
        quarantined.update(entry.reason for entry in quarantine if entry.clip_id in pending)
        encoded = sum(clip_id in entries and entries[clip_id].is_of(record) for clip_id, record in pending.items())
        cut_captions = sorted(clip_id for clip_id, entry in entries.items() if entry.num_tokens_cut)
        notes = {**earlier_refusals(quarantine), **existing.decord_refusals}
        refused = {clip_id: reason for clip_id, reason in notes.items() if reason and clip_id in entries}
        report = make_report(
            plan, outcome.totals, encoded, quarantined, wall_seconds, outcome.missing, cut_captions, refused
        )
        print(report.describe(), flush=True)
        path = write_report(report, quarantine)
        print(f"report       {path}", flush=True)
    except UserError:
        # The disk that stopped the run leaves no room for an index either: the next run writes it.
        if outcome.failure is None:
            raise


def _say_what_is_left(settings: EncodeSettings, store: LatentStore, shares: list[list[ClipRecord]]) -> None:
    """How many clips other machines have left over: they were dealt out, and nobody takes them over."""
    if len(shares) == 1:
        return
    name = settings.geometry.name
    index, left_out = store.read_index(), Quarantine(store.path, settings.geometry).ids()
    for rank, share in enumerate(shares[1:], 1):
        entries = ((record, index.get((name, record.clip_id))) for record in share if record.clip_id not in left_out)
        num_left = sum(entry is None or not entry.is_of(record) for record, entry in entries)
        if num_left:
            print(f"note: rank {rank} left {num_left} clips over; the same command again deals them out", flush=True)
