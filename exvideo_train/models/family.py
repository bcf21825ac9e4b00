"""What the rest of the project may know of a model, without knowing which one it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from exvideo_train.models.grid import LatentGrid
from exvideo_train.models.noise_levels import NoiseLevels
from exvideo_train.models.normalisation import Normalisation

Config = TypeVar("Config")
Tensors = Mapping[str, Tensor]


class StoredTensor(NamedTuple):
    """A tensor that a latent store keeps of every clip.

    Attributes:
        shape: None where the family does not fix the number of channels.
        from_caption: by the text encoder; else from the frames.
        channels_divide_by: two where the first axis holds mean and log-variance.
    """

    shape: tuple[int | None, ...]
    from_caption: bool = False
    channels_divide_by: int = 1


class Later:
    """Something of a module that is imported when it is needed, written ``package.module:name``.

    So the training process imports no encoder and no sampler, and a family is still read in one place.
    """

    def __init__(self, reference: str) -> None:
        self.reference = reference

    def __call__(self) -> Any:
        module, _, name = self.reference.partition(":")
        return getattr(import_module(module), name)


@dataclass(frozen=True, eq=False)
class Family(Generic[Config]):
    """A kind of model: how it is found, built and loaded, what is stored for it and how it is drawn from.

    Another family is another value of this class in the registry; nothing that uses one changes.
    """

    name: str
    class_name: str
    """``_class_name`` in the published config of the network."""
    subfolder: str
    """Folder of the network inside a published model."""
    vae_class_name: str
    """``_class_name`` in ``vae/config.json``: tells the family where the network was not downloaded."""
    training_parts: tuple[str, ...]
    """Folders of a published model that training reads."""
    encoder_parts: tuple[str, ...]
    """Folders whose files shape what is stored, the VAE's among them."""
    grid: LatentGrid

    build: Callable[[Config], nn.Module]
    """The network with fresh parameters, on the device that is current (the meta device for a plan). It is called as
    ``(latents_BTCHW, told_B, **conditions) -> prediction_BTCHW`` and has the hooks that it needs of those that
    :func:`exvideo_train.parallel.parallelize.parallelize` hangs things on."""
    read_config: Callable[[Path], Config]
    """From the subfolder's ``config.json``."""
    load: Callable[[Path, torch.dtype, torch.device | str], nn.Module]
    """From the subfolder, in a dtype, onto a device."""
    published_config: Callable[[str], Config | None]
    """Of a hub id whose config is known without a download, else None."""
    num_base_frames: Callable[[Config], int]
    """Video frames that the base model was trained on."""
    noise_levels: Callable[[Path], NoiseLevels]
    """Of a published model folder."""

    extension: Later
    """The :class:`~exvideo_train.extensions.extension.Extension` class of what is trained."""
    diffsynth_names: Mapping[str, str]
    """Published names of Linears, ``{n}`` for a block, and what DiffSynth-Studio calls them."""

    latents_name: str
    """The stored tensor that holds the latents."""
    stored: Callable[[tuple[int, int, int], int | None], dict[str, StoredTensor]]
    """What is stored of a clip, by the latent grid's (T, H, W) and the text length."""
    stored_channels: Callable[[Config], dict[str, int]]
    """Channels that the network needs of the stored tensors."""
    conditions: Callable[[Tensors, Tensors, bool], dict[str, Tensor]]
    """The network's conditions, by (stored tensors, those of the empty prompt, whether to drop the condition); without
    batch axis; pure torch, as it runs in the readers of data."""
    text_length: Callable[[Config], int | None]
    """Tokens that every prompt is padded to; None without text."""

    read_text_length: Callable[[Path], int | None]
    """The same of a published model folder, which may lack the network."""
    read_normalisation: Callable[[Path], Normalisation]
    """Of a published model folder's VAE."""
    read_stored_channels: Callable[[Path], dict[str, int]]
    """Channels that a published model folder's encoders give."""
    text_encoder: Later | None
    """A :class:`~exvideo_train.models.stages.TextEncoder` class."""
    video_encoder: Later
    """A :class:`~exvideo_train.models.stages.VideoEncoder` class."""
    draw: Later
    """A :class:`~exvideo_train.models.stages.Draw` function."""
    weights_stem: str = "diffusion_pytorch_model"
    """Name of the network's weights before ``.safetensors``."""
    licences: Mapping[str, str] = field(default_factory=dict)
    """Hub ids, and the hub's short name of their licence."""
    takes_image: bool = False
    """Whether a video is made from an image, its first frame."""
