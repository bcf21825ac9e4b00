"""Prompt to frames on one device: text encoder, then backbone and VAE.

The text encoder is freed before the backbone comes. The VAE, a twentieth of it, stands beside the backbone; while it
decodes, a backbone on a GPU waits in host memory, so that the two together need not fit.

Axis letters: C channel, T latent frames, F video frames, H height, W width.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from exvideo_train.config.experiment import AttentionKernel
from exvideo_train.errors import UserError
from exvideo_train.extensions.extension import Extension
from exvideo_train.models.family import Family
from exvideo_train.models.registry import backbone_family, load_backbone
from exvideo_train.models.stages import Draw, SamplerSettings, TextEncoder, VideoEncoder
from exvideo_train.parallel.attention import choose_attention
from exvideo_train.parallel.parallelize import run_in_chunks
from exvideo_train.sampling.pictures import read_picture
from exvideo_train.sampling.requests import VideoRequest
from exvideo_train.sampling.variants import AdapterFile, Variant

Conditions = dict[str, Tensor]


@dataclass(frozen=True)
class Sampling:
    """What videos are made with.

    Args:
        model_path: folder in the published layout.
        dtype: of weights and computation: bfloat16 (5B) or float16 (2B) on GPUs, float32 for comparisons.
        positions: in time, of more latent frames than the base model's.
        vae_tiling: decode in tiles: less memory, faint seams.
        feed_forward_chunks: pieces of the sequence that feed-forward layers take one after another.
        files: what is known of the variants' adapters, by path.
    """

    model_path: Path
    sampler: SamplerSettings
    dtype: torch.dtype
    variants: tuple[Variant, ...]
    positions: str = "trained"
    vae_tiling: bool = False
    attention: AttentionKernel = AttentionKernel.auto
    feed_forward_chunks: int = 1
    files: dict[Path, AdapterFile] = field(default_factory=dict)

    @property
    def family(self) -> Family[Any]:
        return backbone_family(self.model_path)

    def check(self, request: VideoRequest) -> None:
        """Raises UserError for a video that the model cannot make, before anything is loaded."""
        family = self.family
        family.grid.check(request.geometry)
        if family.takes_image and request.image is None:
            raise UserError("image: is needed by this model; give image=FILE")
        if not family.takes_image and request.image is not None:
            raise UserError(f"image={request.image}: has no use for a model of text to video; leave it out")
        if request.negative_prompt and family.text_encoder is None:
            raise UserError(f"negative_prompt={request.negative_prompt!r}: this model reads no text; leave it out")
        if request.image is not None:
            read_picture(request.image, request.geometry)


class Sampler:
    """The models of one device, and the conditions of the videos that they are to make.

    Args:
        device: where they run.
        requests: all videos that may be asked for.
        note: told what a user should know about a prompt.

    Raises:
        UserError: a part of the model or an adapter does not fit.
    """

    def __init__(
        self,
        sampling: Sampling,
        device: torch.device,
        requests: Sequence[VideoRequest],
        note: Callable[[str], None] = lambda text: print(text, file=sys.stderr, flush=True),
    ) -> None:
        self.sampling = sampling
        self.device = device
        self.family = sampling.family
        self._texts = _encode_texts(sampling, device, requests, note)
        self._vae: VideoEncoder = self.family.video_encoder()(
            sampling.model_path, device, sampling.dtype, sampling.vae_tiling
        )
        self._images = {
            (request.image, request.geometry): self._encode_image(request)
            for request in requests
            if request.image is not None
        }
        self._backbone: nn.Module | None = None
        self._extension: Extension | None = None
        self._names: dict[Path, str] = {}

    def _encode_image(self, request: VideoRequest) -> dict[str, Tensor]:
        assert request.image is not None
        picture_HWC = read_picture(request.image, request.geometry)
        return {name: t.cpu() for name, t in self._vae.image_tensors(picture_HWC, request.geometry).items()}

    def conditions(self, request: VideoRequest) -> tuple[Conditions, Conditions]:
        """The network's conditions with a batch axis of 1, on the device: of the video, and guidance's other side."""
        image = self._images[request.image, request.geometry] if request.image is not None else {}
        empty, negative = self._texts[""] | image, self._texts[request.negative_prompt] | image
        wanted = self.family.conditions(self._texts[request.prompt] | image, empty, False)
        # Without words of the user's own it is what the condition was dropped for in training.
        unwanted = self.family.conditions(negative, empty, not request.negative_prompt)
        placed = [
            {name: tensor[None].to(self.device, self.sampling.dtype) for name, tensor in side.items()}
            for side in (wanted, unwanted)
        ]
        return placed[0], placed[1]

    def draw(self, request: VideoRequest, variant: Variant, on_step: Callable[[], None] = lambda: None) -> Tensor:
        """latents_TCHW of a video on the CPU; a function of the request, the variant and nothing else."""
        backbone = self._ready(variant)
        draw: Draw = self.family.draw()
        latents_1TCHW = draw(
            backbone,
            self.sampling.model_path,
            request.geometry,
            *self.conditions(request),
            self.sampling.sampler,
            request.seed,
            on_step,
        )
        return latents_1TCHW[0].cpu()

    def decode(self, latents_TCHW: Tensor) -> Iterator[tuple[Tensor, float]]:
        """Frames as they come: see :meth:`~exvideo_train.models.stages.VideoEncoder.decode`."""
        with self._backbone_aside():
            yield from self._vae.decode(latents_TCHW)

    def _ready(self, variant: Variant) -> nn.Module:
        """The backbone with the variant's adapters chosen; loaded when it is first needed."""
        if self._backbone is None:
            self._backbone = self._load_backbone()
        if self._extension is not None:
            strengths = {self._names[part.path]: part.strength for part in variant.adapters}
            self._extension.choose(self._backbone, strengths)
        return self._backbone

    def _load_backbone(self) -> nn.Module:
        sampling = self.sampling
        backbone = load_backbone(sampling.model_path, sampling.dtype, self.device, sampling.positions).eval()
        paths = dict.fromkeys(part.path for variant in sampling.variants for part in variant.adapters)
        for number, path in enumerate(paths):
            trained = self.family.extension().read(path, self.family.name)
            self._extension, self._names[path] = trained.extension, f"adapter{number}"
            trained.extension.place(backbone, self._names[path], trained, sampling.dtype, str(path))
        run_in_chunks(backbone, sampling.feed_forward_chunks)
        attentions = [cast(Any, module) for module in backbone.modules() if hasattr(module, "attend")]
        if attentions:
            heads, dim = attentions[0].num_heads, attentions[0].head_dim
            attend, _ = choose_attention(sampling.attention, self.device, sampling.dtype, heads, dim)
            for attention in attentions:
                attention.attend = attend
        return backbone

    @contextmanager
    def _backbone_aside(self) -> Iterator[None]:
        """Within it the backbone takes no memory of a GPU: moving it takes a second or two, sampling minutes."""
        if self._backbone is None or self.device.type != "cuda":
            yield
            return
        self._backbone.to("cpu")
        torch.cuda.empty_cache()
        try:
            yield
        finally:
            torch.cuda.empty_cache()
            self._backbone.to(self.device)


def _encode_texts(
    sampling: Sampling, device: torch.device, requests: Sequence[VideoRequest], note: Callable[[str], None]
) -> dict[str, dict[str, Tensor]]:
    """What the text encoder gives for every prompt, on the CPU; it is loaded and freed here."""
    family = sampling.family
    prompts = list(dict.fromkeys(["", *(text for r in requests for text in (r.prompt, r.negative_prompt))]))
    if family.text_encoder is None:
        return {prompt: {} for prompt in prompts}
    length = family.read_text_length(sampling.model_path)
    assert length is not None
    encoder: TextEncoder = family.text_encoder()(sampling.model_path, device, sampling.dtype, length)
    with closing(encoder):
        for prompt in prompts:
            if num_cut := encoder.num_tokens_cut(prompt):
                note(
                    f"warning: the prompt has {length + num_cut} tokens and the model reads {length}: its end is left "
                    f"out, shorten it: {prompt}"
                )
            if num_unknown := encoder.num_tokens_unknown(prompt):
                note(
                    f"warning: the text encoder has no tokens for parts of the prompt ({num_unknown} unknown): the "
                    f"model cannot read them, translate it: {prompt}"
                )
        return {prompt: {name: t.cpu() for name, t in encoder.tensors(prompt).items()} for prompt in prompts}
