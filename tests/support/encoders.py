"""Encoding processes that do what a clip's caption says, in place of T5 and a VAE."""

from __future__ import annotations

import os
import time
from multiprocessing.connection import Connection

import torch

from exvideo_train.clips.workers import exit_with_parent
from exvideo_train.latents.encode_report import Totals
from exvideo_train.latents.encoder import dealt_records
from exvideo_train.latents.ray_engine import EncodeActor
from exvideo_train.latents.settings import EncodeSettings
from exvideo_train.models.cogvideox.family import GRID

BROKEN_DEVICE = "cuda:1"
UNSTARTABLE_DEVICE = "cuda:2"


def obedient_encoder(connection: Connection, settings: EncodeSettings, device: str) -> None:
    """Speaks as ``encoder_main`` does. Captions: ``dies``, ``dies once``, ``hangs``, ``slow``; others succeed."""
    exit_with_parent()
    if device == UNSTARTABLE_DEVICE:
        os._exit(4)
    totals = Totals()
    connection.send(("ready",))
    for record in dealt_records(connection):
        connection.send(("began", record.clip_id))
        died = settings.store_path.with_name(f"died_{record.clip_id}")
        if record.caption == "dies" or device == BROKEN_DEVICE:
            os._exit(3)
        if record.caption == "dies once" and not died.exists():
            died.touch()
            os._exit(3)
        if record.caption == "slow":
            time.sleep(0.5)
        while record.caption == "hangs":
            time.sleep(1)
        totals.num_encoded += 1
        connection.send(("settled", record.clip_id, totals))
    connection.send(("finished", totals))


class ObedientClipEncoder:
    """Stands in for ``ClipEncoder``; what it encodes is noted in the store's reports."""

    def __init__(self, settings: EncodeSettings) -> None:
        self._settings = settings
        self.caption = ""

    def caption_tensors(self, caption: str) -> dict[str, torch.Tensor]:
        with open(self._settings.store_path / "reports" / "encoded_captions", "a") as notes:
            notes.write(f"{caption}\n")
        time.sleep(0.3)
        return {"text": torch.full((5, 6), float(len(caption)))}

    def num_tokens_cut(self, caption: str) -> int:
        return 0

    def frame_tensors(self, frames_FHWC: torch.Tensor, fps: float) -> dict[str, torch.Tensor]:
        died = self._settings.store_path / "reports" / f"died_{self.caption}"
        if self.caption == "dies" or (self.caption == "dies once" and not died.exists()):
            died.touch()
            os._exit(3)
        while self.caption == "hangs":
            time.sleep(1)
        return {"moments": torch.zeros(4, *GRID.shape_THW(self._settings.geometry))}


class ObedientActor(EncodeActor):
    """Ray's encoder with another one inside. Captions: ``dies``, ``dies once``, ``hangs``; others succeed."""

    def _load_encoder(self, device: str) -> ObedientClipEncoder:
        return ObedientClipEncoder(self._settings)

    def _encode(self, record, row, outcome):
        self._encoder.caption = record.caption
        return super()._encode(record, row, outcome)
