"""Healthy stores on disks that fail, and links in them: nothing healthy is lost, nothing leaves the store."""

from __future__ import annotations

import errno
import json
import os
import resource
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch
from support.attacked_store import (
    GEOMETRY,
    RECORDS,
    VICTIM,
    contents,
    findings,
    victim_path,
)
from support.attacks import Attack, attacks, check_ending, dropped, refused
from support.store import settings_for
from support.without_privilege import file_modes_hold

import exvideo_train.files
import exvideo_train.tensor_files
from exvideo_train.clips.record import write_manifest
from exvideo_train.clips.workers import Failure
from exvideo_train.errors import UserError
from exvideo_train.latents.clip_file import MissingLatent, UnreadableLatent
from exvideo_train.latents.encode import refuse_linked_store
from exvideo_train.latents.encode_plan import EncodePlan, make_plan, set_damaged_aside, write_index
from exvideo_train.latents.inspection import describe_stats
from exvideo_train.latents.quarantine import Quarantine, quarantine_clip
from exvideo_train.latents.store import LatentStore
from exvideo_train.latents.verification import verify_store

# -- files that cannot be read: nothing is known of them, so nothing is done to them ------------------------------


@contextmanager
def no_more_files() -> Iterator[None]:
    """Every further open() fails, as for a process with too many files."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    with open("/dev/null") as last:
        resource.setrlimit(resource.RLIMIT_NOFILE, (last.fileno() + 1, before[1]))
        kept = []
        try:
            # What is free below the limit.
            while True:
                kept.append(os.open("/dev/null", os.O_RDONLY))
        except OSError:
            pass
        try:
            yield
        finally:
            for descriptor in kept:
                os.close(descriptor)
            resource.setrlimit(resource.RLIMIT_NOFILE, before)


@contextmanager
def without_permission(path: Path, mode: int = 0) -> Iterator[None]:
    before = path.stat().st_mode
    path.chmod(mode)
    try:
        with file_modes_hold():
            yield
    finally:
        path.chmod(before)


@contextmanager
def disk_error(path: Path) -> Iterator[None]:
    """Reading the file fails as on a broken disk; no disk breaks on demand, so the stream does."""
    real = exvideo_train.files.open_regular

    def open_broken(asked: Path) -> BinaryIO:
        stream = real(asked)
        if asked != path:
            return stream
        return BrokenStream(stream)  # type: ignore[return-value]

    readers = (exvideo_train.files, exvideo_train.tensor_files)
    for module in readers:
        module.open_regular = open_broken
    try:
        yield
    finally:
        for module in readers:
            module.open_regular = real


class BrokenStream:
    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream

    def __enter__(self) -> BrokenStream:
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()

    def fileno(self) -> int:
        return self._stream.fileno()

    def read(self, _: int = -1) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))


def unreadable(name: str, fault: Any, part: Callable[[LatentStore], Path], *says: str, mode: int = 0) -> Attack:
    """A fault that a part of the store has for a while."""
    options = {"mode": mode} if mode else {}
    return dropped(name, lambda store: fault(part(store), **options), *says)


def shard_path(store: LatentStore) -> Path:
    return victim_path(store).parent


def empty_path(store: LatentStore) -> Path:
    return store.empty_prompt_path


DENIED, BROKEN = "Permission denied", "Input/output error"
UNREADABLE = [
    unreadable("a file without permission", without_permission, victim_path, VICTIM.clip_id, DENIED),
    unreadable("a file on a broken disk", disk_error, victim_path, VICTIM.clip_id, BROKEN),
    unreadable("the empty prompt without permission", without_permission, empty_path, "empty_prompt", DENIED),
    unreadable("the empty prompt on a broken disk", disk_error, empty_path, "empty_prompt", BROKEN),
    unreadable("the index without permission", without_permission, lambda s: s.index_path, "index.jsonl", DENIED),
    unreadable("a shard that can only be listed", without_permission, shard_path, DENIED, mode=0o400),
    unreadable("a shard that cannot be listed", without_permission, shard_path, "cannot be listed", mode=0o100),
]


@attacks(UNREADABLE)
def test_what_cannot_be_read_stays(attack: Attack, store: LatentStore) -> None:
    before = contents(store.path)
    with attack.content(store):
        found = verify_store(store, repair=True, num_workers=1)
        check_ending(attack, lambda: findings(found))
        assert not found.is_clean
        assert not found.is_repairable
        assert not found.moved
    assert contents(store.path) == before
    assert verify_store(store, repair=False, num_workers=1).is_clean


@pytest.mark.parametrize("folder", [".", "clips", "clips/9x32x48_8fps"])
def test_folders_without_permission_stay(folder: str, store: LatentStore) -> None:
    before = contents(store.path)
    with without_permission(store.path / folder):
        found = verify_store(store, repair=True, num_workers=1)
    assert not found.is_clean
    assert DENIED in found.describe()
    assert contents(store.path) == before


def test_too_many_open_files_damage_nothing(store: LatentStore) -> None:
    before = contents(store.path)
    assert verify_store(store, repair=False, num_workers=1).is_clean
    with no_more_files():
        found = verify_store(store, repair=True, num_workers=1)
    assert found.index_unreadable is not None
    assert "Too many open files" in found.describe()
    assert contents(store.path) == before


def test_damaged_and_unreadable_side_by_side(store: LatentStore) -> None:
    """Only what was read and is wrong moves; the other keeps its file and its line."""
    wrong = store.clip_path(RECORDS[1].clip_id, GEOMETRY)
    content = wrong.read_bytes()[:-1] + b"!"
    wrong.write_bytes(content)
    with open(store.index_path, "a") as index:
        index.write("[]\n")
    with without_permission(victim_path(store)):
        found = verify_store(store, repair=True, num_workers=1)
    (result,) = found.geometries
    assert (set(result.damaged), set(result.unreadable)) == ({RECORDS[1].clip_id}, {VICTIM.clip_id})
    assert "1 damaged" in found.describe()
    assert "1 that cannot be read" in found.describe()
    assert set(store.clip_ids(GEOMETRY)) == {record.clip_id for record in RECORDS} - {RECORDS[1].clip_id}
    kept = {path.name: path.read_bytes() for path in found.moved}
    assert kept[wrong.name] == content
    assert kept["index.jsonl"].endswith(b"[]\n")
    # A second one of the same name does not replace the first.
    wrong.write_bytes(b"worse")
    (second,) = verify_store(store, repair=True, num_workers=1).moved
    assert (second.name, second.read_bytes()) == (f"{RECORDS[1].clip_id}.1.safetensors", b"worse")
    assert (store.path / "damaged" / wrong.relative_to(store.path)).read_bytes() == content
    assert verify_store(store, repair=False, num_workers=1).is_clean


def test_verify_tells_both_apart_as_a_command(store: LatentStore, run_command: Any) -> None:
    command = ["tests/support/without_privilege.py", "-m", "exvideo_train.latents", "verify", f"latents={store.path}"]
    victim_path(store).chmod(0)
    store.clip_path(RECORDS[1].clip_id, GEOMETRY).write_bytes(b"")
    result = run_command(command, status=1)
    assert "4 whole, 1 damaged" in result.stdout
    assert "1 that cannot be read" in result.stdout
    assert "make them readable" in result.stdout or "make it readable" in result.stdout
    assert "Traceback" not in result.stderr
    assert victim_path(store).exists()
    victim_path(store).chmod(0o644)
    assert "5 clips" in describe_stats(store, 9)


# -- what has a clip's name and is no file ----------------------------------------------------------------------------


def as_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        folder = os.getcwd()
        # A path of a socket holds 107 characters.
        os.chdir(path.parent)
        try:
            server.bind(path.name)
        finally:
            os.chdir(folder)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, as_socket], ids=["pipe", "folder", "socket"])
def test_no_file_under_a_clips_name(make: Callable[[Path], None], store: LatentStore) -> None:
    path = victim_path(store)
    path.unlink()
    make(path)
    found = verify_store(store, repair=True, num_workers=1)
    assert "regular file" in found.geometries[0].unreadable[VICTIM.clip_id] or "cannot be opened" in found.describe()
    assert os.path.lexists(path)
    with pytest.raises(UnreadableLatent, match=VICTIM.clip_id):
        store.read(VICTIM.clip_id, GEOMETRY)


# -- links: none below a store is followed ----------------------------------------------------------------------------


def move_out(store: LatentStore, path: Path) -> None:
    """The part of the store moves outside, and a link to it takes its place."""
    target = store.path.parent / "outside" / path.name
    path.rename(target)
    path.symlink_to(target)


LINKS = [
    dropped("a clip's file", "clip", f"link clips/{GEOMETRY.name}/{VICTIM.clip_id[:3]}/{VICTIM.clip_id}"),
    dropped("a shard", "shard", f"link clips/{GEOMETRY.name}/{VICTIM.clip_id[:3]}"),
    dropped("a geometry", "geometry", f"link clips/{GEOMETRY.name}"),
    dropped("all clips", "clips", "link clips"),
    dropped("the index", "index", "link index.jsonl"),
    dropped("the empty prompt", "empty", "link empty_prompt.safetensors"),
    dropped("the reports", "reports", "link reports"),
    dropped("quarantine", "quarantine", "link reports/quarantine"),
    refused("the description", "description", "store.json is a link"),
]


def linked_part(store: LatentStore, name: str) -> Path:
    quarantine = store.path / "reports" / "quarantine"
    quarantine.mkdir(parents=True, exist_ok=True)
    clips = store.path / "clips"
    return {
        "clip": victim_path(store),
        "shard": victim_path(store).parent,
        "geometry": clips / GEOMETRY.name,
        "clips": clips,
        "index": store.index_path,
        "empty": store.empty_prompt_path,
        "reports": store.path / "reports",
        "quarantine": quarantine,
        "description": store.path / "store.json",
    }[name]


@attacks(LINKS)
def test_links_are_not_followed(attack: Attack, store: LatentStore) -> None:
    part = linked_part(store, attack.content)
    move_out(store, part)
    # Damage behind the link would be moved by whoever followed it.
    for path in (store.path.parent / "outside").rglob("*.safetensors"):
        path.write_bytes(b"damaged")
    outside = contents(store.path.parent / "outside")

    def run() -> Mapping[str, str]:
        found = verify_store(LatentStore.open(store.path), repair=True, num_workers=1)
        assert not found.is_clean
        assert not found.is_repairable
        return {link: f"link {link}" for link in found.survey.links}

    check_ending(attack, run)
    assert part.is_symlink()
    assert contents(store.path.parent / "outside") == outside
    # Whatever is linked, encoding refuses it before it writes, and training names it.
    if attack.content not in ("clip", "shard"):
        with pytest.raises(UserError, match="link"):
            refuse_linked_store(store.path, GEOMETRY)
    with pytest.raises(UserError, match="link"):
        use_everything(store)


def use_everything(store: LatentStore) -> None:
    LatentStore.open(store.path)
    store.empty_prompt()
    store.clip_ids(GEOMETRY)
    store.read(VICTIM.clip_id, GEOMETRY)
    list(Quarantine(store.path, GEOMETRY))


def test_the_store_itself_may_be_a_link(store: LatentStore, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(store.path)
    linked = LatentStore.open(tmp_path / "link")
    assert verify_store(linked, repair=True, num_workers=1).is_clean
    refuse_linked_store(linked.path, GEOMETRY)
    assert linked.read(VICTIM.clip_id, GEOMETRY).caption == VICTIM.caption


def test_nothing_is_written_through_a_link(store: LatentStore) -> None:
    part = victim_path(store).parent
    move_out(store, part)
    outside = contents(store.path.parent / "outside")
    with pytest.raises(UserError, match="link"):
        store.write_clip(VICTIM.clip_id, GEOMETRY, {"moments": torch.zeros(4, 3, 4, 6), "text": torch.zeros(5, 6)}, "x")
    with pytest.raises(UserError, match="link"):
        quarantine_clip(store, Quarantine(store.path, GEOMETRY), VICTIM, Failure("missing", "x"))
    (store.path / "damaged").symlink_to(store.path.parent / "outside")
    store.empty_prompt_path.write_bytes(b"damaged")
    with pytest.raises(UserError, match="damaged is a link"):
        set_damaged_aside(store, GEOMETRY, [])
    assert contents(store.path.parent / "outside") == outside


# -- encoding into a store in which something cannot be read -------------------------------------------------------


def plan_of(store: LatentStore, folder: Path) -> EncodePlan:
    for part, config in (("vae", {"latent_channels": 2}), ("text_encoder", {"d_model": 6})):
        (folder / "model" / part).mkdir(parents=True, exist_ok=True)
        (folder / "model" / part / "config.json").write_text(json.dumps(config))
    write_manifest(folder / "clips.jsonl", RECORDS)
    settings = settings_for(store, GEOMETRY, folder / "model")
    plan = make_plan(settings, store, folder / "clips.jsonl", retry_quarantined=False, max_clips=0)
    plan.describe(settings)
    return plan


@attacks(case for case in UNREADABLE if case.name.startswith("a file"))
def test_encoding_leaves_an_unreadable_clip_alone(attack: Attack, store: LatentStore, tmp_path: Path) -> None:
    store.index_path.unlink()
    before = victim_path(store).read_bytes()
    with attack.content(store):
        plan = plan_of(store, tmp_path)
        check_ending(attack, lambda: plan.unreadable)
        assert (plan.pending, plan.num_reused, plan.num_unreadable, plan.damaged) == ([], 5, 1, {})
        set_damaged_aside(store, GEOMETRY, plan.damaged)
        write_index(store, GEOMETRY, {})
    assert victim_path(store).read_bytes() == before
    assert len(store.clip_ids(GEOMETRY)) == 5
    assert plan_of(store, tmp_path).num_reused == 6


def test_encoding_keeps_the_line_of_an_unreadable_clip(store: LatentStore, tmp_path: Path) -> None:
    before = store.index_path.read_bytes()
    with without_permission(victim_path(store)):
        assert plan_of(store, tmp_path).pending == []
        write_index(store, GEOMETRY, {})
    assert store.index_path.read_bytes() == before


@attacks(case for case in UNREADABLE if "shard that cannot be listed" in case.name)
def test_encoding_stops_at_a_folder_that_cannot_be_listed(attack: Attack, store: LatentStore, tmp_path: Path) -> None:
    with attack.content(store):
        check_ending(refused(attack.name, None, *attack.says), lambda: plan_of(store, tmp_path).unreadable)


@attacks(case for case in UNREADABLE if "empty prompt" in case.name)
def test_encoding_stops_at_an_unreadable_empty_prompt(attack: Attack, store: LatentStore) -> None:
    before = store.empty_prompt_path.read_bytes()
    with attack.content(store), pytest.raises(UnreadableLatent, match="empty_prompt"):
        set_damaged_aside(store, GEOMETRY, [])
    assert store.empty_prompt_path.read_bytes() == before


def test_encoding_moves_damaged_files_aside(store: LatentStore, tmp_path: Path) -> None:
    store.index_path.unlink()
    victim_path(store).write_bytes(b"damaged")
    plan = plan_of(store, tmp_path)
    assert [record.clip_id for record in plan.pending] == [VICTIM.clip_id]
    set_damaged_aside(store, GEOMETRY, plan.damaged)
    assert (store.path / "damaged" / victim_path(store).relative_to(store.path)).read_bytes() == b"damaged"
    with pytest.raises(MissingLatent):
        store.read_entry(VICTIM.clip_id, GEOMETRY)


def test_clip_that_fails_with_another_caption_leaves_its_former_latent_aside(store: LatentStore) -> None:
    before = victim_path(store).read_bytes()
    quarantine_clip(store, Quarantine(store.path, GEOMETRY), VICTIM, Failure("missing", "no such file"))
    assert not victim_path(store).exists()
    assert (store.path / "damaged" / victim_path(store).relative_to(store.path)).read_bytes() == before
