"""A whole family that is unlike CogVideoX in every respect: no text but an image, continuous sigmas, any number of
frames, a network without blocks or attention, a VAE without posterior, and trained modules that are no LoRA.

Axis letters: B batch, T latent frames (those of the video), F video frames, C channel, H height, W width.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, interpolate

from exvideo_train.errors import UserError
from exvideo_train.extensions.extension import Trained
from exvideo_train.models.config_file import read_size
from exvideo_train.models.family import Family, Later, StoredTensor
from exvideo_train.models.grid import LatentGrid
from exvideo_train.models.noise_levels import NoiseLevels
from exvideo_train.models.normalisation import Normalisation
from exvideo_train.tensor_files import atomic_save_safetensors, read_safetensors_header

GRID = LatentGrid(frame_step=1, min_frames=2, frames_per_latent=1, pixels_per_latent=8, pixels_per_patch=8)
NORMALISATION = Normalisation((2.0, 2.5, 3.0), (0.5, 0.4, 0.3), sample=False)
SIGMAS_L = torch.logspace(1.5, -2, 100, dtype=torch.float64)


class Flipbook(nn.Module):
    """Predicts velocity from noisy latents, ln(sigma) / 4, the first frame and the frame rate."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.read = nn.Conv3d(6, width, (1, 3, 3), padding=(0, 1, 1))
        self.level = nn.Linear(2, width)
        self.in_time = nn.Conv3d(width, width, (3, 1, 1), padding=(1, 0, 0))
        self.write = nn.Conv3d(width, 3, (1, 3, 3), padding=(0, 1, 1))

    def forward(self, latents_BTCHW: Tensor, told_B: Tensor, image_BCHW: Tensor, rate_B1: Tensor) -> Tensor:
        both_BTCHW = torch.cat([latents_BTCHW, image_BCHW[:, None].expand_as(latents_BTCHW)], dim=2)
        level_BC = self.level(torch.cat([told_B[:, None].to(rate_B1.dtype), rate_B1], dim=1))
        x_BCTHW = self.read(both_BTCHW.transpose(1, 2)) + level_BC[:, :, None, None, None]
        x_BCTHW = x_BCTHW + self.in_time(x_BCTHW.tanh())
        return self.write(x_BCTHW.tanh()).transpose(1, 2)


@dataclass(frozen=True)
class TimeExtension:
    """The convolution in time, trained whole; without it means with the base model's weights."""

    name: str = "time"
    shape_options: tuple[str, ...] = ()
    has_dropout: bool = False

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> TimeExtension:
        return cls()

    @classmethod
    def read(cls, path: Path, family: str | None = None) -> Trained:
        stated = json.loads(read_safetensors_header(path)["__metadata__"]["exvideo_train"])
        if family not in (None, stated["family"]):
            raise UserError(f"{path}: for {stated['family']}, not for {family}")
        return Trained(cls(), load_file(path), stated)

    def describe(self) -> str:
        return "the convolution in time"

    def attach(self, network: Any, seed: int) -> None:
        network.requires_grad_(False).in_time.float().requires_grad_(True)

    def initial(self, family: str) -> Trained | None:
        return None

    def trained(self, network: nn.Module) -> dict[str, nn.Parameter]:
        return {name: p for name, p in network.named_parameters() if "in_time." in name}

    def load(self, network: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
        with torch.no_grad():
            for name, parameter in self.trained(network).items():
                parameter.copy_(tensors[name])

    def place(self, network: Any, name: str, trained: Trained, dtype: torch.dtype, source: str) -> None:
        base = {key: parameter.detach().clone() for key, parameter in self.trained(network).items()}
        network.placed = {"base": base, **getattr(network, "placed", {}), name: trained.tensors}

    def choose(self, network: Any, strengths: Mapping[str, float]) -> None:
        placed, base = network.placed, network.placed["base"]
        changes = {key: sum(by * (placed[n][key] - b) for n, by in strengths.items()) for key, b in base.items()}
        self.load(network, {key: b + changes[key] for key, b in base.items()}, "chosen")

    def write(self, path: Path, format: str, tensors: Mapping[str, Tensor], provenance: Mapping[str, Any]) -> None:
        atomic_save_safetensors(path, dict(tensors), {"exvideo_train": json.dumps(dict(provenance))})


class VideoEncoder:
    """Means over 8x8 pixels."""

    def __init__(self, model_path: Path, device: Any, dtype: torch.dtype, tiling: bool) -> None:
        self.dtype = dtype

    def tensors(self, frames_FHWC: Tensor, fps: float) -> dict[str, Tensor]:
        latents_FCHW = avg_pool2d(frames_FHWC.permute(0, 3, 1, 2).float() / 255, 8).to(self.dtype)
        rate = torch.tensor([fps / 100], dtype=self.dtype)
        return {"latents": latents_FCHW.transpose(0, 1).contiguous(), "image": latents_FCHW[0].clone(), "rate": rate}

    def image_tensors(self, image_HWC: Tensor, geometry: Any) -> dict[str, Tensor]:
        return self.tensors(image_HWC[None], geometry.fps)

    def decode(self, latents_TCHW: Tensor) -> Iterator[tuple[Tensor, float]]:
        pixels_TCHW = NORMALISATION.undo(latents_TCHW.float().transpose(0, 1)).transpose(0, 1)
        video_FCHW = interpolate(pixels_TCHW, scale_factor=8).clamp(0, 1)
        yield (video_FCHW * 255).round().byte().permute(0, 2, 3, 1), float(pixels_TCHW.isfinite().float().mean())

    def close(self) -> None: ...


def noise_levels(model_path: Path) -> NoiseLevels:
    signal_L, noise_L = 1 / (1 + SIGMAS_L**2).sqrt(), SIGMAS_L / (1 + SIGMAS_L**2).sqrt()
    return NoiseLevels(signal_L, noise_L, -noise_L, signal_L, SIGMAS_L.log() / 4, weight_L=noise_L)


@torch.no_grad()
def draw(
    network: Any, path: Path, geometry: Any, conditions: Any, empty: Any, settings: Any, seed: int, on_step: Any
) -> Tensor:
    levels, (frames, rows, columns) = noise_levels(path), GRID.shape_THW(geometry)
    x = SIGMAS_L[0] * torch.randn(1, frames, 3, rows, columns, generator=torch.Generator().manual_seed(seed))
    steps = torch.linspace(0, len(levels) - 1, settings.num_inference_steps).long()
    for row, following in zip(steps, [*steps[1:], None], strict=True):
        signal, noise = levels.signal_L[row].float(), levels.noise_L[row].float()
        clean = signal * signal * x - noise * network(signal * x, levels.told_at(row[None]), **conditions)
        x = clean if following is None else clean + (x - clean) * (SIGMAS_L[following] / SIGMAS_L[row])
        on_step()
    return x.float()


def load(folder: Path, dtype: torch.dtype, device: Any) -> Flipbook:
    network = Flipbook(read_width(folder))
    network.load_state_dict(load_file(folder / "weights.safetensors"))
    return network.to(device, dtype)


def read_width(folder: Path) -> int:
    return read_size(folder / "config.json", "width", 64)


def conditions(tensors: Any, empty: Any, drop: bool) -> dict[str, Tensor]:
    image_CHW = tensors["image"].float() - 0.5
    return {"image_BCHW": torch.zeros_like(image_CHW) if drop else image_CHW, "rate_B1": tensors["rate"].float()}


FLIPBOOK: Family[int] = Family(
    name="flipbook",
    class_name="Flipbook",
    subfolder="network",
    vae_class_name="Means",
    training_parts=("network",),
    encoder_parts=("vae",),
    grid=GRID,
    build=Flipbook,
    read_config=read_width,
    load=load,
    published_config=lambda hub_id: None,
    num_base_frames=lambda config: 4,
    noise_levels=noise_levels,
    extension=Later("support.flipbook:TimeExtension"),
    diffsynth_names={},
    latents_name="latents",
    stored=lambda grid_THW, text_length: {
        "latents": StoredTensor((None, *grid_THW)),
        "image": StoredTensor((None, *grid_THW[1:])),
        "rate": StoredTensor((1,)),
    },
    stored_channels=lambda config: {"latents": 3, "image": 3},
    conditions=conditions,
    text_length=lambda config: None,
    read_text_length=lambda model_path: None,
    read_normalisation=lambda model_path: NORMALISATION,
    read_stored_channels=lambda model_path: {"latents": 3, "image": 3},
    text_encoder=None,
    video_encoder=Later("support.flipbook:VideoEncoder"),
    draw=Later("support.flipbook:draw"),
    takes_image=True,
)
