"""The index of a latent store: one line of JSON a latent file, sorted; rewritten whole, never appended."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exvideo_train.errors import UnreadableFile
from exvideo_train.files import open_regular
from exvideo_train.latents.fields import CLIP_ID, COUNT, RATE, SHA256, TEXT, Kind, check_fields
from exvideo_train.latents.inside import UNREADABLE_REMEDY, exists_inside

if TYPE_CHECKING:
    from exvideo_train.clips.record import ClipRecord

_MAX_LINE_BYTES = 1 << 16
_REQUIRED: dict[str, Kind] = {
    "geometry": TEXT,
    "clip_id": CLIP_ID,
    "num_bytes": COUNT,
    "sha256": SHA256,
    "caption_sha256": TEXT,
}
_OPTIONAL: dict[str, Kind] = {"sampling_fps": RATE, "num_tokens_cut": COUNT, "decord_refusal": TEXT}


@dataclass(frozen=True, order=True)
class IndexEntry:
    """One latent file.

    Attributes:
        sha256: of its tensors.
        caption_sha256: of its caption, short.
        sampling_fps: the clip's own rate, None for the geometry's.
        num_tokens_cut: tokens at the caption's end that the text encoder has not read, None for none.
        decord_refusal: why PyAV decoded the clip although its fingerprint's decoder is decord, None if it did not.
    """

    geometry: str
    clip_id: str
    num_bytes: int
    sha256: str
    caption_sha256: str
    sampling_fps: float | None = None
    num_tokens_cut: int | None = None
    decord_refusal: str | None = None

    def is_of(self, record: ClipRecord) -> bool:
        """Whether the file holds the record as it is now. Its id covers video and span; the rest may change."""
        return self.caption_sha256 == caption_digest(record.caption) and self.sampling_fps == record.sampling_fps

    def to_json(self) -> str:
        """One line of the index without its newline."""
        return json.dumps({name: value for name, value in asdict(self).items() if value is not None}, sort_keys=True)


def caption_digest(caption: str) -> str:
    """Short hex digest of a caption: a changed caption needs its clip encoded again."""
    return hashlib.sha256(caption.encode()).hexdigest()[:16]


def entry_of(content: dict[str, Any], num_bytes: int) -> IndexEntry:
    """The line of a file, from what it says of itself."""
    return IndexEntry(
        geometry=content["geometry"],
        clip_id=content["clip_id"],
        num_bytes=num_bytes,
        sha256=content["sha256"],
        caption_sha256=caption_digest(content["caption"]),
        sampling_fps=content.get("sampling_fps"),
        num_tokens_cut=content.get("num_tokens_cut"),
        decord_refusal=content.get("decord_refusal"),
    )


def read_index_lines(root: Path, path: Path) -> tuple[dict[tuple[str, str], IndexEntry], list[str]]:
    """Index entries by (geometry name, clip id), and what is wrong with each line that is damaged.

    Raises:
        UnreadableFile: it cannot be read, or is a link: nothing is known of its lines.
    """
    entries: dict[tuple[str, str], IndexEntry] = {}
    damage: list[str] = []
    if not exists_inside(root, path):
        return entries, damage
    with open_regular(path) as stream:
        number = 0
        try:
            while line := stream.readline(_MAX_LINE_BYTES):
                number += 1
                try:
                    entry = _parse_line(line)
                    if (entry.geometry, entry.clip_id) in entries:
                        raise ValueError(f"clip_id={entry.clip_id} stands on an earlier line too")
                    entries[entry.geometry, entry.clip_id] = entry
                except ValueError as error:
                    damage.append(f"{path} line {number} is damaged ({error})")
                while len(line) == _MAX_LINE_BYTES and not line.endswith(b"\n"):
                    line = stream.readline(_MAX_LINE_BYTES)
        except OSError as error:
            raise UnreadableFile(f"{path} cannot be read ({error.strerror}); {UNREADABLE_REMEDY}") from error
    return entries, damage


def _parse_line(line: bytes) -> IndexEntry:
    if len(line) == _MAX_LINE_BYTES:
        raise ValueError(f"longer than {_MAX_LINE_BYTES} bytes")
    try:
        # Of a million lines: what a stricter parser would refuse, no field below may hold.
        content = json.loads(line.decode())
    except RecursionError:
        raise ValueError("nested too deep") from None
    return IndexEntry(**check_fields(content, _REQUIRED, _OPTIONAL, others=False))
