"""Where a token is in the video: rotary tables (5B), sin-cos embeddings (2B), and the timestep's sinusoid.

Tables are computed when they are needed, on the device that needs them: any length and size, nothing in the
checkpoint, nothing to break on the meta device; the cost is a few small kernels a forward.

Axis letters: B batch, T latent frames, H and W patch rows and columns, L text tokens, S joint sequence (text, then
video in T, H, W order), D head dim, C channels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

ROTARY_THETA = 10_000.0
SINUSOID_PERIOD = 10_000.0
# Of one period, that RIFLEx lets a video span; a tenth less than the whole, as its authors saw tails repeat.
RIFLEX_SHARE = 0.9


def resize_and_crop_span(grid_H: int, grid_W: int, base_H: int, base_W: int) -> tuple[float, float, float, float]:
    """Place a grid of patches on the base grid that the model was trained on: (top, left, bottom, right).

    The grid is scaled to fit inside the base grid with its aspect kept, and centred: positions stay in the range seen
    in training whatever the size. Rounded to whole base patches, as the published pipeline does.
    """
    if grid_H / grid_W > base_H / base_W:
        height, width = base_H, round(base_H / grid_H * grid_W)
    else:
        height, width = round(base_W / grid_W * grid_H), base_W
    top = round((base_H - height) / 2.0)
    left = round((base_W - width) / 2.0)
    return top, left, top + height, left + width


@dataclass(frozen=True)
class TimeAxis:
    """How a video that is longer than the base model's is laid on its positions in time; nothing about a shorter one.

    Args:
        kind: ``trained``: the latent frames' plain numbers. ``interpolated``: numbers pressed into the range that the
            base has seen (arXiv 2306.15595). ``riflex``: the rotary pair whose period the base's length does not
            exceed, and is nearest to it, is slowed down until the video spans nine tenths of its period
            (arXiv 2502.15894, eq. 8; k = 2 for CogVideoX-5B): longer, it would repeat itself.
        num_base: latent frames of the base model.
    """

    kind: str = "trained"
    num_base: int = 0

    def step(self, num_latents: int) -> float:
        """What lies between the positions of neighbouring latent frames."""
        return self.num_base / num_latents if self.kind == "interpolated" and num_latents > self.num_base else 1.0

    def slow_down(self, frequencies: Tensor, num_latents: int) -> Tensor:
        """The rotary frequencies in time, radians a latent frame, the fastest first."""
        if self.kind != "riflex" or num_latents <= self.num_base:
            return frequencies
        long_enough = 2 * math.pi / frequencies > self.num_base
        if not bool(long_enough.any()):
            return frequencies
        pair = int(long_enough.nonzero()[0])
        slowed = frequencies.clone()
        slowed[pair] = min(float(frequencies[pair]), RIFLEX_SHARE * 2 * math.pi / num_latents)
        return slowed


TRAINED = TimeAxis()


def _axis_frequencies(dim: int, device: torch.device) -> Tensor:
    """Radians a position of each rotated pair."""
    return 1.0 / ROTARY_THETA ** (torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim)


def _axis_rotary(positions: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """Cos and sin (positions, dim); neighbouring channels are the two parts of one rotated pair."""
    angles = torch.outer(positions, frequencies)
    return angles.cos().repeat_interleave(2, dim=1), angles.sin().repeat_interleave(2, dim=1)


def rotary_tables(
    *,
    num_text_tokens: int,
    grid_THW: tuple[int, int, int],
    base_HW: tuple[int, int],
    head_dim: int,
    device: torch.device,
    time_axis: TimeAxis = TRAINED,
) -> tuple[Tensor, Tensor]:
    """Cos and sin of the whole joint sequence, fp32 (S, D); text tokens are not rotated: cos 1, sin 0.

    A quarter of the head dim encodes time, three eighths each rows and columns. Time positions are the latent frames'
    plain numbers, unscaled, unless `time_axis` says otherwise; rows and columns lie on the base grid (see
    `resize_and_crop_span`).
    """
    T, H, W = grid_THW
    top, left, bottom, right = resize_and_crop_span(H, W, *base_HW)
    options: dict[str, Any] = {"dtype": torch.float32, "device": device}
    # The far edge is excluded, as for a grid of cells: at the base size the positions are the whole numbers.
    rows = torch.linspace(top, bottom * (H - 1) / H, H, **options)
    columns = torch.linspace(left, right * (W - 1) / W, W, **options)
    frames = torch.arange(T, **options) * time_axis.step(T)
    tables_T = _axis_rotary(frames, time_axis.slow_down(_axis_frequencies(head_dim // 4, device), T))
    of_space = _axis_frequencies(head_dim // 8 * 3, device)
    tables_H = _axis_rotary(rows, of_space)
    tables_W = _axis_rotary(columns, of_space)
    cos_SD, sin_SD = (
        torch.cat(
            [
                torch.full((num_text_tokens, head_dim), text_value, **options),
                _combine_axes(by_frame, by_row, by_column),
            ]
        )
        for text_value, by_frame, by_row, by_column in zip((1.0, 0.0), tables_T, tables_H, tables_W, strict=True)
    )
    return cos_SD, sin_SD


def _combine_axes(by_frame: Tensor, by_row: Tensor, by_column: Tensor) -> Tensor:
    """One row a video token: (T, a), (H, b), (W, c) -> (T*H*W, a+b+c)."""
    T, H, W = by_frame.shape[0], by_row.shape[0], by_column.shape[0]
    return torch.cat(
        [
            by_frame[:, None, None].expand(T, H, W, -1),
            by_row[None, :, None].expand(T, H, W, -1),
            by_column[None, None, :].expand(T, H, W, -1),
        ],
        dim=-1,
    ).flatten(0, 2)


def rotate(x_BSND: Tensor, cos_SD: Tensor, sin_SD: Tensor) -> Tensor:
    """Rotate each pair of neighbouring channels, computed in fp32 and rounded once to the input's dtype."""
    if torch.compiler.is_compiling():
        # The compiler makes one kernel of it, which it cannot of a function with outputs of its own.
        real, imaginary = x_BSND.unflatten(-1, (-1, 2)).unbind(-1)
        cos, sin = cos_SD[:, None, ::2], sin_SD[:, None, ::2]
        turned = torch.stack([real * cos - imaginary * sin, imaginary * cos + real * sin], dim=-1)
        return turned.flatten(-2).to(x_BSND.dtype)
    rotated: Tensor = _Rotate.apply(x_BSND, cos_SD, sin_SD)
    return rotated


class _Rotate(torch.autograd.Function):
    """Writes both parts of each pair where they belong: a third of the memory traffic of operators one by one.

    The gradient is rotated back, so that nothing of the size of the input is kept.
    """

    @staticmethod
    def forward(ctx: Any, x_BSND: Tensor, cos_SD: Tensor, sin_SD: Tensor) -> Tensor:
        ctx.save_for_backward(cos_SD, sin_SD)
        return _turned(x_BSND, cos_SD, sin_SD, 1)

    @staticmethod
    def backward(ctx: Any, grad_BSND: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        cos_SD, sin_SD = ctx.saved_tensors
        return _turned(grad_BSND, cos_SD, sin_SD, -1), None, None


def _turned(x_BSND: Tensor, cos_SD: Tensor, sin_SD: Tensor, direction: int) -> Tensor:
    cos, sin = cos_SD[:, None, ::2], sin_SD[:, None, ::2]
    real, imaginary = x_BSND.unflatten(-1, (-1, 2)).unbind(-1)
    # Contiguous, whatever the memory of a gradient is like.
    out_BSND = torch.empty(x_BSND.shape, dtype=x_BSND.dtype, device=x_BSND.device)
    out_real, out_imaginary = out_BSND.unflatten(-1, (-1, 2)).unbind(-1)
    torch.addcmul(real * cos, imaginary, sin, value=-direction, out=out_real)
    torch.addcmul(imaginary * cos, real, sin, value=direction, out=out_imaginary)
    return out_BSND


def _axis_sincos(positions: Tensor, dim: int) -> Tensor:
    """Sines, then cosines, of falling frequency: (positions, dim), fp64."""
    frequencies = torch.arange(dim // 2, dtype=torch.float64, device=positions.device) / (dim / 2)
    angles = torch.outer(positions, 1.0 / SINUSOID_PERIOD**frequencies)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def sincos_embedding(
    *,
    num_text_tokens: int,
    grid_THW: tuple[int, int, int],
    num_channels: int,
    spatial_scale: float,
    temporal_scale: float,
    device: torch.device,
    time_axis: TimeAxis = TRAINED,
) -> Tensor:
    """Fixed position embedding of the whole joint sequence, fp32 (S, C); zero on text tokens.

    A quarter of the channels encodes time, three eighths each columns, then rows, in the published order. Positions
    are divided by the config's interpolation scales and otherwise unbounded: any length and size continue the grid.
    """
    T, H, W = grid_THW
    options: dict[str, Any] = {"dtype": torch.float64, "device": device}
    by_frame = _axis_sincos(torch.arange(T, **options) * time_axis.step(T) / temporal_scale, num_channels // 4)
    by_row = _axis_sincos(torch.arange(H, **options) / spatial_scale, num_channels // 8 * 3)
    by_column = _axis_sincos(torch.arange(W, **options) / spatial_scale, num_channels // 8 * 3)
    # Rows and columns change places: the published embedding has the columns' channels first.
    by_time, rows, columns = _combine_axes(by_frame.float(), by_row.float(), by_column.float()).split(
        [by_frame.shape[1], by_row.shape[1], by_column.shape[1]], dim=1
    )
    text = torch.zeros(num_text_tokens, num_channels, dtype=torch.float32, device=device)
    return torch.cat([text, torch.cat([by_time, columns, rows], dim=1)])


def timestep_sinusoid(timesteps_B: Tensor, dim: int, flip_sin_to_cos: bool, freq_shift: float) -> Tensor:
    """Sinusoidal embedding of the diffusion timestep, fp32 (B, dim); cosines first when flipped, as published."""
    half = dim // 2
    steps = torch.arange(half, dtype=torch.float32, device=timesteps_B.device)
    frequencies = torch.exp(-math.log(SINUSOID_PERIOD) * steps / (half - freq_shift))
    angles = timesteps_B[:, None].float() * frequencies
    parts = [angles.cos(), angles.sin()] if flip_sin_to_cos else [angles.sin(), angles.cos()]
    return torch.cat(parts, dim=-1)
