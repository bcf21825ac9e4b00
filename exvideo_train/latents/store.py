"""The latent store: one immutable file a clip, an index, and a fingerprint of everything that shaped it.

    store.json                                    format version, normalisation, a fingerprint a geometry
    index.jsonl                                   one line a latent file, sorted; rewritten whole, never appended
    empty_prompt.safetensors                      what is stored of the empty prompt, for families with text
    clips/<geometry>/<id[:3]>/<id>.safetensors    the family's tensors: CogVideoX's moments (2C, T, H, W), text (L, C)
    reports/                                      of encoding runs; not part of the store's identity

Nothing in a store outside reports/ holds a time, a host or a path: equal clips and options give equal bytes.
Axis letters: C channel, T latent frames, H height, W width, L text tokens.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exvideo_train.errors import UnreadableFile, UserError
from exvideo_train.files import (
    atomic_write_bytes,
    atomic_write_json,
    atomic_write_text,
    parse_json,
    read_regular,
    short,
)
from exvideo_train.geometry import Geometry
from exvideo_train.latents.clip_file import (
    CorruptLatent,
    IndexEntry,
    LatentHeader,
    TensorRule,
    UnreadableLatent,
    UnusableLatent,
    check_finite,
    encode_latent_file,
    entry_of,
    read_header,
    read_index_lines,
    read_tensors,
)
from exvideo_train.latents.fingerprint import Fingerprint, explain_differences
from exvideo_train.latents.untrusted import (
    CLIP_ID,
    Kind,
    check_fields,
    exists_inside,
    is_folder,
    list_folder,
)
from exvideo_train.models.family import Family
from exvideo_train.models.normalisation import Normalisation
from exvideo_train.models.registry import family_named

if TYPE_CHECKING:
    from torch import Tensor

FORMAT_VERSION = 1
SUFFIX = ".safetensors"
_MAX_DESCRIPTION_BYTES = 1 << 24
_VERSION = Kind("a number", lambda value: type(value) is int)
_GEOMETRIES = Kind("an object of fingerprints", lambda value: isinstance(value, dict))
# Files that tell how many channels a store's tensors have; no few of them that are of something else can outvote them.
_VOTERS = 15


@dataclass(frozen=True)
class StoredClip:
    """One clip of the store, as the encoders gave it.

    Attributes:
        tensors: as the family names them.
        caption: the caption itself.
    """

    tensors: dict[str, Tensor]
    caption: str


class LatentStore:
    """A folder of latents; open one with :meth:`open` or :meth:`create`."""

    def __init__(self, path: Path, normalisation: Normalisation, fingerprints: dict[str, Fingerprint]) -> None:
        self.path = path
        self.normalisation = normalisation
        self.fingerprints = fingerprints
        self._channels: dict[Geometry, dict[str, int]] = {}

    @classmethod
    def open(cls, path: Path | str) -> LatentStore:
        """Open an existing store.

        Raises:
            UserError: the folder is not a store, or of another format version, or store.json cannot be read or has
                a field of another kind.
        """
        path = Path(path)
        description = path / "store.json"
        if not exists_inside(path, description):
            raise UserError(
                f"latents={path}: no latent store there (store.json is missing); "
                "write it with data_prep/encode_latents.py"
            )
        try:
            content = parse_json(read_regular(description, _MAX_DESCRIPTION_BYTES))
            version = check_fields(content, {"format_version": _VERSION})["format_version"]
            if version == FORMAT_VERSION:
                check_fields(content, {"geometries": _GEOMETRIES})
                normalisation = Normalisation.from_json(content)
        except UserError:
            raise
        except ValueError as error:
            raise UserError(f"{description}: {error}; fetch the store again or encode into a new folder") from error
        if version != FORMAT_VERSION:
            raise UserError(
                f"{description}: format_version={version}, this version reads {FORMAT_VERSION}; "
                "use the version that wrote the store, or encode into a new latents folder"
            )
        fingerprints = {
            name: Fingerprint.from_json(fields, description) for name, fields in content["geometries"].items()
        }
        for name, fingerprint in fingerprints.items():
            # The name becomes a folder's.
            if name != fingerprint.geometry.name:
                raise UserError(
                    f"{description}: geometries has {fingerprint.geometry.name} under the name {short(name)}; "
                    "fetch the store again or encode into a new folder"
                )
        return cls(path, normalisation, fingerprints)

    @classmethod
    def create(cls, path: Path | str, normalisation: Normalisation) -> LatentStore:
        """Open the store at ``path``, or begin an empty one that :meth:`add_geometry` writes to disk."""
        path = Path(path)
        if exists_inside(path, path / "store.json"):
            return cls.open(path)
        return cls(path, normalisation, {})

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
            **self.normalisation.to_json(),
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

    @property
    def family(self) -> Family[Any]:
        """The family that all its latents are for.

        Raises:
            UserError: it holds none yet.
        """
        some = next(iter(self.fingerprints.values()), None)
        if some is None:
            raise UserError(f"latents={self.path}: holds no geometry yet; run data_prep/encode_latents.py")
        return family_named(some.family, self.path)

    def latents(self, stored: StoredClip, noise_TCHW: Tensor) -> Tensor:
        """A clip's latents (T, C, H, W), float32, as the network is trained on them.

        Args:
            noise_TCHW: float32, picks them from the VAE's posterior.
        """
        return self.normalisation.latents(stored.tensors[self.family.latents_name], noise_TCHW)

    def latent_shape(self, stored: StoredClip) -> tuple[int, int, int, int]:
        """(T, C, H, W) of :meth:`latents`."""
        channels, frames, rows, columns = stored.tensors[self.family.latents_name].shape
        return frames, self.normalisation.latent_channels(channels), rows, columns

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
        return self.path / "clips" / geometry.name / clip_id[:3] / f"{clip_id}{SUFFIX}"

    def write_clip(
        self,
        clip_id: str,
        geometry: Geometry,
        tensors: dict[str, Tensor],
        caption: str,
        *,
        sampling_fps: float | None = None,
        num_tokens_cut: int = 0,
        decord_refusal: str | None = None,
    ) -> IndexEntry:
        """Write one clip whole or not at all and return its index entry.

        Args:
            tensors: what the family stores.
            sampling_fps: the clip's own rate; None when it was sampled at the geometry's.
            num_tokens_cut: tokens at the caption's end that are not in its embedding.
            decord_refusal: why PyAV decoded the clip in decord's place, a word of
                :class:`~exvideo_train.clips.container.Reason`; None if it did not.

        Raises:
            UserError: the disk is full or not writable.
        """
        content: dict[str, Any] = {
            "caption": caption,
            "clip_id": clip_id,
            "fingerprint": self.fingerprints[geometry.name].digest(),
            "geometry": geometry.name,
        }
        notes = {
            "sampling_fps": sampling_fps,
            "num_tokens_cut": num_tokens_cut or None,
            "decord_refusal": decord_refusal,
        }
        content |= {name: value for name, value in notes.items() if value is not None}
        data, sha256 = encode_latent_file(tensors, content)
        path = self.clip_path(clip_id, geometry)
        exists_inside(self.path, path.parent)
        atomic_write_bytes(path, data)
        return entry_of({**content, "sha256": sha256}, len(data))

    def write_empty_prompt(self, tensors: dict[str, Tensor]) -> None:
        """Write what the family stores of the empty prompt.

        Raises:
            UserError: the text encoder gave infinities or NaNs, or the disk is full or not writable.
        """
        if not all(tensor.isfinite().all() for tensor in tensors.values()):
            raise UserError(
                "the text encoder gives infinite or NaN values for the empty prompt: encoder_dtype=bf16 has more range "
                "than fp16; otherwise fetch the model again"
            )
        data, _ = encode_latent_file(tensors, {"caption": ""})
        atomic_write_bytes(self.empty_prompt_path, data)

    def empty_prompt(self, verify: bool = True) -> dict[str, Tensor]:
        """What is stored of the empty prompt; nothing for a family without text.

        Raises:
            UnusableLatent: the file is missing, unreadable or damaged, or holds something else.
        """
        path = self.empty_prompt_path
        rules = self._caption_rules()
        if not rules:
            return {}
        header = read_header(self.path, path, rules, is_clip=False)
        if header.content["caption"] != "" or "clip_id" in header.content:
            raise CorruptLatent(f"{path}: not the empty prompt; move it away and encode again")
        for geometry in self.geometries():
            held = self.channels(geometry) or {}
            for name, axis in _open_axes(rules).items():
                if name in held and held[name] != header.shapes[name][axis]:
                    raise CorruptLatent(
                        f"{path}: {name}: shape={header.shapes[name]}, but the clips have {held[name]} channels"
                    )
        tensors = read_tensors(self.path, path, header, verify)
        if verify:
            check_finite(path, tensors)
        return tensors

    def lacks_empty_prompt(self) -> bool:
        """Whether the empty prompt is still to be encoded."""
        return bool(self._caption_rules()) and not self.empty_prompt_path.exists()

    def _caption_rules(self) -> dict[str, TensorRule]:
        """Of what the caption gives, which is of all geometries alike; empty while there is none."""
        return self._rules(self.geometries()[0], of_caption=True) if self.fingerprints else {}

    def _rules(self, geometry: Geometry, of_caption: bool = False) -> dict[str, TensorRule]:
        """What the stored tensors must be, or those alone that the caption gives."""
        fingerprint = self.fingerprints[geometry.name]
        family = family_named(fingerprint.family, self.path)
        stored = family.stored(family.grid.shape_THW(fingerprint.geometry), fingerprint.text_length)
        return {
            name: TensorRule(
                fingerprint.text_dtype if tensor.from_caption else fingerprint.vae_dtype,
                tensor.shape,
                tensor.channels_divide_by,
            )
            for name, tensor in stored.items()
            if tensor.from_caption or not of_caption
        }

    def read(self, clip_id: str, geometry: Geometry, verify: bool = True) -> StoredClip:
        """Read one clip.

        Args:
            verify: compare the tensors with their checksum (10 ms for 129 frames of 480x720).

        Raises:
            UnusableLatent: the file is missing, unreadable, truncated, changed, or of another clip or fingerprint.
        """
        header = self.read_header(clip_id, geometry)
        tensors = read_tensors(self.path, self.clip_path(clip_id, geometry), header, verify)
        return StoredClip(tensors, header.content["caption"])

    def read_entry(self, clip_id: str, geometry: Geometry) -> IndexEntry:
        """Index entry of one clip from its file's header alone, without reading its tensors.

        Raises:
            UnusableLatent: the file is missing, unreadable, truncated, or of another clip or fingerprint.
        """
        header = self.read_header(clip_id, geometry)
        return entry_of(header.content, header.num_bytes)

    def read_header(self, clip_id: str, geometry: Geometry) -> LatentHeader:
        """What one clip's file says of itself.

        Raises:
            UnusableLatent: as of :meth:`read_entry`.
        """
        return self._read_header(clip_id, geometry, self.channels(geometry))

    def _read_header(self, clip_id: str, geometry: Geometry, channels: dict[str, int] | None) -> LatentHeader:
        fingerprint = self.fingerprints[geometry.name]
        rules = {name: rule.with_channels((channels or {}).get(name)) for name, rule in self._rules(geometry).items()}
        path = self.clip_path(clip_id, geometry)
        header = read_header(self.path, path, rules, is_clip=True)
        expected = {"clip_id": clip_id, "geometry": geometry.name, "fingerprint": fingerprint.digest()}
        for key, value in expected.items():
            if header.content[key] != value:
                raise CorruptLatent(
                    f"{path}: {key} is {short(header.content[key])}, expected {value}; move it away and encode again"
                )
        return header

    def channels(self, geometry: Geometry) -> dict[str, int] | None:
        """Channels by tensor that most of a geometry's first files have; None while there are none.

        Neither the fingerprint nor the geometry fixes them, and a batch can only be of equal ones.
        """
        if geometry not in self._channels:
            axes = _open_axes(self._rules(geometry))
            votes: Counter[tuple[int, ...]] = Counter()
            for clip_id in islice(self._clip_ids(geometry, skip_unreadable=True), _VOTERS):
                try:
                    shapes = self._read_header(clip_id, geometry, None).shapes
                except UnusableLatent:
                    continue
                votes[tuple(shapes[name][axis] for name, axis in axes.items())] += 1
            if not votes:
                return None
            self._channels[geometry] = dict(zip(axes, votes.most_common(1)[0][0], strict=True))
        return self._channels[geometry]

    def clip_ids_on_disk(self, geometry: Geometry) -> Iterator[str]:
        """Ids of all latent files of a geometry, indexed or not, sorted.

        Raises:
            UnreadableLatent: a folder is a link or cannot be listed: what is in it must not look as if it were missing.
        """
        return self._clip_ids(geometry, skip_unreadable=False)

    def _clip_ids(self, geometry: Geometry, skip_unreadable: bool) -> Iterator[str]:
        folder = self.path / "clips" / geometry.name

        def entries(name: str) -> list[os.DirEntry[str]]:
            try:
                return list_folder(self.path, folder / name)
            except UnreadableFile as error:
                if skip_unreadable:
                    return []
                raise UnreadableLatent(str(error)) from error

        for shard in entries("."):
            if shard.is_symlink() or is_folder(shard):
                yield from clip_ids_in(shard.name, entries(shard.name))

    # -- index ----------------------------------------------------------------------------------------------

    def read_index(self) -> dict[tuple[str, str], IndexEntry]:
        """Index entries by (geometry name, clip id); empty if there is no index yet.

        Raises:
            UserError: it cannot be read, or a line is damaged.
        """
        entries, damage = read_index_lines(self.path, self.index_path)
        if damage:
            raise UserError(f"{damage[0]}; repair it with python -m exvideo_train.latents verify latents={self.path}")
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


def _open_axes(rules: Mapping[str, TensorRule]) -> dict[str, int]:
    """The axis of each tensor that nothing but the files tells: its channels."""
    return {name: rule.shape.index(None) for name, rule in rules.items() if None in rule.shape}


def clip_ids_in(shard: str, entries: Iterable[os.DirEntry[str]]) -> list[str]:
    """Ids of what has a latent file's name in its own shard's folder, whatever it is."""
    ids = [entry.name.removesuffix(SUFFIX) for entry in entries if entry.name.endswith(SUFFIX)]
    return [clip_id for clip_id in ids if clip_id[:3] == shard and CLIP_ID.accepts(clip_id)]
