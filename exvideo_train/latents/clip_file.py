"""One file of a latent store, and its line in the index.

safetensors with what the file says of itself in the header, and a digest of the tensors. The index has a line of JSON a
file, sorted; it is rewritten whole, never appended.

Latent files come from strangers too: the header is held against what the store promises before a tensor is read.
Axis letters: C channel, T latent frames, H height, W width, L text tokens.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exvideo_train.errors import UnreadableFile, UserError
from exvideo_train.files import open_regular, parse_json, read_regular, short
from exvideo_train.latents.untrusted import (
    CLIP_ID,
    COUNT,
    RATE,
    SHA256,
    TEXT,
    UNREADABLE_REMEDY,
    Kind,
    check_fields,
    check_inside,
    exists_inside,
)
from exvideo_train.tensor_files import read_safetensors_header

if TYPE_CHECKING:
    from torch import Tensor

    from exvideo_train.clips.record import ClipRecord

# safetensors writes metadata in the order of a randomly seeded hash map: only with a single key are files
# of equal content equal bytes.
METADATA_KEY = "exvideo_train"
# A bound for axes that nothing in the store fixes; published models have 16 latent and 4096 text channels.
MAX_CHANNELS = 1 << 16
_MAX_LINE_BYTES = 1 << 16
_DTYPES = {"fp32": "F32", "fp16": "F16", "bf16": "BF16"}
_CONTENT: dict[str, Kind] = {"caption": TEXT, "sha256": SHA256}
_CLIP_CONTENT: dict[str, Kind] = {**_CONTENT, "clip_id": CLIP_ID, "geometry": TEXT, "fingerprint": TEXT}
_OPTIONAL: dict[str, Kind] = {"sampling_fps": RATE, "num_tokens_cut": COUNT, "decord_refusal": TEXT}
_LINE: dict[str, Kind] = {
    "geometry": TEXT,
    "clip_id": CLIP_ID,
    "num_bytes": COUNT,
    "sha256": SHA256,
    "caption_sha256": TEXT,
}


class UnusableLatent(UserError):
    """A latent file that cannot be used; which of the three says what may be done with it."""


class MissingLatent(UnusableLatent):
    """There is no such file."""


class UnreadableLatent(UnusableLatent):
    """It could not be read, or is a link or no regular file. Nothing is known of its content: it stays as it is."""


class CorruptLatent(UnusableLatent):
    """It was read, and is wrong: truncated, changed since it was written, or of something else."""


@dataclass(frozen=True)
class TensorRule:
    """What a tensor must be.

    Attributes:
        dtype: ``bf16``, ``fp16`` or ``fp32``; None for any of them.
        shape: with None for a number of channels that is not known.
        num_channels_divides_by: of the first axis, two where it holds mean and log-variance.
    """

    dtype: str | None
    shape: tuple[int | None, ...]
    num_channels_divides_by: int = 1

    def with_channels(self, channels: int | None) -> TensorRule:
        """The same of a known number of channels; None leaves it open."""
        shape = tuple(channels if axis is None else axis for axis in self.shape)
        return TensorRule(self.dtype, shape, self.num_channels_divides_by)

    def check(self, name: str, entry: Mapping[str, Any]) -> None:
        """Hold a header's entry against the rule.

        Raises:
            ValueError: names the field.
        """
        allowed = [_DTYPES[self.dtype]] if self.dtype else list(_DTYPES.values())
        if entry["dtype"] not in allowed:
            raise ValueError(f"{name}: dtype={short(entry['dtype'])}, expected {' or '.join(allowed)}")
        shape = tuple(entry["shape"])
        fits = len(shape) == len(self.shape) and all(
            size == axis if axis is not None else 1 <= size <= MAX_CHANNELS
            for size, axis in zip(shape, self.shape, strict=True)
        )
        if not fits or shape[0] % self.num_channels_divides_by:
            expected = ", ".join("channels" if axis is None else str(axis) for axis in self.shape)
            raise ValueError(f"{name}: shape={short(shape)}, expected ({expected})")


@dataclass(frozen=True)
class LatentHeader:
    """A checked header.

    Attributes:
        content: what the file says of itself.
        shapes: by tensor.
        num_bytes: of the file.
    """

    content: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    num_bytes: int


def tensors_digest(tensors: dict[str, Tensor]) -> str:
    """sha256 over names, types, shapes and bytes of tensors, in the order of their names."""
    import torch

    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def encode_latent_file(tensors: dict[str, Tensor], content: dict[str, Any]) -> tuple[bytes, str]:
    """A file's bytes, and the digest of its tensors that goes into it."""
    from safetensors.torch import save

    ready = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    sha256 = tensors_digest(ready)
    metadata = {METADATA_KEY: json.dumps({**content, "sha256": sha256}, sort_keys=True)}
    return save(ready, metadata), sha256


@contextmanager
def _told_apart(path: Path) -> Iterator[None]:
    """Missing, unreadable or damaged: only what was read can be damaged."""
    try:
        yield
    except FileNotFoundError:
        raise MissingLatent(f"{path} does not exist; encode again") from None
    except UnusableLatent:
        raise
    except UnreadableFile as error:
        message = str(error) if UNREADABLE_REMEDY in str(error) else f"{error}; {UNREADABLE_REMEDY}"
        raise UnreadableLatent(message) from error
    except OSError as error:
        raise UnreadableLatent(f"{path} cannot be read ({error.strerror}); {UNREADABLE_REMEDY}") from error
    except ValueError as error:
        reason = str(error) if str(path) in str(error) else f"{path}: {error}"
        raise CorruptLatent(f"{reason}; move it away and encode again") from error


def read_header(root: Path, path: Path, rules: Mapping[str, TensorRule], is_clip: bool) -> LatentHeader:
    """A file's header, held against what its tensors must be; reads no tensor.

    Args:
        root: the store's folder, below which no link is followed.

    Raises:
        UnusableLatent: see its subclasses; the message names file and field.
    """
    with _told_apart(path):
        check_inside(root, path)
        header = read_safetensors_header(path)
        metadata = header.pop("__metadata__", {})
        if METADATA_KEY not in metadata:
            raise ValueError(f"its metadata has no {METADATA_KEY}")
        try:
            content = check_fields(
                parse_json(metadata[METADATA_KEY]),
                _CLIP_CONTENT if is_clip else _CONTENT,
                _OPTIONAL if is_clip else None,
            )
        except ValueError as error:
            raise ValueError(f"metadata {METADATA_KEY}: {error}") from None
        if set(header) != set(rules):
            raise ValueError(f"it holds {', '.join(map(short, sorted(header)))}, expected {', '.join(sorted(rules))}")
        for name, rule in rules.items():
            rule.check(name, header[name])
        shapes = {name: tuple(entry["shape"]) for name, entry in header.items()}
        return LatentHeader(content, shapes, path.stat().st_size)


def read_tensors(root: Path, path: Path, header: LatentHeader, verify: bool) -> dict[str, Tensor]:
    """Tensors of a file whose header was read; with ``verify`` compared with their digest.

    Not by a memory map: where the disk fails, or the file is cut meanwhile, that ends the process by a signal.

    Raises:
        UnusableLatent: see its subclasses.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    with _told_apart(path):
        check_inside(root, path)
        try:
            tensors = load(read_regular(path, header.num_bytes))
        except SafetensorError as error:
            raise ValueError(str(error)) from error
        if {name: tuple(tensor.shape) for name, tensor in tensors.items()} != header.shapes:
            raise ValueError("changed while it was read")
        if verify and tensors_digest(tensors) != header.content["sha256"]:
            raise ValueError("its tensors do not match their checksum")
    return tensors


def check_finite(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Refuse infinities and NaNs, which an encoder should have been stopped for.

    Raises:
        CorruptLatent: names the tensor.
    """
    with _told_apart(path):
        for name, tensor in tensors.items():
            if not tensor.isfinite().all():
                raise ValueError(f"{name} has infinite or NaN values")


@dataclass(frozen=True, order=True)
class IndexEntry:
    """One latent file.

    Attributes:
        sha256: of its tensors.
        caption_sha256: of its caption, short.
        sampling_fps: the clip's own rate, None for the geometry's.
        num_tokens_cut: tokens at the caption's end that the text encoder has not read, None for none.
    """

    geometry: str
    clip_id: str
    num_bytes: int
    sha256: str
    caption_sha256: str
    sampling_fps: float | None = None
    num_tokens_cut: int | None = None

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
    fields = check_fields(content, _LINE, _OPTIONAL, others=False)
    # It stood in the index once; now the file itself and the report have it.
    fields.pop("decord_refusal", None)
    return IndexEntry(**fields)
