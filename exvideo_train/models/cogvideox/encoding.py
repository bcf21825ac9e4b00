"""What is stored of a clip for CogVideoX, read from its configs alone.

Axis letters: C channel, T latent frames, H height, W width, L text tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from exvideo_train.errors import UserError
from exvideo_train.models.config_file import FETCH, MAX_TEXT_LENGTH, check_bounds, read_config, read_size
from exvideo_train.models.family import StoredTensor
from exvideo_train.models.normalisation import Normalisation

PUBLISHED_TEXT_LENGTH = 226


def stored(grid_THW: tuple[int, int, int], text_length: int | None) -> dict[str, StoredTensor]:
    """``moments`` (2C, T, H, W) of the VAE's posterior, unscaled, and ``text`` (L, C) of T5."""
    return {
        "moments": StoredTensor((None, *grid_THW), channels_divide_by=2),
        "text": StoredTensor((text_length, None), from_caption=True),
    }


def conditions(tensors: Mapping[str, Tensor], empty: Mapping[str, Tensor], drop: bool) -> dict[str, Tensor]:
    """The prompt's embedding, or that of the empty prompt."""
    return {"text_BLC": (empty if drop else tensors)["text"]}


def read_text_length(model_path: Path) -> int:
    """Tokens a caption is padded to: ``max_text_seq_length`` of transformer/config.json.

    226, as of every published CogVideoX, where the model's folder has no transformer: encoding downloads none.
    """
    path = model_path / "transformer" / "config.json"
    config = read_config(path) if path.exists() else {}
    check_bounds(config, {"max_text_seq_length": (1, MAX_TEXT_LENGTH)}, path)
    return int(config.get("max_text_seq_length", PUBLISHED_TEXT_LENGTH))


def read_normalisation(model_path: Path) -> Normalisation:
    """``scaling_factor`` of vae/config.json.

    Raises:
        UserError: the file cannot be read, or the factor is missing, no number, or not positive and finite.
    """
    path = model_path / "vae" / "config.json"
    config = read_config(path)
    if "scaling_factor" not in config:
        raise UserError(f"{path} has no scaling_factor; point model.path to a CogVideoX model")
    try:
        return Normalisation.from_json({"scaling_factor": config["scaling_factor"]})
    except ValueError as error:
        raise UserError(f"{path}: {error}; {FETCH}") from None


def read_stored_channels(model_path: Path) -> dict[str, int]:
    """Of moments and text, by the encoders' configs."""
    latent_channels = read_size(model_path / "vae" / "config.json", "latent_channels", 1024)
    return {
        "moments": 2 * latent_channels,
        "text": read_size(model_path / "text_encoder" / "config.json", "d_model", 1 << 16),
    }
