"""How one run of encode_latents encodes: its options, checked, with everything that shapes the latents."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exvideo_train.clips.workers import num_cores
from exvideo_train.config.latents import EncodeLatents
from exvideo_train.errors import UserError
from exvideo_train.files import refuse_inputs
from exvideo_train.geometry import Geometry
from exvideo_train.latents.decode import DecodeOptions
from exvideo_train.latents.fingerprint import Fingerprint, model_fingerprint
from exvideo_train.models.family import Family
from exvideo_train.models.hub import resolve_model_path
from exvideo_train.models.normalisation import Normalisation
from exvideo_train.models.registry import check_geometries, encoders_family, family_named, likely_family
from exvideo_train.models.shapes import shapes_of

_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
_HEADER_BYTES = 1024
# Many times what the largest geometry takes on a slow GPU; a few CPU cores need half an hour a clip and more.
ENCODE_TIMEOUT_GPU_SECONDS = 1800.0
ENCODE_TIMEOUT_CPU_SECONDS = 18_000.0


@dataclass(frozen=True)
class EncodeSettings:
    """How clips are encoded; everything an encoding process needs to know.

    Attributes:
        options: as they were given.
        fingerprint: number formats, tiling and text length are in it.
        decode_workers: decoding processes an encoder, with 0 resolved.
    """

    options: EncodeLatents
    model_path: Path
    store_path: Path
    fingerprint: Fingerprint
    normalisation: Normalisation
    decode_workers: int

    @property
    def decode_options(self) -> DecodeOptions:
        """How its decoding processes decode."""
        decoder = self.fingerprint.decoder
        assert decoder is not None
        return DecodeOptions(
            self.geometry, self.options.clip_timeout_seconds, self.options.recycle_after_clips, decoder
        )

    @property
    def geometry(self) -> Geometry:
        return self.fingerprint.geometry

    @property
    def family(self) -> Family[Any]:
        return family_named(self.fingerprint.family, self.store_path)

    def seconds_to_encode(self, device: str) -> float:
        """How long encoding one clip may take on a device before its encoder counts as hanging."""
        default = ENCODE_TIMEOUT_CPU_SECONDS if device == "cpu" else ENCODE_TIMEOUT_GPU_SECONDS
        return self.options.encode_timeout_seconds or default

    def bytes_per_clip(self) -> int:
        """Size of one latent file."""
        channels = self.family.read_stored_channels(self.model_path)
        shapes = shapes_of(self.family, self.geometry, channels, self.fingerprint.text_length)
        return sum(map(math.prod, shapes.values())) * _BYTES[self.options.encoder_dtype.value] + _HEADER_BYTES


def resolve_settings(config: EncodeLatents, num_encoders: int) -> EncodeSettings:
    """Check the options and find out everything that shapes the latents.

    Args:
        num_encoders: on this machine; they share its cores.

    Raises:
        UserError: an option has no sense, or the model is not there.
    """
    if not Path(config.manifest).is_file():
        raise UserError(f"manifest={config.manifest} does not exist; write it with data_prep/build_manifest.py")
    refuse_inputs("latents", [Path(config.latents) / "index.jsonl"], {"manifest": [Path(config.manifest)]})
    geometry = config.geometry
    check_geometries([geometry], config.model.path)
    find_model = _cached_model_path if config.dry_run else resolve_model_path
    parts = likely_family(config.model.path).encoder_parts
    model_path = find_model(config.model.path, config.model.revision, parts)
    family = encoders_family(model_path)
    family.grid.check(geometry)
    dtype = config.encoder_dtype.value
    fingerprint = model_fingerprint(
        model_path,
        geometry,
        decoder=config.decoder.value,
        vae_dtype=dtype,
        text_dtype=dtype,
        tiling=config.tiling,
        family=family,
        write_cache=not config.dry_run,
    )
    return EncodeSettings(
        options=config,
        model_path=model_path.absolute(),
        store_path=Path(config.latents).absolute(),
        fingerprint=fingerprint,
        normalisation=family.read_normalisation(model_path),
        decode_workers=config.decode_workers or max(1, (num_cores() - 1) // max(1, num_encoders)),
    )


def _cached_model_path(path: str, revision: str | None, parts: Sequence[str]) -> Path:
    """As :func:`resolve_model_path`, without a download."""
    if Path(path).expanduser().exists():
        return resolve_model_path(path, revision, parts)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        folder = snapshot_download(path, revision=revision, local_files_only=True)
    except (LocalEntryNotFoundError, HFValidationError):
        raise UserError(
            f"model.path={path}: no such folder, and not in the hub's cache; dry_run=true downloads nothing: run "
            f"`hf download {path}`, or set model.path to a folder in the published layout"
        ) from None
    return resolve_model_path(folder, None, parts)
