"""From a manifest to a latent store: the road of one run of encode_latents.

One launched process of each machine coordinates: it plans (the first rank), starts an encoding process a device,
watches them, and at the end brings the index up to date and reports. It loads no model itself.
"""

from __future__ import annotations

import shutil
import signal
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from exvideo_train.config.latents import EncodeEngine, EncodeLatents
from exvideo_train.errors import UserError
from exvideo_train.files import atomic_write_json, parse_json, read_regular
from exvideo_train.latents.launch import Launch, find_launch, share_outcome
from exvideo_train.latents.plan import (
    Plan,
    check_writable,
    make_plan,
    refuse_linked_store,
    set_damaged_aside,
    sweep_temporary_files,
    take_from_index,
    write_index,
)
from exvideo_train.latents.progress import Progress
from exvideo_train.latents.report import (
    Report,
    earlier_refusals,
    make_report,
    totals_from_json,
    totals_to_json,
    write_report,
)
from exvideo_train.latents.settings import EncodeSettings, resolve_settings
from exvideo_train.latents.store import LatentStore, Quarantine
from exvideo_train.latents.supervise import EncodersDied, Supervisor
from exvideo_train.latents.untrusted import hold_store
from exvideo_train.latents.work import HEARTBEAT_SECONDS, SILENCE_SECONDS, WorkList

INTERRUPTED_STATUS = 130
_MAX_TOTALS_BYTES = 1 << 24


def encode_latents(config: EncodeLatents) -> None:
    """Run the command.

    Raises:
        UserError: bad options or manifest, a store of another model, a full disk or a read-only folder.
    """
    launch = find_launch(config.device)
    settings = resolve_settings(config, launch.num_local_encoders)
    if config.dry_run:
        if launch.rank == 0:
            print(
                _plan(config, settings, LatentStore.create(settings.store_path, settings.normalisation)).describe(
                    settings
                )
            )
        return
    if launch.rank == 0:
        _run_first_rank(config, settings, launch)
    else:
        share_outcome(launch, None)
        _run_other_rank(settings, launch)


def _plan(config: EncodeLatents, settings: EncodeSettings, store: LatentStore) -> Plan:
    if settings.fingerprint.geometry.name in store.fingerprints:
        store.require(settings.fingerprint)
    return make_plan(settings, store, Path(config.manifest), config.retry_quarantined, config.max_clips)


def _prepare(config: EncodeLatents, settings: EncodeSettings, launch: Launch) -> tuple[LatentStore, Plan]:
    """Everything before the first clip: store, plan, work list."""
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
    if config.engine is EncodeEngine.local:
        WorkList(store.path).create(plan.pending, launch.world_size * len(launch.devices))
    return store, plan


def _run_first_rank(config: EncodeLatents, settings: EncodeSettings, launch: Launch) -> None:
    began = time.monotonic()
    path = settings.store_path
    with ExitStack() as stack:
        try:
            refuse_linked_store(path, settings.geometry)
            check_writable(path, settings.geometry)
            stack.enter_context(hold_store(path))
            store, plan = _prepare(config, settings, launch)
        except UserError as error:
            share_outcome(launch, str(error))
            raise
        share_outcome(launch, None)
        _encode(config, settings, launch, store, plan, began)


def _encode(
    config: EncodeLatents, settings: EncodeSettings, launch: Launch, store: LatentStore, plan: Plan, began: float
) -> None:
    supervisor: Any
    poll = None if launch.world_size == 1 else WorkList(store.path).num_unsettled
    progress = Progress(len(plan.pending), poll)
    if config.engine is EncodeEngine.ray:
        from exvideo_train.latents.ray_engine import RayEngine

        supervisor = RayEngine(settings, plan.pending, progress)
    else:
        supervisor = Supervisor(settings, launch.devices, progress)
    interrupted, failure = False, None
    with _stop_on_signals():
        try:
            if plan.pending or store.lacks_empty_prompt():
                _run_to_the_end(supervisor, settings, launch)
        except KeyboardInterrupt:
            interrupted = True
        except UserError as error:
            failure = error
        finally:
            progress.close()
    totals, missing = list(supervisor.totals), list[int]()
    if launch.world_size > 1:
        others, missing = _collect_totals(settings.store_path, launch, wait=not interrupted and failure is None)
        totals += others
    _finish(settings, store, plan, totals, missing, time.monotonic() - began, failure)
    if failure is not None:
        raise failure
    if interrupted:
        print("interrupted; the same command again continues", flush=True)
        raise SystemExit(INTERRUPTED_STATUS)


def _run_to_the_end(supervisor: Any, settings: EncodeSettings, launch: Launch) -> None:
    """Run this machine's encoders until no block is left, neither free nor in a silent owner's hands."""
    if launch.world_size == 1:
        supervisor.run()
        return
    work = WorkList(settings.store_path)
    broken: EncodersDied | None = None
    last_sign = time.monotonic()
    # Once in any case: the empty prompt may be missing. Then only for free blocks, as encoders load for a minute.
    due = True
    while True:
        try:
            if due and broken is None:
                supervisor.run()
        except EncodersDied as error:
            print(f"warning: rank 0 stops encoding, the others go on: {error}", flush=True)
            broken = error
        work.give_back_silent(settings.store_path / "reports" / "clock")
        num_free, num_taken = work.counts()
        if not num_free + num_taken:
            return
        if num_taken:
            last_sign = time.monotonic()
        elif broken is not None and time.monotonic() - last_sign > SILENCE_SECONDS:
            # Nobody is left who could take the free blocks.
            raise broken
        due = num_free > 0
        if not due or broken is not None:
            time.sleep(HEARTBEAT_SECONDS)


def _run_other_rank(settings: EncodeSettings, launch: Launch) -> None:
    supervisor = Supervisor(settings, launch.devices, lambda clip_id: None)
    path = _totals_path(settings.store_path, launch.rank)
    with _stop_on_signals():
        try:
            supervisor.run()
        except KeyboardInterrupt:
            raise SystemExit(INTERRUPTED_STATUS) from None
        except EncodersDied as error:
            # For one rank's exit status the launcher would end them all.
            print(f"warning: rank {launch.rank} stops encoding, the others go on: {error}", flush=True)
        finally:
            atomic_write_json(path, totals_to_json(supervisor.totals))


def _totals_path(store_path: Path, rank: int) -> Path:
    return store_path / "reports" / "ranks" / f"{rank:05d}.json"


def _collect_totals(store_path: Path, launch: Launch, wait: bool) -> tuple[list[Any], list[int]]:
    """Totals of the other ranks, and the ranks that gave none."""
    totals: list[Any] = []
    missing: list[int] = []
    deadline = time.monotonic() + (SILENCE_SECONDS if wait else 0)
    for rank in range(1, launch.world_size):
        path = _totals_path(store_path, rank)
        while not path.exists() and time.monotonic() < deadline:
            time.sleep(0.5)
        try:
            totals += totals_from_json(parse_json(read_regular(path, _MAX_TOTALS_BYTES)))
            path.unlink()
        except (ValueError, OSError) as error:
            print(f"note: no figures from rank {rank}: {error}", flush=True)
            missing.append(rank)
    return totals, missing


def _finish(
    settings: EncodeSettings,
    store: LatentStore,
    plan: Plan,
    totals: list[Any],
    missing: list[int],
    wall_seconds: float,
    failure: UserError | None,
) -> Report | None:
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
        report = make_report(plan, totals, encoded, quarantined, wall_seconds, missing, cut_captions, refused)
        WorkList(store.path).remove()
        print(report.describe(), flush=True)
        path = write_report(report, quarantine)
        print(f"report       {path}", flush=True)
        return report
    except UserError:
        if failure is None:
            raise
        # The disk that stopped the run leaves no room for an index either: the next run writes it.
        return None


@contextmanager
def _stop_on_signals() -> Iterator[None]:
    """SIGTERM ends a run as Ctrl-C does: what is written stays, the report is made."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
