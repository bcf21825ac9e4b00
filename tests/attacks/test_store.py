"""Latent stores from strangers, and healthy ones on disks that fail: nothing healthy is lost, nothing leaves the store.

A store of six clips is attacked in one place. What was read and is wrong costs itself; what could not be read is left
as it is; links are not followed; a file of another shape is refused by name.
"""

from __future__ import annotations

import errno
import json
import math
import os
import resource
import shutil
import socket
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch
from support.attacks import Attack, Ending, attacks, check_ending, dropped, held, refused
from support.store import settings_for
from support.without_privilege import file_modes_hold

import exvideo_train.files
from exvideo_train.clips.record import ClipRecord, make_clip_id, write_manifest
from exvideo_train.clips.workers import Failure
from exvideo_train.errors import UserError
from exvideo_train.geometry import Geometry
from exvideo_train.latents.clip_file import METADATA_KEY, CorruptLatent, MissingLatent, UnreadableLatent
from exvideo_train.latents.encode import refuse_linked_store
from exvideo_train.latents.fingerprint import Fingerprint
from exvideo_train.latents.inspection import StoreVerification, describe_stats, verify_store
from exvideo_train.latents.plan import Plan, make_plan, set_damaged_aside, write_index
from exvideo_train.latents.report import totals_from_json
from exvideo_train.latents.store import LatentStore, Quarantine, quarantine_clip
from exvideo_train.models.cogvideox.encoding import read_normalisation
from exvideo_train.models.normalisation import Normalisation
from exvideo_train.training.dataset import LatentDataset
from exvideo_train.training.job import _check_channels
from exvideo_train.training.order import SampleOrder

GEOMETRY = Geometry(9, 32, 48, 8)
SHA256 = {"vae": "v" * 64, "text_encoder": "t" * 64, "tokenizer": "k" * 64}
FINGERPRINT = Fingerprint(SHA256, "fp32", "fp32", False, 5, 9, 32, 48, 8.0)
RECORDS = [
    ClipRecord(make_clip_id("t", str(n), 0, None), "t", f"/videos/{n}.mp4", 0, None, f"caption {n}") for n in range(6)
]
VICTIM = RECORDS[0]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six clips; read only."""
    path = tmp_path_factory.mktemp("whole") / "store"
    store = LatentStore.create(path, Normalisation((0.7,)))
    store.add_geometry(FINGERPRINT)
    generator = torch.Generator().manual_seed(0)
    entries = []
    for record in RECORDS:
        moments, text = torch.randn((4, 3, 4, 6), generator=generator), torch.randn((5, 6), generator=generator)
        entries.append(store.write_clip(record.clip_id, GEOMETRY, {"moments": moments, "text": text}, record.caption))
    store.write_empty_prompt({"text": torch.full((5, 6), 0.5)})
    store.write_index(entries)
    return path


@pytest.fixture
def store(whole: Path, tmp_path: Path) -> LatentStore:
    """A copy to attack, beside a folder ``outside`` with a file that nobody may touch."""
    shutil.copytree(whole, tmp_path / "store")
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "precious.txt").write_text("precious")
    return LatentStore.open(tmp_path / "store")


def victim_path(store: LatentStore) -> Path:
    return store.clip_path(VICTIM.clip_id, GEOMETRY)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and not p.is_symlink()}


def findings(found: StoreVerification) -> dict[str, str]:
    """All that a verification lists, but what is no part of the store."""
    (result,) = found.geometries
    drops = {**result.damaged, **result.unreadable, **dict.fromkeys(result.missing, "missing")}
    drops |= {link: f"link {link}" for link in found.survey.links}
    drops |= {reason: reason for reason in (*found.survey.unreadable, *found.index_damage)}
    for reason in (found.empty_prompt_damage, found.empty_prompt_unreadable, found.index_unreadable):
        if reason is not None:
            drops[reason] = reason
    return drops


# -- headers of latent files: each costs its own clip, by the name of the field ------------------------------


@dataclass
class File:
    """A latent file taken apart."""

    header: dict[str, Any]
    content: dict[str, Any]
    data: bytes

    @classmethod
    def read(cls, path: Path) -> File:
        raw = path.read_bytes()
        (length,) = struct.unpack("<Q", raw[:8])
        header = json.loads(raw[8 : 8 + length])
        return cls(header, json.loads(header.pop("__metadata__")[METADATA_KEY]), raw[8 + length :])

    def write(self, path: Path) -> None:
        text = json.dumps({"__metadata__": {METADATA_KEY: json.dumps(self.content)}, **self.header}).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + self.data)


def saying(**fields: Any) -> Callable[[File], None]:
    """Fields of what the file says of itself; ... takes one away."""

    def change(file: File) -> None:
        file.content |= fields
        file.content = {name: value for name, value in file.content.items() if value is not ...}

    return change


def tensors(**changes: torch.Tensor | None) -> Callable[[File], None]:
    """Other tensors, with a checksum that fits them: only the schema can tell."""

    def change(file: File) -> None:
        from safetensors.torch import load, save

        from exvideo_train.latents.clip_file import tensors_digest

        text = json.dumps(file.header).encode()
        held_now = load(struct.pack("<Q", len(text)) + text + file.data) | changes
        new = {name: tensor for name, tensor in held_now.items() if tensor is not None}
        raw = save(new)
        (length,) = struct.unpack("<Q", raw[:8])
        file.header, file.data = json.loads(raw[8 : 8 + length]), raw[8 + length :]
        file.content["sha256"] = tensors_digest(new)

    return change


HEADERS = [
    dropped("no caption", saying(caption=...), VICTIM.clip_id, "caption is missing"),
    dropped("caption null", saying(caption=None), VICTIM.clip_id, "caption=None: must be text"),
    dropped("caption a number", saying(caption=7), VICTIM.clip_id, "caption=7: must be text"),
    dropped("caption a list", saying(caption=["a"]), VICTIM.clip_id, "caption=['a']"),
    dropped("caption with half a character", saying(caption="\ud83d"), VICTIM.clip_id, METADATA_KEY),
    dropped("caption of 20 MB", saying(caption="x" * 20_000_000), VICTIM.clip_id, "header of 20"),
    dropped("no checksum", saying(sha256=...), VICTIM.clip_id, "sha256 is missing"),
    dropped("checksum null", saying(sha256=None), VICTIM.clip_id, "sha256=None"),
    dropped("checksum a list", saying(sha256=[]), VICTIM.clip_id, "sha256=[]"),
    dropped("checksum short", saying(sha256="ab"), VICTIM.clip_id, "sha256='ab'"),
    dropped("checksum of another file", saying(sha256="0" * 64), VICTIM.clip_id, "checksum"),
    dropped("another clip", saying(clip_id=RECORDS[1].clip_id), VICTIM.clip_id, "clip_id is"),
    dropped("id that climbs", saying(clip_id="../../../x"), VICTIM.clip_id, "clip_id='../../../x'"),
    dropped("id with an escape", saying(clip_id="\x1b[31mred"), VICTIM.clip_id, r"\x1b[31mred"),
    dropped("another geometry", saying(geometry="49x480x720_8fps"), VICTIM.clip_id, "geometry is"),
    dropped("geometry an object", saying(geometry={}), VICTIM.clip_id, "geometry={}"),
    dropped("another fingerprint", saying(fingerprint="0" * 16), VICTIM.clip_id, "fingerprint is"),
    dropped("fingerprint missing", saying(fingerprint=...), VICTIM.clip_id, "fingerprint is missing"),
    dropped("rate 0", saying(sampling_fps=0), VICTIM.clip_id, "sampling_fps=0"),
    dropped("rate negative", saying(sampling_fps=-8.0), VICTIM.clip_id, "sampling_fps=-8.0"),
    dropped("rate a text", saying(sampling_fps="8"), VICTIM.clip_id, "sampling_fps='8'"),
    dropped("rate true", saying(sampling_fps=True), VICTIM.clip_id, "sampling_fps=True"),
    dropped("rate NaN", saying(sampling_fps=math.nan), VICTIM.clip_id, "NaN"),
    dropped("rate infinite", saying(sampling_fps=math.inf), VICTIM.clip_id, "Infinity"),
    dropped("rate of 400 digits", saying(sampling_fps=int("1" * 400)), VICTIM.clip_id, "digits"),
    dropped("tokens cut -1", saying(num_tokens_cut=-1), VICTIM.clip_id, "num_tokens_cut=-1"),
    dropped("tokens cut 1.5", saying(num_tokens_cut=1.5), VICTIM.clip_id, "num_tokens_cut=1.5"),
    dropped("refusal a number", saying(decord_refusal=3), VICTIM.clip_id, "decord_refusal=3"),
    dropped("says nothing", lambda file: setattr(file, "content", []), VICTIM.clip_id, "no JSON object"),
    dropped("no moments", tensors(moments=None), VICTIM.clip_id, "expected moments, text"),
    dropped("no text", tensors(text=None), VICTIM.clip_id, "expected moments, text"),
    dropped("a third tensor", tensors(extra=torch.zeros(2)), VICTIM.clip_id, "'extra'"),
    dropped(
        "moments of integers", tensors(moments=torch.zeros(4, 3, 4, 6).int()), VICTIM.clip_id, "moments: dtype='I32'"
    ),
    dropped("moments of booleans", tensors(moments=torch.zeros(4, 3, 4, 6).bool()), VICTIM.clip_id, "dtype='BOOL'"),
    dropped("moments of another float", tensors(moments=torch.zeros(4, 3, 4, 6).half()), VICTIM.clip_id, "dtype='F16'"),
    dropped("text of integers", tensors(text=torch.zeros(5, 6).long()), VICTIM.clip_id, "text: dtype='I64'"),
    dropped("moments a number", tensors(moments=torch.zeros(())), VICTIM.clip_id, "moments: shape=()"),
    dropped("moments empty", tensors(moments=torch.zeros(0, 3, 4, 6)), VICTIM.clip_id, "moments: shape=(0, 3, 4, 6)"),
    dropped("moments odd", tensors(moments=torch.zeros(3, 3, 4, 6)), VICTIM.clip_id, "moments: shape=(3, 3, 4, 6)"),
    dropped("fewer channels", tensors(moments=torch.zeros(2, 3, 4, 6)), VICTIM.clip_id, "expected (4, 3, 4, 6)"),
    dropped("more frames", tensors(moments=torch.zeros(4, 4, 4, 6)), VICTIM.clip_id, "shape=(4, 4, 4, 6)"),
    dropped("other height", tensors(moments=torch.zeros(4, 3, 5, 6)), VICTIM.clip_id, "shape=(4, 3, 5, 6)"),
    dropped("other width", tensors(moments=torch.zeros(4, 3, 4, 7)), VICTIM.clip_id, "shape=(4, 3, 4, 7)"),
    dropped("shorter text", tensors(text=torch.zeros(4, 6)), VICTIM.clip_id, "text: shape=(4, 6)"),
    dropped("narrower text", tensors(text=torch.zeros(5, 5)), VICTIM.clip_id, "text: shape=(5, 5)"),
    dropped("text of three axes", tensors(text=torch.zeros(5, 6, 1)), VICTIM.clip_id, "text: shape=(5, 6, 1)"),
    dropped(
        "NaN in moments", tensors(moments=torch.full((4, 3, 4, 6), math.nan)), VICTIM.clip_id, "moments has infinite"
    ),
    dropped("one infinity in text", tensors(text=torch.eye(5, 6) / 0), VICTIM.clip_id, "text has infinite"),
]


@attacks(HEADERS)
def test_header_of_a_latent_file(attack: Attack, store: LatentStore) -> None:
    path = victim_path(store)
    file = File.read(path)
    attack.content(file)
    file.write(path)
    wrong = path.read_bytes()
    check_ending(attack, lambda: findings(verify_store(store, repair=True, num_workers=1)))
    assert not path.exists()
    assert (store.path / "damaged" / path.relative_to(store.path)).read_bytes() == wrong
    assert len(store.clip_ids(GEOMETRY)) == 5


@attacks(case for case in HEADERS if "infinit" not in str(case.says) and "NaN" not in case.name)
def test_training_goes_on_without_such_a_file(attack: Attack, store: LatentStore) -> None:
    file = File.read(victim_path(store))
    attack.content(file)
    file.write(victim_path(store))
    order = SampleOrder([6], [1], seed=0)
    ids = store.clip_ids(GEOMETRY)
    dataset = LatentDataset(
        LatentStore.open(store.path), [(GEOMETRY, ids)], order, seed=0, num_levels=1000, caption_dropout=0.5
    )
    samples = [dataset[position] for position in range(6)]
    assert {clip_id for sample in samples for clip_id in sample.replaced} == {VICTIM.clip_id}
    assert {sample.latents_TCHW.shape for sample in samples} == {(3, 2, 4, 6)}


# -- files that cannot be read: nothing is known of them, so nothing is done to them --------------------------


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

    exvideo_train.files.open_regular = open_broken
    try:
        yield
    finally:
        exvideo_train.files.open_regular = real


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


# -- what has a clip's name and is no file --------------------------------------------------------------------


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


# -- links: none below a store is followed --------------------------------------------------------------------


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


# -- store.json -----------------------------------------------------------------------------------------------


def described(**changes: Any) -> bytes:
    return json.dumps(DESCRIPTION | changes).encode()


def fingerprinted(**changes: Any) -> bytes:
    """A fingerprint with other fields; ... takes one away."""
    fields = {k: v for k, v in (FINGERPRINT.to_json() | changes).items() if v is not ...}
    return described(geometries={GEOMETRY.name: fields})


DESCRIPTION = {"format_version": 1, "scaling_factor": 0.7, "geometries": {GEOMETRY.name: FINGERPRINT.to_json()}}
DEEP = b"[" * 100_000
DESCRIPTIONS = [
    held("as it is", described()),
    held("with a field of its own", described(comment="mine")),
    refused("empty", b"", "store.json"),
    refused("a list", b"[]", "store.json", "[] is no JSON object"),
    refused("null", b"null", "store.json", "None is no JSON object"),
    refused("a number", b"7", "store.json"),
    refused("a text", b'"x"', "store.json"),
    refused("nested deep", DEEP, "store.json"),
    refused("UTF-16", described().decode().encode("utf-16"), "store.json"),
    refused("Latin-1", b'{"format_version": "\xe9"}', "store.json"),
    refused("half of it", described()[:60], "store.json"),
    refused("no version", b"{}", "store.json", "format_version is missing"),
    refused("version a text", described(format_version="1"), "format_version='1'"),
    refused("version true", described(format_version=True), "format_version=True"),
    refused("version of 400 digits", b'{"format_version": %s}' % (b"9" * 400), "store.json", "digits"),
    refused("another version", described(format_version=2), "format_version=2", "this version reads 1"),
    refused("no geometries", b'{"format_version": 1, "scaling_factor": 1}', "geometries is missing"),
    refused("geometries a list", described(geometries=[]), "geometries=[]"),
    refused("a geometry null", described(geometries={GEOMETRY.name: None}), "None is no fingerprint"),
    refused("a geometry a list", described(geometries={GEOMETRY.name: []}), "[] is no fingerprint"),
    refused("a name that climbs", described(geometries={"../../x": FINGERPRINT.to_json()}), "'../../x'"),
    refused("another name", described(geometries={"49x480x720_8fps": FINGERPRINT.to_json()}), "49x480x720_8fps"),
    refused("an unknown field", fingerprinted(extra=1), "'extra'"),
    refused("a field is missing", fingerprinted(tiling=...), "'tiling'"),
    refused("frames a text", fingerprinted(num_frames="9"), "num_frames='9'"),
    refused("frames null", fingerprinted(num_frames=None), "num_frames=None"),
    refused("frames not of the VAE", fingerprinted(num_frames=10), "num_frames=10"),
    refused("height true", fingerprinted(height=True), "height=True"),
    refused("height negative", fingerprinted(height=-16), "height=-16"),
    refused("width 1e999", fingerprinted().replace(b'"width": 48', b'"width": 1e999'), "store.json"),
    refused("rate NaN", fingerprinted(fps=math.nan), "NaN"),
    refused("rate 0", fingerprinted(fps=0), "fps=0"),
    refused("digest a list", fingerprinted(vae_sha256=[]), "vae_sha256=[]"),
    refused("dtype unknown", fingerprinted(vae_dtype="int8"), "vae_dtype='int8'"),
    refused("tiling a text", fingerprinted(tiling="no"), "tiling='no'"),
    refused("text length 0", fingerprinted(text_length=0), "text_length=0"),
    refused("rule a text", fingerprinted(frame_rule_version="1"), "frame_rule_version='1'"),
    refused("decoder a list", fingerprinted(decoder=["pyav"]), "decoder=['pyav']"),
]


@attacks(DESCRIPTIONS)
def test_description_of_a_store(attack: Attack, tmp_path: Path) -> None:
    (tmp_path / "store.json").write_bytes(attack.content)

    def run() -> Mapping[str, str]:
        LatentStore.open(tmp_path)
        LatentStore.create(tmp_path, 0.7)
        return {}

    check_ending(attack, run)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir], ids=["pipe", "folder"])
def test_description_that_is_no_file(make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path / "store.json")
    with pytest.raises(UserError, match="not a regular file"):
        LatentStore.open(tmp_path)


# -- the scaling factor: in store.json, in vae/config.json, and when a store is begun --------------------------

FACTORS = [
    held("published", "0.7"),
    held("one", "1"),
    refused("zero", "0", "scaling_factor=0"),
    refused("negative zero", "-0.0", "scaling_factor=-0.0"),
    refused("negative", "-0.7", "scaling_factor=-0.7"),
    refused("NaN", "NaN", "scaling_factor"),
    refused("infinite", "Infinity", "scaling_factor"),
    refused("1e999", "1e999", "scaling_factor"),
    refused("1e-300", "1e-300", "scaling_factor=1e-300"),
    refused("400 digits", "1" * 400, "scaling_factor"),
    refused("text", '"0.7"', "scaling_factor='0.7'"),
    refused("true", "true", "scaling_factor=True"),
    refused("null", "null", "scaling_factor=None"),
    refused("list", "[0.7]", "scaling_factor=[0.7]"),
]


def nothing_dropped(_: object) -> Mapping[str, str]:
    return {}


@attacks(FACTORS)
def test_scaling_factor(attack: Attack, tmp_path: Path) -> None:
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text(f'{{"scaling_factor": {attack.content}}}')
    check_ending(attack, lambda: nothing_dropped(read_normalisation(tmp_path)))
    value = json.loads(attack.content)
    if attack.ending is Ending.REFUSED:
        with pytest.raises(ValueError, match="scaling_factor"):
            Normalisation((value,))
    description = json.dumps({**DESCRIPTION, "scaling_factor": "FACTOR"}).replace('"FACTOR"', attack.content)
    (tmp_path / "store.json").write_text(description)
    in_store = replace(attack, says=["store.json"] if attack.says else [])
    check_ending(in_store, lambda: nothing_dropped(LatentStore.open(tmp_path)))


@attacks(
    [
        refused("a list", b"[]", "config.json", "holds a list, not an object"),
        refused("null", b"null", "config.json"),
        refused("nested deep", DEEP, "config.json"),
        refused("Latin-1", b'{"x": "\xe9"}', "config.json"),
        refused("no factor", b"{}", "config.json", "scaling_factor"),
    ]
)
def test_config_of_another_shape(attack: Attack, tmp_path: Path) -> None:
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_bytes(attack.content)
    check_ending(attack, lambda: nothing_dropped(read_normalisation(tmp_path)))


# -- index.jsonl: training refuses it by its line, verification lists the line and writes it anew --------------


def entry_line(**changes: Any) -> bytes:
    entry = {"geometry": GEOMETRY.name, "clip_id": "f" * 32, "num_bytes": 1, "sha256": "0" * 64, "caption_sha256": "0"}
    fields = {k: v for k, v in (entry | changes).items() if v is not ...}
    return json.dumps(fields).encode()


LINES = [
    dropped("half a line", b'{"clip_id": ', "line 7"),
    dropped("empty line", b"", "line 7"),
    dropped("a list", b"[]", "line 7", "[] is no JSON object"),
    dropped("null", b"null", "line 7"),
    dropped("a number", b"7", "line 7"),
    dropped("NaN", b"NaN", "line 7"),
    dropped("nested deep", DEEP[:60_000], "line 7"),
    dropped("a line of 200 kB", b"[" * 200_000, "line 7", "longer than"),
    dropped("not UTF-8", b"\xff\xfe{}", "line 7"),
    dropped("zeros", b"\0" * 100, "line 7"),
    dropped("id null", entry_line(clip_id=None), "line 7", "clip_id=None"),
    dropped("id a number", entry_line(clip_id=7), "line 7", "clip_id=7"),
    dropped("id that climbs", entry_line(clip_id="../../../../outside/precious"), "line 7", "clip_id='../"),
    dropped("id of 300 letters", entry_line(clip_id="a" * 300), "line 7", "clip_id='aaa"),
    dropped("id missing", entry_line(clip_id=...), "line 7", "clip_id is missing"),
    dropped("geometry a list", entry_line(geometry=[]), "line 7", "geometry=[]"),
    dropped("size a text", entry_line(num_bytes="1"), "line 7", "num_bytes='1'"),
    dropped("size negative", entry_line(num_bytes=-1), "line 7", "num_bytes=-1"),
    dropped(
        "size of 400 digits",
        entry_line(num_bytes=0).replace(b": 0,", b": %s," % (b"9" * 400)),
        "line 7",
        "num_bytes=9999",
    ),
    dropped("checksum null", entry_line(sha256=None), "line 7", "sha256=None"),
    dropped("rate infinite", entry_line(sampling_fps=math.inf), "line 7"),
    dropped("rate a text", entry_line(sampling_fps="8"), "line 7", "sampling_fps='8'"),
    dropped("tokens a list", entry_line(num_tokens_cut=[]), "line 7", "num_tokens_cut=[]"),
    dropped("unknown field", entry_line(extra=1), "line 7", "'extra'"),
    dropped("a clip again", b"AGAIN", "line 7", "earlier line"),
]


@attacks(LINES)
def test_line_of_the_index(attack: Attack, store: LatentStore) -> None:
    before = store.index_path.read_bytes()
    line = before.splitlines()[2] if attack.content == b"AGAIN" else attack.content
    store.index_path.write_bytes(before + line + b"\n")
    with pytest.raises(UserError, match=r"index.jsonl line 7 .*verify"):
        store.clip_ids(GEOMETRY)
    with pytest.raises(UserError, match=r"index.jsonl line 7 "):
        describe_stats(store, 3)
    check_ending(attack, lambda: findings(verify_store(store, repair=True, num_workers=1)))
    assert store.index_path.read_bytes() == before
    assert (store.path / "damaged" / "index.jsonl").read_bytes() == before + line + b"\n"
    assert verify_store(store, repair=False, num_workers=1).is_clean


def test_index_of_an_unknown_geometry_or_of_a_clip_that_is_gone(store: LatentStore) -> None:
    before = store.index_path.read_bytes()
    lines = [entry_line(geometry="../../outside"), entry_line(clip_id="e" * 32), entry_line()]
    store.index_path.write_bytes(before + b"\n".join(lines) + b"\n")
    found = verify_store(store, repair=True, num_workers=1)
    assert len(found.index_damage) == 1
    assert found.geometries[0].missing == ["e" * 32, "f" * 32]
    assert store.index_path.read_bytes() == before


# -- records of quarantine and figures of ranks ----------------------------------------------------------------


def record_of(**changes: Any) -> bytes:
    fields = {"clip_id": VICTIM.clip_id, "reason": "timeout", "detail": "x", "video": "/v.mp4"} | changes
    return json.dumps({k: v for k, v in fields.items() if v is not ...}).encode()


RECORDS_OF_QUARANTINE = [
    dropped("as it is", record_of(), "timeout"),
    dropped("a video whose name is not UTF-8", record_of(video="/\udcff.mp4"), "timeout"),
    dropped("empty", b"", "damaged_record", VICTIM.clip_id),
    dropped("a list", b"[]", "damaged_record", "no JSON object"),
    dropped("null", b"null", "damaged_record"),
    dropped("nested deep", DEEP, "damaged_record"),
    dropped("not UTF-8", b"\xff\xfe", "damaged_record"),
    dropped("of 2 MB", b" " * 2_000_000, "damaged_record", "2000000 bytes"),
    dropped("of another clip", record_of(clip_id=RECORDS[1].clip_id), "damaged_record", "another clip"),
    dropped("reason a list", record_of(reason=["timeout"]), "damaged_record", "reason=['timeout']"),
    dropped("reason missing", record_of(reason=...), "damaged_record", "reason is missing"),
    dropped("unknown field", record_of(extra=1), "damaged_record", "'extra'"),
    held("a file for no clip", None),
]


@attacks(RECORDS_OF_QUARANTINE)
def test_record_of_quarantine(attack: Attack, store: LatentStore) -> None:
    quarantine = Quarantine(store.path, GEOMETRY)
    shard = quarantine.folder / VICTIM.clip_id[:3]
    shard.mkdir(parents=True)
    (quarantine.folder / "notes.json").write_text("[]")
    (shard / "notes.json").write_text("[]")
    (shard / "notes.txt").write_text("mine")
    if attack.content is not None:
        (shard / f"{VICTIM.clip_id}.json").write_bytes(attack.content)
    check_ending(attack, lambda: {e.clip_id: f"{e.reason} {e.detail}" for e in quarantine})
    assert (VICTIM.clip_id in quarantine) == (attack.content is not None)
    quarantine.remove(VICTIM.clip_id)
    assert VICTIM.clip_id not in quarantine


def test_record_of_quarantine_that_is_a_folder(store: LatentStore) -> None:
    quarantine = Quarantine(store.path, GEOMETRY)
    path = quarantine.folder / VICTIM.clip_id[:3] / f"{VICTIM.clip_id}.json"
    path.mkdir(parents=True)
    assert [entry.reason for entry in quarantine] == ["damaged_record"]
    with pytest.raises(UserError, match="cannot be deleted"):
        quarantine.remove(VICTIM.clip_id)


@pytest.mark.parametrize(
    "content",
    [None, 7, {}, [[]], [{}], [{"num_encoded": "1"}], [{"extra": 1}], [{"quarantined": []}]],
    ids=repr,
)
def test_figures_of_a_rank(content: Any) -> None:
    with pytest.raises(ValueError, match=r"is no|is missing|must be|unknown"):
        totals_from_json(content)


# -- what is no part of a store ----------------------------------------------------------------------------------

STRAYS = [
    held("a JSON file at the top", "notes.json"),
    held("a name with a newline", "two\nlines.json"),
    held("a name with an escape", "\x1b[31mred"),
    held("a file among the geometries", "clips/notes.json"),
    held("a folder of an unknown geometry", "clips/49x480x720_8fps/abc/abcdef.safetensors"),
    held("a file among the shards", f"clips/{GEOMETRY.name}/{'0' * 32}.safetensors"),
    held("a JSON file in a shard", f"clips/{GEOMETRY.name}/{VICTIM.clip_id[:3]}/notes.json"),
    held("a clip in another's shard", f"clips/{GEOMETRY.name}/zzz/{VICTIM.clip_id}.safetensors"),
    held("a file without an id", f"clips/{GEOMETRY.name}/{VICTIM.clip_id[:3]}/a clip.safetensors"),
]


@attacks(STRAYS)
def test_strays_are_listed_and_left_alone(attack: Attack, store: LatentStore) -> None:
    stray = store.path / attack.content
    stray.parent.mkdir(parents=True, exist_ok=True)
    stray.write_bytes(b"mine")
    found = verify_store(store, repair=True, num_workers=1)
    check_ending(attack, lambda: findings(found))
    assert len(found.survey.strays) == 1
    assert all(line.isprintable() for line in found.describe().split("\n"))
    assert stray.read_bytes() == b"mine"
    assert found.is_clean


# -- encoding into a store in which something cannot be read -----------------------------------------------------


def plan_of(store: LatentStore, folder: Path) -> Plan:
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


def test_empty_prompt_that_is_not_finite_is_never_written(store: LatentStore) -> None:
    before = store.empty_prompt_path.read_bytes()
    with pytest.raises(UserError, match="empty prompt"):
        store.write_empty_prompt({"text": torch.full((5, 6), math.nan)})
    assert store.empty_prompt_path.read_bytes() == before


def test_cut_files_are_damaged_wherever_they_are_cut(store: LatentStore) -> None:
    content = victim_path(store).read_bytes()
    for length in {*range(0, len(content), max(1, len(content) // 97)), *range(16)}:
        victim_path(store).write_bytes(content[:length])
        with pytest.raises(CorruptLatent, match=VICTIM.clip_id):
            store.read(VICTIM.clip_id, GEOMETRY)


def test_store_whose_tensors_do_not_fit_the_model(store: LatentStore, tiny_model_5b: Path) -> None:
    with pytest.raises(UserError, match="moments 4, text 6, this model needs moments 32, text 32"):
        _check_channels(store, GEOMETRY, tiny_model_5b)
