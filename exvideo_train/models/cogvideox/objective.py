"""CogVideoX's noise levels: v-prediction on the schedule of the model's own scheduler file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from exvideo_train.errors import UserError
from exvideo_train.files import short
from exvideo_train.models.config_file import check_bounds, read_config
from exvideo_train.models.noise_levels import NoiseLevels

# What diffusers' CogVideoXDDIMScheduler and CogVideoXDPMScheduler assume for a field that the file lacks. The
# samplers read the same file, so training must assume the same, odd as it is: snr_shift_scale is 3.0 here
# (CogVideoX-2B) while CogVideoX-5B's file says 1.0, and the default prediction is one that we refuse.
LIBRARY_DEFAULTS: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.0120,
    "beta_schedule": "scaled_linear",
    "trained_betas": None,
    "prediction_type": "epsilon",
    "rescale_betas_zero_snr": False,
    "snr_shift_scale": 3.0,
}
_BOUNDS: dict[str, tuple[float, float]] = {
    "num_train_timesteps": (1, 100_000),
    "beta_start": (1e-9, 0.999),
    "beta_end": (1e-9, 0.999),
    "snr_shift_scale": (1e-3, 1e3),
    "steps_offset": (0, 1000),
}


def noise_levels(model_path: Path) -> NoiseLevels:
    """Of ``scheduler/scheduler_config.json`` in a model folder of the published layout.

    Raises:
        UserError: the file is missing or broken, or describes a schedule that is not trained here.
    """
    path = model_path / "scheduler" / "scheduler_config.json"
    return NoiseLevels.v_prediction(alphas_cumprod(read_scheduler_config(model_path), source=path))


def alphas_cumprod(config: dict[str, Any], source: Path | str = "scheduler config") -> Tensor:
    """The share of signal in the variance at each timestep, float64; 0 at the last one with zero terminal SNR.

    Betas, then the SNR shift (as in SD3), then the rescale to zero terminal SNR (arXiv 2305.08891).

    Raises:
        UserError: fields of a schedule that is not trained here; names ``source``.
    """
    fields = {name: config.get(name, default) for name, default in LIBRARY_DEFAULTS.items()}
    _check_fields(fields, source)
    if fields["prediction_type"] != "v_prediction":
        raise UserError(
            f"{source}: prediction_type={short(fields['prediction_type'])}: training needs v_prediction; "
            "use a model whose scheduler says prediction_type=v_prediction (CogVideoX-2B, CogVideoX-5B)"
        )
    alphas = torch.cumprod(1.0 - _betas(fields, source), dim=0)
    shift = float(fields["snr_shift_scale"])
    alphas = alphas / (shift + (1.0 - shift) * alphas)
    if fields["rescale_betas_zero_snr"]:
        alphas = _rescale_to_zero_terminal_snr(alphas)
    if not torch.isfinite(alphas).all():
        raise UserError(f"{source}: gives a schedule that is not finite; fetch the model again")
    return alphas


def read_scheduler_config(model_path: Path) -> dict[str, Any]:
    """The checked fields of a published model's ``scheduler/scheduler_config.json``, as the file has them.

    Raises:
        UserError: the file is missing or broken, or a field is out of bounds.
    """
    path = model_path / "scheduler" / "scheduler_config.json"
    config = read_config(path)
    _check_fields(config, path)
    return config


def _check_fields(fields: dict[str, Any], source: Path | str) -> None:
    """Refuse what no schedule has, before tables are made of it: a length, a beta or a shift beyond all use."""
    check_bounds(fields, _BOUNDS, source)
    betas = fields.get("trained_betas")
    if betas is not None:
        if not isinstance(betas, list) or not 1 <= len(betas) <= _BOUNDS["num_train_timesteps"][1]:
            raise UserError(f"{source}: trained_betas={short(betas)} is not a list of betas; fetch the model again")
        for beta in betas:
            check_bounds({"trained_betas": beta}, {"trained_betas": _BOUNDS["beta_start"]}, source)


def _betas(fields: dict[str, Any], source: Path | str) -> Tensor:
    if fields["trained_betas"] is not None:
        return torch.tensor(fields["trained_betas"], dtype=torch.float64)
    num_timesteps, start, end = int(fields["num_train_timesteps"]), fields["beta_start"], fields["beta_end"]
    if fields["beta_schedule"] == "scaled_linear":
        return torch.linspace(start**0.5, end**0.5, num_timesteps, dtype=torch.float64).square()
    if fields["beta_schedule"] == "linear":
        return torch.linspace(start, end, num_timesteps, dtype=torch.float64)
    raise UserError(
        f"{source}: beta_schedule={short(fields['beta_schedule'])}: use a model with scaled_linear or linear betas"
    )


def _rescale_to_zero_terminal_snr(alphas_cumprod: Tensor) -> Tensor:
    """Shift and scale sqrt(alpha_bar) so that the last is 0 and the first stays (arXiv 2305.08891)."""
    roots = alphas_cumprod.sqrt()
    first, last = roots[0], roots[-1]
    return ((roots - last) * (first / (first - last))).square()
