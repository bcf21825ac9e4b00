"""Prompt to frames: text encoder, backbone and VAE loaded one after another, so that each need only fit alone.

Axis letters: C channel, T latent frames, F video frames, H height, W width.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from exvideo_train.config.experiment import AttentionKernel
from exvideo_train.errors import UserError
from exvideo_train.extensions.extension import Trained
from exvideo_train.geometry import Geometry
from exvideo_train.models.family import Family
from exvideo_train.models.registry import backbone_family, load_backbone
from exvideo_train.models.stages import Draw, SamplerSettings, TextEncoder, VideoEncoder
from exvideo_train.parallel.attention import choose_attention
from exvideo_train.terminal import escaped

WITH_ADAPTER = "with_adapter"
WITHOUT_ADAPTER = "without_adapter"
Conditions = dict[str, Tensor]
# Of 255: no darker than the eye tells from black.
BLACKEST = 4


@dataclass(frozen=True)
class Sampling:
    """What is needed to make videos of one geometry with one model.

    Args:
        model_path: folder in the published layout.
        dtype: of weights and computation: bfloat16 (5B) or float16 (2B) on GPUs, float32 for comparisons.
        adapter: what was trained; None samples the base model.
        adapter_source: its file, for messages.
        image_HWC: uint8 RGB of the geometry's size, with which every video begins, where the family takes one.
        adapter_scale: strength of the adapter, 1 is as trained.
        compare: each video from the same noise without the adapter too.
        vae_tiling: decode in tiles: less memory, faint seams.
    """

    model_path: Path
    geometry: Geometry
    sampler: SamplerSettings
    device: torch.device
    dtype: torch.dtype
    adapter: Trained | None = None
    adapter_source: str = ""
    adapter_scale: float = 1.0
    compare: bool = False
    vae_tiling: bool = False
    attention: AttentionKernel = AttentionKernel.auto
    image_HWC: Tensor | None = None

    def __post_init__(self) -> None:
        if self.family.takes_image != (self.image_HWC is not None):
            remedy = "is needed by this model" if self.family.takes_image else "has no use for a model of text to video"
            raise UserError(f"image: {remedy}; {'give image=FILE' if self.family.takes_image else 'leave it out'}")
        if self.compare and self.adapter is None:
            raise UserError("compare=true: needs an adapter to compare with; set adapter=FILE")

    @property
    def family(self) -> Family[Any]:
        return backbone_family(self.model_path)

    @property
    def variants(self) -> tuple[str, ...]:
        """Which videos are made of each prompt."""
        if self.adapter is None:
            return (WITHOUT_ADAPTER,)
        return (WITH_ADAPTER, WITHOUT_ADAPTER) if self.compare else (WITH_ADAPTER,)


@dataclass(frozen=True)
class SampledVideo:
    """One prompt's frames_FHWC (uint8 RGB) by variant: ``with_adapter``, ``without_adapter``.

    Attributes:
        faults: by variant, what shows that the numbers went wrong on the way: frames alone do not tell NaN from night.
    """

    prompt: str
    frames: dict[str, NDArray[np.uint8]]
    faults: dict[str, str]


def sample_videos(sampling: Sampling, prompts: Sequence[str]) -> Iterator[SampledVideo]:
    """Make the videos of all prompts; they are yielded as the VAE decodes them, in order.

    Raises:
        UserError: a part of the model or the adapter does not fit.
    """
    latents = _draw_latents(sampling, prompts, *_conditions(sampling, prompts))
    # The backbone's modules and hooks refer to each other: only a collection frees them before the VAE comes.
    gc.collect()
    if sampling.device.type == "cuda":
        torch.cuda.empty_cache()
    with closing(_video_encoder(sampling)) as vae:
        for prompt, of_prompt in zip(prompts, latents, strict=True):
            frames, faults = {}, {}
            for name, latent_1TCHW in of_prompt.items():
                decoded_FHWC, share_finite = vae.decode(latent_1TCHW[0])
                frames[name] = decoded_FHWC.numpy()
                if fault := find_fault(frames[name], share_finite):
                    faults[name] = fault
            yield SampledVideo(prompt, frames, faults)


def find_fault(frames_FHWC: NDArray[np.uint8], share_finite: float) -> str:
    """What is wrong with a video as a whole; empty when nothing is."""
    if share_finite < 1:
        return f"{100 * (1 - share_finite):.3g} % of its numbers were not finite (NaN or infinity)"
    return "all black" if frames_FHWC.max() <= BLACKEST else ""


def _video_encoder(sampling: Sampling) -> VideoEncoder:
    encoder: VideoEncoder = sampling.family.video_encoder()(
        sampling.model_path, sampling.device, sampling.dtype, sampling.vae_tiling
    )
    return encoder


def _conditions(sampling: Sampling, prompts: Sequence[str]) -> tuple[dict[str, Conditions], Conditions]:
    """The network's conditions on the CPU, with a batch axis of 1: by prompt, and guidance's other side."""
    family, wanted = sampling.family, list(dict.fromkeys(["", *prompts]))
    tensors: dict[str, dict[str, Tensor]] = {prompt: {} for prompt in wanted}
    if family.text_encoder is not None:
        length = family.read_text_length(sampling.model_path)
        assert length is not None
        arguments = (sampling.model_path, sampling.device, sampling.dtype, length)
        text_encoder: TextEncoder = family.text_encoder()(*arguments)
        with closing(text_encoder) as encoder:
            for prompt in dict.fromkeys(prompts):
                if num_cut := encoder.num_tokens_cut(prompt):
                    print(
                        f"warning: the prompt has {length + num_cut} tokens and the model reads {length}: its end is "
                        f"left out, shorten it: {escaped(prompt)}",
                        file=sys.stderr,
                        flush=True,
                    )
            for prompt in wanted:
                tensors[prompt] |= {name: value.cpu() for name, value in encoder.tensors(prompt).items()}
    if sampling.image_HWC is not None:
        with closing(_video_encoder(sampling)) as vae:
            image = {n: t.cpu() for n, t in vae.image_tensors(sampling.image_HWC, sampling.geometry).items()}
        tensors = {prompt: {**of_prompt, **image} for prompt, of_prompt in tensors.items()}

    def of(prompt: str, drop: bool) -> Conditions:
        found = family.conditions(tensors[prompt], tensors[""], drop)
        return {name: value[None].to(sampling.dtype) for name, value in found.items()}

    return {prompt: of(prompt, drop=False) for prompt in prompts}, of("", drop=True)


def _draw_latents(
    sampling: Sampling, prompts: Sequence[str], conditions: dict[str, Conditions], unconditional: Conditions
) -> list[dict[str, Tensor]]:
    """latents_1TCHW on the CPU of every prompt and variant."""
    backbone = load_for_sampling(sampling)
    draw_one: Draw = sampling.family.draw()

    def placed(given: Conditions) -> Conditions:
        return {name: value.to(sampling.device) for name, value in given.items()}

    def draw(prompt: str, variant: str, number: int) -> Tensor:
        label = f"video {number + 1}/{len(prompts)} {variant.replace('_', ' ')}"
        return draw_one(
            backbone,
            sampling.model_path,
            sampling.geometry,
            placed(conditions[prompt]),
            placed(unconditional),
            sampling.sampler,
            label,
        ).cpu()

    latents = []
    for number, prompt in enumerate(prompts):
        of_prompt = {}
        for variant in sampling.variants:
            if variant == WITHOUT_ADAPTER and sampling.adapter is not None:
                with sampling.adapter.extension.without(backbone):
                    of_prompt[variant] = draw(prompt, variant, number)
            else:
                of_prompt[variant] = draw(prompt, variant, number)
        latents.append(of_prompt)
    return latents


def load_for_sampling(sampling: Sampling) -> nn.Module:
    """The backbone with its adapter and the fastest attention kernel, in evaluation mode."""
    backbone = load_backbone(sampling.model_path, sampling.dtype, sampling.device).eval()
    if sampling.adapter is not None:
        adapter, scale = sampling.adapter, sampling.adapter_scale
        adapter.extension.place(backbone, adapter, sampling.dtype, scale, sampling.adapter_source)
    attentions = [cast(Any, module) for module in backbone.modules() if hasattr(module, "attend")]
    if attentions:
        heads, dim = attentions[0].num_heads, attentions[0].head_dim
        attend, _ = choose_attention(sampling.attention, sampling.device, sampling.dtype, heads, dim)
        for attention in attentions:
            attention.attend = attend
    return backbone
