"""What shaped a latent: everything that, changed, would make the stored latents wrong.

Computing it needs the model's files but none of its code, so the training process can check a store without
importing T5 or the VAE.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from exvideo_train.errors import UserError
from exvideo_train.files import atomic_write_json, sha256_file, short
from exvideo_train.geometry import Geometry
from exvideo_train.latents.untrusted import (
    COUNT,
    DTYPE,
    POSITIVE_COUNT,
    RATE,
    TEXT,
    YES_OR_NO,
    check_fields,
)
from exvideo_train.models.family import Family
from exvideo_train.models.registry import FIRST_FAMILY, encoders_family, family_named

COMPONENT_SUFFIXES = (".json", ".safetensors", ".bin", ".model", ".txt")
# Raise it whenever clips.reader would give other pixels for the same clip: sampling moments, resize, crop.
FRAME_RULE_VERSION = 1
# Stores made before decoders and families could be chosen name none, and remain valid.
_UNNAMED = {"decoder": "pyav", "family": FIRST_FAMILY}

_REMEDIES = {
    "model": "point model.path to the model that encoded the store, or encode into a new latents folder",
    "encoding": "use the same options as the store was encoded with, or encode into a new latents folder",
    "geometry": "set num_frames, height, width and fps to a geometry of the store, or encode this geometry into it",
}
_FIELD_KIND = {
    "family": "model",
    "num_frames": "geometry",
    "height": "geometry",
    "width": "geometry",
    "fps": "geometry",
}
_KINDS = {
    **dict.fromkeys(("num_frames", "height", "width"), POSITIVE_COUNT),
    "fps": RATE,
    "frame_rule_version": COUNT,
}
_KINDS_OR_NULL = {
    "decoder": TEXT,
    **dict.fromkeys(("vae_dtype", "text_dtype"), DTYPE),
    "tiling": YES_OR_NO,
    "text_length": POSITIVE_COUNT,
}


@dataclass(frozen=True)
class Fingerprint:
    """Everything that shapes the latents of one geometry in a store.

    A field that is None is not known on this side and is not compared: a training machine may lack the text
    encoder's folder, and training does not choose the encoders' number formats.
    """

    sha256: Mapping[str, str | None]
    """By folder of the published model, of the family's ``encoder_parts``."""
    vae_dtype: str | None
    text_dtype: str | None
    tiling: bool | None
    text_length: int | None
    num_frames: int
    height: int
    width: int
    fps: float
    frame_rule_version: int = FRAME_RULE_VERSION
    decoder: str | None = None
    family: str = FIRST_FAMILY

    @property
    def geometry(self) -> Geometry:
        return Geometry(self.num_frames, self.height, self.width, self.fps)

    def differences(self, other: Fingerprint) -> list[tuple[str, Any, Any]]:
        """(field, own value, other's value) of the fields known on both sides that differ."""
        own, others = self._flat(), other._flat()
        pairs = ((name, own.get(name), others.get(name)) for name in own | others)
        return [(name, a, b) for name, a, b in pairs if a is not None and b is not None and a != b]

    def _flat(self) -> dict[str, Any]:
        content = asdict(self)
        return {**{f"{part}_sha256": digest for part, digest in content.pop("sha256").items()}, **content}

    def to_json(self) -> dict[str, Any]:
        """What stores made before there was a choice do not name is left out: it stands in every file as a digest."""
        content = self._flat()
        for name, unnamed in _UNNAMED.items():
            if content[name] == unnamed:
                del content[name]
        return content

    @classmethod
    def from_json(cls, content: Any, where: Path) -> Fingerprint:
        """The inverse of :meth:`to_json`; ``where`` is named in errors.

        Raises:
            UserError: fields are missing, unknown or of another kind.
        """
        if not isinstance(content, dict):
            raise UserError(f"{where}: {short(content)} is no fingerprint; fetch the store again")
        content = {**_UNNAMED, **content}
        parts = [f"{part}_sha256" for part in family_named(content["family"], where).encoder_parts]
        known = {f.name for f in fields(cls)} - {"sha256"} | set(parts)
        if set(content) != known:
            odd = sorted(map(short, set(content) ^ known))
            raise UserError(
                f"{where}: a fingerprint has other fields than this version knows ({', '.join(odd)}); "
                "use the version that wrote the store, or encode into a new latents folder"
            )
        try:
            check_fields(content, _KINDS, {**_KINDS_OR_NULL, **dict.fromkeys(parts, TEXT)})
            digests = {part.removesuffix("_sha256"): content.pop(part) for part in parts}
            fingerprint = cls(sha256=digests, **content)
            family_named(fingerprint.family, where).grid.check(fingerprint.geometry)
        except ValueError as error:
            raise UserError(
                f"{where}: in a fingerprint {error}; fetch the store again, or encode into a new latents folder"
            ) from error
        return fingerprint

    def digest(self) -> str:
        """Short hex digest that stands in every latent file of the geometry."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()[:16]


def explain_differences(differences: list[tuple[str, Any, Any]], store: Path) -> str:
    """One line a field with both values, and what to do."""
    kinds = ["model" if name.endswith("_sha256") else _FIELD_KIND.get(name, "encoding") for name, _, _ in differences]
    lines = [f"the latent store {store} does not fit this run:"]
    lines += [f"  {name}: the store has {a}, this run has {b}" for name, a, b in differences]
    lines += [_REMEDIES[kind] for kind in dict.fromkeys(kinds)]
    return "\n".join(lines)


def model_fingerprint(
    model_path: Path,
    geometry: Geometry,
    *,
    decoder: str | None = None,
    vae_dtype: str | None = None,
    text_dtype: str | None = None,
    tiling: bool | None = None,
    text_length: int | None = None,
    family: Family[Any] | None = None,
    write_cache: bool = True,
) -> Fingerprint:
    """Fingerprint of encoding with the model in ``model_path``.

    Args:
        model_path: local folder in the published layout; a component that is absent is left unknown.
        geometry: frames, size and rate of the clips.
        decoder: ``decord`` or ``pyav``, as of :func:`~exvideo_train.clips.reader.read_frames`; None leaves it open.
        vae_dtype, text_dtype: number formats of the encoders; None leaves them open.
        tiling: whether the VAE encodes in tiles; None leaves it open.
        text_length: tokens a caption; None asks the family.
        family: of the model; None looks for it in the folder.
        write_cache: keep the digests of large files in the user's cache folder.

    Raises:
        UserError: a file of the model cannot be read.
    """
    family = family or encoders_family(model_path)
    return Fingerprint(
        sha256={name: component_digest(model_path / name, write_cache) for name in family.encoder_parts},
        vae_dtype=vae_dtype,
        text_dtype=text_dtype,
        tiling=tiling,
        text_length=text_length if text_length is not None else family.read_text_length(model_path),
        num_frames=geometry.num_frames,
        height=geometry.height,
        width=geometry.width,
        fps=float(geometry.fps),
        decoder=decoder,
        family=family.name,
    )


def component_digest(folder: Path, write_cache: bool = True) -> str | None:
    """One digest over the names and contents of a component's files; None if the folder does not exist.

    A large file is read once: its digest is kept in the user's cache under its path, size and modification time.
    """
    if not folder.is_dir():
        return None
    cache = _DigestCache()
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.suffix not in COMPONENT_SUFFIXES:
            continue
        digest.update(f"{path.name} {cache.sha256(path)}\n".encode())
    if write_cache:
        cache.save()
    return digest.hexdigest()


class _DigestCache:
    """Digests of large files by (path, size, modification time), in the user's cache folder."""

    SMALLEST_BYTES = 1 << 24

    def __init__(self) -> None:
        root = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
        self.path = Path(root) / "exvideo_train" / "sha256.json"
        self.changed = False
        try:
            content = json.loads(self.path.read_text())
        except (OSError, ValueError, RecursionError):
            content = None
        # A missing or damaged cache only costs the time to read the files again.
        is_whole = isinstance(content, dict) and all(isinstance(digest, str) for digest in content.values())
        self.digests: dict[str, str] = content if is_whole else {}

    def sha256(self, path: Path) -> str:
        try:
            real = path.resolve(strict=True)
            status = real.stat()
            if not stat.S_ISREG(status.st_mode):
                raise UserError(f"{path} is not a regular file; fetch the model again")
            if status.st_size < self.SMALLEST_BYTES:
                return sha256_file(real)
            key = f"{real} {status.st_size} {status.st_mtime_ns}"
            if key not in self.digests:
                self.digests[key] = sha256_file(real)
                self.changed = True
            return self.digests[key]
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror}); fetch the model again") from error

    def save(self) -> None:
        if not self.changed:
            return
        try:
            atomic_write_json(self.path, self.digests)
        except UserError as error:
            print(f"note: digests are not cached: {error}", flush=True)
