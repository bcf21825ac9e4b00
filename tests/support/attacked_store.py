"""A small latent store to attack, and what was found in it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from exvideo_train.clips.record import ClipRecord, make_clip_id
from exvideo_train.geometry import Geometry
from exvideo_train.latents.fingerprint import Fingerprint
from exvideo_train.latents.store import LatentStore
from exvideo_train.latents.verification import StoreFindings
from exvideo_train.models.normalisation import Normalisation

GEOMETRY = Geometry(9, 32, 48, 8)
SHA256 = {"vae": "v" * 64, "text_encoder": "t" * 64, "tokenizer": "k" * 64}
FINGERPRINT = Fingerprint(SHA256, "fp32", "fp32", False, 5, 9, 32, 48, 8.0)
RECORDS = [
    ClipRecord(make_clip_id("t", str(n), 0, None), "t", f"/videos/{n}.mp4", 0, None, f"caption {n}") for n in range(6)
]
VICTIM = RECORDS[0]
DEEP = b"[" * 100_000


def write_six_clips(path: Path) -> None:
    store = LatentStore.create(path, Normalisation((0.7,)))
    store.add_geometry(FINGERPRINT)
    generator = torch.Generator().manual_seed(0)
    entries = []
    for record in RECORDS:
        moments, text = torch.randn((4, 3, 4, 6), generator=generator), torch.randn((5, 6), generator=generator)
        entries.append(store.write_clip(record.clip_id, GEOMETRY, {"moments": moments, "text": text}, record.caption))
    store.write_empty_prompt({"text": torch.full((5, 6), 0.5)})
    store.write_index(entries)


def victim_path(store: LatentStore) -> Path:
    return store.clip_path(VICTIM.clip_id, GEOMETRY)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and not p.is_symlink()}


def findings(found: StoreFindings) -> dict[str, str]:
    """All that a verification lists, but what is no part of the store."""
    (result,) = found.geometries
    drops = {**result.damaged, **result.unreadable, **dict.fromkeys(result.missing, "missing")}
    drops |= {link: f"link {link}" for link in found.survey.links}
    drops |= {reason: reason for reason in (*found.survey.unreadable, *found.index_damage)}
    for reason in (found.empty_prompt_damage, found.empty_prompt_unreadable, found.index_unreadable):
        if reason is not None:
            drops[reason] = reason
    return drops


def nothing_dropped(_: object) -> Mapping[str, str]:
    return {}
