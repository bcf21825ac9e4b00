"""What video2dataset writes: ``00000/0000000_00000.mp4|.txt|.json`` in folders, or the same members in tar shards.

Shards are read in place: a clip's video is named ``shard.tar::member``.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from exvideo_train.clips.bounds import MAX_LINE_BYTES
from exvideo_train.clips.container import Reason, UnreadableClip
from exvideo_train.clips.record import TAR_SEPARATOR, ClipRecord
from exvideo_train.clips.shards import FOLDER, MAX_MEMBER_BYTES, DamagedShard, Member, iter_members
from exvideo_train.clips.sources.base import (
    BAD_NAME,
    UNREADABLE_SIDECAR,
    VIDEO_SUFFIXES,
    Dropped,
    RawRows,
    as_score,
)
from exvideo_train.clips.sources.folder import MAX_CAPTION_BYTES
from exvideo_train.clips.sources.folders import FolderSource, Listing, name_problem
from exvideo_train.clips.sources.table import parse_object
from exvideo_train.errors import UserError
from exvideo_train.files import open_regular

_SCORES = {
    "matching_score": "matching",
    "aesthetic_score": "aesthetic",
    "Aesthetic_Score": "aesthetic",
    "umt_score": "umt",
    "UMT_Score": "umt",
    "clip_similarity": "clip_similarity",
}
_CAPTION_KEYS = ("caption", "Caption", "text")
_SHARD = ".tar"
_COMPRESSED = (".tar.gz", ".tgz", ".tar.zst", ".tar.bz2", ".tar.xz")
_SIDECARS = (".txt", ".json")
# The content of what lies beside a video, given its path or its member's name and the most bytes of it.
_Read = Callable[[str, int], bytes | None]


@dataclass
class WebDataset(FolderSource):
    """Clips of video2dataset output, found by walking a folder (or one shard)."""

    name: str = field(default="webdataset", init=False)

    shards = (_SHARD,)
    lacking = "neither .tar shards nor video files; give video2dataset's output"

    def __post_init__(self) -> None:
        self._is_shard = self.videos.endswith(_SHARD) and os.path.isfile(self.videos)
        if not self._is_shard:
            super().__post_init__()

    def pieces(self) -> Iterator[RawRows]:
        if not self._is_shard:
            yield from super().pieces()
            return
        folder, name = os.path.split(os.path.abspath(self.videos))
        yield RawRows(folder, [(0, name)], 1)

    def drops(self, listing: Listing) -> list[Dropped]:
        compressed = [_compressed(listing, name) for name in listing.files if name.lower().endswith(_COMPRESSED)]
        return super().drops(listing) + compressed

    def parse(self, piece: RawRows) -> Iterator[ClipRecord | Dropped]:
        yield from piece.dropped
        for _, name in piece.rows:
            path = os.path.join(piece.where, name)
            if name.endswith(_SHARD):
                yield from self._parse_shard(path)
            else:
                yield from self._clip(path, "", self._folder.read)

    def _parse_shard(self, shard: str) -> Iterator[ClipRecord | Dropped]:
        try:
            stream = open_regular(Path(shard))
        except UserError as error:
            yield Dropped(Reason.READ_ERROR.value, str(error), shard)
            return
        with stream:
            descriptor, sidecars, videos, drops = stream.fileno(), dict[str, Member](), list[str](), list[Dropped]()
            try:
                for member in iter_members(descriptor):
                    _sort_member(member, f"{shard}{TAR_SEPARATOR}", sidecars, videos, drops)
            except DamagedShard as damage:
                drops.append(Dropped(Reason.CORRUPT.value, f"{shard}: {damage}; nothing is used from there on", shard))
            yield from drops

            def read(name: str, max_bytes: int) -> bytes | None:
                member = sidecars.get(name)
                if member is None:
                    return None
                if member.kind:
                    raise UnreadableClip(Reason.NOT_A_FILE, f"{name} is {member.kind}")
                return os.pread(descriptor, min(member.size, max_bytes), member.offset)

            for name in sorted(videos):
                yield from self._clip(name, f"{shard}{TAR_SEPARATOR}", read)

    def _clip(self, name: str, prefix: str, read: _Read) -> list[ClipRecord | Dropped]:
        """The clip of a file, or with the prefix ``shard.tar::`` of a member, with what lies beside it."""
        video = prefix + name
        notes: list[ClipRecord | Dropped] = []
        content: dict[str, tuple[str, bytes]] = {}
        for suffix, max_bytes in zip(_SIDECARS, (MAX_CAPTION_BYTES, MAX_LINE_BYTES + 1), strict=True):
            for stem in _stems(name):
                try:
                    found = read(stem + suffix, max_bytes)
                except UnreadableClip as problem:
                    notes.append(
                        Dropped(UNREADABLE_SIDECAR, f"it is not used: {problem.detail}", prefix + stem + suffix, video)
                    )
                    continue
                if found is not None:
                    content[suffix] = prefix + stem + suffix, found
                    break
        metadata: dict[str, Any] = {}
        json_path, json_text = content.get(".json", ("", b"{}"))
        try:
            metadata = parse_object(json_text)
        except ValueError as error:
            notes.append(
                Dropped(UNREADABLE_SIDECAR, f"its scores are lost ({error}); download it again", json_path, video)
            )
        text_path, text = content.get(".txt", (json_path, b""))
        caption = text.decode("utf-8-sig", errors="replace")
        for key in _CAPTION_KEYS:
            value = metadata.get(key)
            if isinstance(value, (list, tuple)) and len(value) == 1:
                value = value[0]
            if not caption.strip() and isinstance(value, str):
                caption = value
        scores = {name: score for key, name in _SCORES.items() if (score := as_score(metadata.get(key))) is not None}
        return [*notes, *self.clip(video, video, (0.0, None), caption, scores, text_path or video)]


def _compressed(listing: Listing, name: str) -> Dropped:
    path = os.path.join(listing.folder, name)
    return Dropped(Reason.UNSUPPORTED_FORMAT.value, f"{path} is compressed; shards are read in place: unpack it", path)


def _sort_member(
    member: Member, prefix: str, sidecars: dict[str, Member], videos: list[str], drops: list[Dropped]
) -> None:
    """Put a member where it belongs; what could be a video but is none is dropped."""
    place = prefix + member.name
    lower = member.name.lower()
    problem = name_problem(member.name)
    if lower.endswith(_SIDECARS):
        if member.name in sidecars:
            drops.append(Dropped(UNREADABLE_SIDECAR, "the shard holds it again behind this one", place, place))
        sidecars[member.name] = member
    elif problem and not member.kind:
        drops.append(Dropped(BAD_NAME, problem, place, place))
    elif not lower.endswith(VIDEO_SUFFIXES) or member.kind == FOLDER:
        return
    elif member.kind:
        drops.append(Dropped(Reason.NOT_A_FILE.value, f"it is {member.kind}", place, place))
    elif member.size > MAX_MEMBER_BYTES:
        detail = f"{member.size:,} bytes; {MAX_MEMBER_BYTES:,} are the most in a shard: unpack it"
        drops.append(Dropped(Reason.TOO_LARGE.value, detail, place, place))
    else:
        videos.append(member.name)


def _stems(name: str) -> list[str]:
    """What a video's caption and metadata may be named, but for their suffix.

    ``clip.v1.mp4`` has ``clip.v1.txt``, or ``clip.txt`` as WebDataset pairs members: by their name up to the first dot.
    """
    folder, base = os.path.split(name)
    stems = [os.path.splitext(name)[0], os.path.join(folder, base.partition(".")[0])]
    return stems if stems[0] != stems[1] else stems[:1]
