"""The latent store: one immutable file a clip, an index, and a fingerprint of everything that shaped it.

    store.json                                    format version, scaling factor, a fingerprint a geometry
    index.jsonl                                   one line a latent file, sorted; rewritten whole, never appended
    empty_prompt.safetensors                      text (L, C) of the empty prompt
    clips/<geometry>/<id[:3]>/<id>.safetensors    moments (2C, T, H, W) and text (L, C)
    reports/                                      of encoding runs; not part of the store's identity

Nothing in a store outside reports/ holds a time, a host or a path: equal clips and options give equal bytes.
Axis letters: C channel, T latent frames, H height, W width, L text tokens.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exvideo_train.errors import UserError
from exvideo_train.files import (
    atomic_write_bytes,
    atomic_write_json,
    atomic_write_text,
)
from exvideo_train.geometry import Geometry
from exvideo_train.latents.clip_file import (
    CorruptLatent,
    encode_latent_file,
    is_latent_file,
    read_content,
    read_latent_file,
)
from exvideo_train.latents.fingerprint import Fingerprint, explain_differences

if TYPE_CHECKING:
    from torch import Tensor

    from exvideo_train.clips.record import ClipRecord

FORMAT_VERSION = 1


@dataclass(frozen=True)
class StoredClip:
    """One clip of the store, as the encoders gave it.

    Attributes:
        moments_CTHW: (2C, T, H, W) mean and log-variance of the VAE's posterior, unscaled.
        text_LC: (L, C) T5 embedding of the caption.
        caption: the caption itself.
    """

    moments_CTHW: Tensor
    text_LC: Tensor
    caption: str


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


class LatentStore:
    """A folder of latents; open one with :meth:`open` or :meth:`create`."""

    def __init__(self, path: Path, scaling_factor: float, fingerprints: dict[str, Fingerprint]) -> None:
        self.path = path
        self.scaling_factor = scaling_factor
        self.fingerprints = fingerprints

    @classmethod
    def open(cls, path: Path | str) -> LatentStore:
        """Open an existing store.

        Raises:
            UserError: the folder is not a store, or of another format version.
        """
        path = Path(path)
        description = path / "store.json"
        try:
            content = json.loads(description.read_text())
        except FileNotFoundError:
            raise UserError(
                f"latents={path}: no latent store there (store.json is missing); "
                "write it with data_prep/encode_latents.py"
            ) from None
        except (OSError, ValueError) as error:
            raise UserError(f"{description} cannot be read ({error}); encode into a new latents folder") from error
        version = content.get("format_version")
        if version != FORMAT_VERSION:
            raise UserError(
                f"{description}: format_version={version}, this version reads {FORMAT_VERSION}; "
                "use the version that wrote the store, or encode into a new latents folder"
            )
        fingerprints = {
            name: Fingerprint.from_json(fields, description) for name, fields in content["geometries"].items()
        }
        return cls(path, float(content["scaling_factor"]), fingerprints)

    @classmethod
    def create(cls, path: Path | str, scaling_factor: float) -> LatentStore:
        """Open the store at ``path``, or begin an empty one that :meth:`add_geometry` writes to disk."""
        path = Path(path)
        if (path / "store.json").exists():
            return cls.open(path)
        return cls(path, scaling_factor, {})

    def add_geometry(self, fingerprint: Fingerprint) -> None:
        """Let clips of this fingerprint be written; the same one again changes nothing.

        Raises:
            UserError: the store holds latents of another model or other options, or cannot be written.
        """
        name = fingerprint.geometry.name
        if name in self.fingerprints:
            self.require(fingerprint)
            return
        for other in self.fingerprints.values():
            of_model = {"num_frames", "height", "width", "fps"}
            differences = [d for d in other.differences(fingerprint) if d[0] not in of_model]
            if differences:
                raise UserError(explain_differences(differences, self.path))
        fingerprints = {**self.fingerprints, name: fingerprint}
        content = {
            "format_version": FORMAT_VERSION,
            "scaling_factor": self.scaling_factor,
            "geometries": {key: value.to_json() for key, value in fingerprints.items()},
        }
        atomic_write_json(self.path / "store.json", content)
        self.fingerprints = fingerprints

    def require(self, fingerprint: Fingerprint) -> None:
        """Check that latents of ``fingerprint.geometry`` were made as ``fingerprint`` says.

        Raises:
            UserError: names each field that differs, with both values, and the remedy.
        """
        name = fingerprint.geometry.name
        if name not in self.fingerprints:
            nearest = next(iter(self.fingerprints.values()), None)
            held = ", ".join(sorted(self.fingerprints)) or "none"
            message = f"the latent store {self.path} holds no latents of {name}; its geometries: {held}"
            if nearest is None:
                raise UserError(f"{message}; encode this geometry with data_prep/encode_latents.py")
            raise UserError(f"{message}\n" + explain_differences(nearest.differences(fingerprint), self.path))
        differences = self.fingerprints[name].differences(fingerprint)
        if differences:
            raise UserError(explain_differences(differences, self.path))

    def geometries(self) -> list[Geometry]:
        """Geometries of the store, sorted by name."""
        return [self.fingerprints[name].geometry for name in sorted(self.fingerprints)]

    # -- files ----------------------------------------------------------------------------------------------

    @property
    def index_path(self) -> Path:
        return self.path / "index.jsonl"

    @property
    def empty_prompt_path(self) -> Path:
        return self.path / "empty_prompt.safetensors"

    def clip_path(self, clip_id: str, geometry: Geometry) -> Path:
        """File of one clip; the first three hex digits spread a million clips over 4096 folders."""
        return self.path / "clips" / geometry.name / clip_id[:3] / f"{clip_id}.safetensors"

    def write_clip(
        self,
        clip_id: str,
        geometry: Geometry,
        moments_CTHW: Tensor,
        text_LC: Tensor,
        caption: str,
        *,
        sampling_fps: float | None = None,
        num_tokens_cut: int = 0,
        decord_refusal: str | None = None,
    ) -> IndexEntry:
        """Write one clip whole or not at all and return its index entry.

        Args:
            sampling_fps: the clip's own rate; None when it was sampled at the geometry's.
            num_tokens_cut: tokens at the caption's end that are not in ``text_LC``.
            decord_refusal: why PyAV decoded the clip in decord's place, a word of
                :class:`~exvideo_train.clips.container.Reason`; None if it did not.

        Raises:
            UserError: the disk is full or not writable.
        """
        tensors = {"moments": moments_CTHW, "text": text_LC}
        content: dict[str, Any] = {
            "caption": caption,
            "clip_id": clip_id,
            "fingerprint": self.fingerprints[geometry.name].digest(),
            "geometry": geometry.name,
        }
        if sampling_fps is not None:
            content["sampling_fps"] = sampling_fps
        if num_tokens_cut:
            content["num_tokens_cut"] = num_tokens_cut
        if decord_refusal is not None:
            content["decord_refusal"] = decord_refusal
        data, sha256 = encode_latent_file(tensors, content)
        atomic_write_bytes(self.clip_path(clip_id, geometry), data)
        return _index_entry({**content, "sha256": sha256}, len(data))

    def write_empty_prompt(self, text_LC: Tensor) -> None:
        """Write the embedding of the empty prompt, (L, C)."""
        data, _ = encode_latent_file({"text": text_LC}, {"caption": ""})
        atomic_write_bytes(self.empty_prompt_path, data)

    def empty_prompt(self, verify: bool = True) -> Tensor:
        """Embedding of the empty prompt, (L, C), memory-mapped.

        Raises:
            CorruptLatent: the file is missing or damaged, or holds something else.
        """
        tensors, content = read_latent_file(self.empty_prompt_path, verify)
        if content.get("caption") != "" or "clip_id" in content or set(tensors) != {"text"}:
            raise CorruptLatent(f"{self.empty_prompt_path}: not the empty prompt; delete it and encode again")
        return tensors["text"]

    def read(self, clip_id: str, geometry: Geometry, verify: bool = True) -> StoredClip:
        """Read one clip through a memory map.

        Args:
            verify: compare the tensors with their checksum (10 ms for 129 frames of 480x720).

        Raises:
            CorruptLatent: the file is missing, truncated, changed, or of another clip or fingerprint.
        """
        path = self.clip_path(clip_id, geometry)
        tensors, content = read_latent_file(path, verify)
        expected = {
            "clip_id": clip_id,
            "geometry": geometry.name,
            "fingerprint": self.fingerprints[geometry.name].digest(),
        }
        for key, value in expected.items():
            if content.get(key) != value:
                raise CorruptLatent(
                    f"{path}: {key} is {content.get(key)}, expected {value}; delete it and encode again"
                )
        return StoredClip(tensors["moments"], tensors["text"], content["caption"])

    def read_entry(self, clip_id: str, geometry: Geometry) -> IndexEntry:
        """Index entry of one clip from its file's header alone, without reading its tensors.

        Raises:
            CorruptLatent: the file is missing, truncated, or of another fingerprint.
        """
        path = self.clip_path(clip_id, geometry)
        content = read_content(path)
        if content.get("clip_id") != clip_id or content.get("geometry") != geometry.name:
            raise CorruptLatent(f"{path}: holds another clip; delete it and encode again")
        if content.get("fingerprint") != self.fingerprints[geometry.name].digest():
            raise CorruptLatent(f"{path}: made with another fingerprint; delete it and encode again")
        return _index_entry(content, path.stat().st_size)

    def clip_ids_on_disk(self, geometry: Geometry) -> Iterator[str]:
        """Ids of all latent files of a geometry, indexed or not, sorted."""
        folder = self.path / "clips" / geometry.name
        if not folder.is_dir():
            return
        for shard in sorted(folder.iterdir()):
            if shard.is_dir():
                yield from sorted(p.stem for p in shard.iterdir() if is_latent_file(p))

    # -- index ----------------------------------------------------------------------------------------------

    def read_index(self) -> dict[tuple[str, str], IndexEntry]:
        """Index entries by (geometry name, clip id); empty if there is no index yet.

        Raises:
            UserError: a line is damaged.
        """
        entries: dict[tuple[str, str], IndexEntry] = {}
        if not self.index_path.exists():
            return entries
        with open(self.index_path, encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                try:
                    entry = IndexEntry(**json.loads(line))
                except (ValueError, TypeError) as error:
                    raise UserError(
                        f"{self.index_path} line {number} is damaged ({error}); repair it with "
                        f"python -m exvideo_train.latents verify latents={self.path}"
                    ) from error
                entries[entry.geometry, entry.clip_id] = entry
        return entries

    def write_index(self, entries: Iterable[IndexEntry]) -> None:
        """Replace the index; lines are sorted by geometry and clip id."""
        lines = [entry.to_json() + "\n" for entry in sorted(entries)]
        atomic_write_text(self.index_path, "".join(lines))

    def clip_ids(self, geometry: Geometry) -> list[str]:
        """Sorted ids of the indexed clips of a geometry.

        Raises:
            UserError: there are none.
        """
        ids = sorted(clip_id for name, clip_id in self.read_index() if name == geometry.name)
        if not ids:
            held = ", ".join(sorted({name for name, _ in self.read_index()})) or "no finished clips"
            raise UserError(
                f"latents={self.path} has no clips of {geometry.name} in its index ({held}); "
                "run data_prep/encode_latents.py to its end, or repair the index with "
                f"python -m exvideo_train.latents verify latents={self.path}"
            )
        return ids


def caption_digest(caption: str) -> str:
    """Short hex digest of a caption: a changed caption needs its clip encoded again."""
    return hashlib.sha256(caption.encode()).hexdigest()[:16]


def _index_entry(content: dict[str, Any], num_bytes: int) -> IndexEntry:
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
