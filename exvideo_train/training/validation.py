"""Whether training helps: loss on held-out clips, by timestep band and by latent frame position.

The noise and timesteps of validation are fixed and independent of training's, so that two validations differ by the
weights alone. The **extension gap** is the mean loss on the latent frames beyond the base model's (13 for 49 frames)
over the mean on the base model's own; a model that has learnt the longer video comes near 1.

Axis letters: B batch, T latent frames, Q timestep quantiles.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from exvideo_train.errors import UserError
from exvideo_train.geometry import Geometry
from exvideo_train.latents.clip_file import UnusableLatent
from exvideo_train.latents.store import LatentStore, StoredClip
from exvideo_train.models.noise_levels import NoiseLevels, denoising_loss
from exvideo_train.parallel.mesh import Mesh
from exvideo_train.training.draws import draw

# Far from any training seed, so that validation noise is never training noise.
_VALIDATION_SEED = 0x5EED_0FA7
Predict = Callable[..., Tensor]


@dataclass(frozen=True)
class Validation:
    """Held-out losses.

    Attributes:
        loss: mean over clips, timesteps and positions.
        by_timestep: {row of the noise levels: loss}, one row a band.
        by_position: loss of each latent frame.
        extension_gap: see the module; None when no latent frame lies beyond the base model's.
        num_clips: clips scored.
    """

    loss: float
    by_timestep: dict[int, float]
    by_position: list[float]
    extension_gap: float | None
    num_clips: int

    def to_json(self) -> dict[str, Any]:
        return {
            "loss": self.loss,
            "by_timestep": {str(t): loss for t, loss in self.by_timestep.items()},
            "by_position": self.by_position,
            "extension_gap": self.extension_gap,
            "num_clips": self.num_clips,
        }


def quantile_rows(num_quantiles: int, num_levels: int) -> list[int]:
    """The middle of each of ``num_quantiles`` equal bands of noise levels."""
    return [int((band + 0.5) * num_levels / num_quantiles) for band in range(num_quantiles)]


class Validator:
    """Scores held-out clips of one geometry, dealt out over the data-parallel ranks.

    Args:
        store: latent store.
        clip_ids: held-out clips.
        geometry: which of their latents.
        levels: the model's noise levels.
        num_quantiles: bands of levels.
        base_latent_frames: latent frames of the base model.
        mesh: this rank's place.
        on_progress: called before each clip, for the watchdog.
        log: told which clip has become unreadable.
    """

    def __init__(
        self,
        store: LatentStore,
        clip_ids: Sequence[str],
        geometry: Geometry,
        levels: NoiseLevels,
        *,
        num_quantiles: int,
        base_latent_frames: int,
        mesh: Mesh,
        on_progress: Callable[[], None],
        log: Callable[[str], None],
    ) -> None:
        self.store = store
        self.clip_ids = list(clip_ids)
        self.geometry = geometry
        self.levels = levels
        self.rows = quantile_rows(num_quantiles, len(levels))
        self.base_latent_frames = base_latent_frames
        self.mesh = mesh
        self.on_progress = on_progress
        self.log = log
        self.empty_prompt = store.empty_prompt()

    @torch.no_grad()
    def run(self, predict: Predict) -> Validation:
        """Score all clips. Every rank must call it; every rank gets the result.

        Args:
            predict: the network.
        """
        num_latent_frames = self.store.family.grid.shape_THW(self.geometry)[0]
        total_QT = torch.zeros(len(self.rows), num_latent_frames, dtype=torch.float64)
        num_clips = 0
        # Every rank makes the same number of calls, as collectives inside the model (ZeRO-3) demand.
        rounds = math.ceil(len(self.clip_ids) / self.mesh.data_size)
        for round_index in range(rounds):
            index = round_index * self.mesh.data_size + self.mesh.data_rank
            self.on_progress()
            stored = self._read(index % len(self.clip_ids))
            loss_QT = self._score(index % len(self.clip_ids), stored or self._any_clip(), predict)
            # A sequence group's ranks all hold the same loss: its first one counts.
            if stored and index < len(self.clip_ids) and self.mesh.sequence_rank == 0:
                total_QT += loss_QT
                num_clips += 1
        num_clips = int(self.mesh.sum(torch.tensor([float(num_clips)]))[0])
        return self._summarise(self.mesh.sum(total_QT) / num_clips, num_clips)

    def _read(self, index: int) -> StoredClip | None:
        """A clip, or None when it has become unreadable since the start: a disk error must not end the run."""
        try:
            return self.store.read(self.clip_ids[index], self.geometry)
        except UnusableLatent as error:
            self.log(f"validation goes on without {self.clip_ids[index]}: {error}")
            return None

    def _any_clip(self) -> StoredClip:
        """A readable clip to call the model with where the one due is not: ranks must make equal numbers of calls.

        Raises:
            UserError: every held-out clip has become unreadable.
        """
        for clip_id in self.clip_ids:
            try:
                return self.store.read(clip_id, self.geometry)
            except UnusableLatent:
                continue
        raise UserError(
            f"all {len(self.clip_ids)} held-out clips have become unreadable; repair the store with "
            f"python -m exvideo_train.latents verify latents={self.store.path}"
        )

    def captions(self, number: int) -> list[str]:
        """Captions of the first held-out clips."""
        return [self.store.read(clip_id, self.geometry).caption for clip_id in self.clip_ids[:number]]

    def _score(self, index: int, stored: StoredClip, predict: Predict) -> Tensor:
        device, shape = self.mesh.device, self.store.latent_shape(stored)
        conditions = self.store.family.conditions(stored.tensors, self.empty_prompt, False)
        conditions = {name: value[None].to(device) for name, value in conditions.items()}
        losses = []
        for band, row in enumerate(self.rows):
            position = index * len(self.rows) + band
            random = draw(_VALIDATION_SEED, position, shape, len(self.levels), 0.0)
            latents = self.store.latents(stored, random.posterior_noise_TCHW)
            loss = denoising_loss(
                predict,
                self.levels,
                latents[None].to(device),
                random.noise_TCHW[None].to(device),
                torch.tensor([row], device=device),
                conditions,
            )
            losses.append(loss.per_position_BT[0].double().cpu())
        return torch.stack(losses)

    def _summarise(self, loss_QT: Tensor, num_clips: int) -> Validation:
        by_position = loss_QT.mean(dim=0)
        base, beyond = by_position[: self.base_latent_frames], by_position[self.base_latent_frames :]
        return Validation(
            loss=float(loss_QT.mean()),
            by_timestep={t: float(loss) for t, loss in zip(self.rows, loss_QT.mean(dim=1), strict=True)},
            by_position=[float(loss) for loss in by_position],
            extension_gap=float(beyond.mean() / base.mean()) if len(beyond) else None,
            num_clips=num_clips,
        )
