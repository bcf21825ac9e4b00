"""T5 and the 3D VAE, each loaded and freed alone.

Axis letters: B batch, C channel, T latent frames, F video frames, H height, W width, L text tokens.
"""

from __future__ import annotations

import gc
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from exvideo_train.errors import UserError
from exvideo_train.geometry import Geometry
from exvideo_train.models.cogvideox.encoder_weights import load_text_encoder, load_tokenizer, load_vae
from exvideo_train.models.cogvideox.encoding import read_normalisation
from exvideo_train.models.cogvideox.family import GRID


class TextEncoder:
    """Captions -> T5 embeddings as CogVideoX is trained on them: padded, without attention mask.

    Args:
        model_path: folder in the published layout.
        device, dtype: where and in which number format T5 runs.
        max_length: tokens a caption is cut or padded to, the transformer config's ``max_text_seq_length``.

    Raises:
        UserError: the text encoder or tokenizer cannot be loaded.
    """

    def __init__(self, model_path: Path, device: torch.device | str, dtype: torch.dtype, max_length: int) -> None:
        self.device = torch.device(device)
        self.max_length = max_length
        self._model: Any = load_text_encoder(model_path / "text_encoder", dtype)
        self._tokenizer = load_tokenizer(model_path / "tokenizer", self._model.config.vocab_size)
        self._model.requires_grad_(False).eval().to(self.device)

    def tensors(self, caption: str) -> dict[str, Tensor]:
        """``text`` (L, C) of a caption."""
        # One at a time: a caption's last bits must not depend on what it shares a batch with.
        return {"text": self.encode([caption])[0]}

    @torch.inference_mode()
    def encode(self, captions: list[str]) -> Tensor:
        """Embeddings (B, L, C) of captions, on the encoder's device and in its dtype."""
        tokens = self._tokenizer(
            captions,
            padding="max_length",
            max_length=self.max_length,
            truncation=True,
            add_special_tokens=True,
            return_tensors="pt",
        )
        text_BLC: Tensor = self._model(tokens.input_ids.to(self.device))[0]
        return text_BLC

    def num_tokens_cut(self, caption: str) -> int:
        """Tokens at the caption's end that :meth:`encode` leaves out, 0 if it fits."""
        # verbose=False: the tokenizer's own warning comes once a process and names nothing.
        tokens = self._tokenizer(caption, truncation=False, add_special_tokens=True, verbose=False)
        return max(0, len(tokens.input_ids) - self.max_length)

    def close(self) -> None:
        """Free the weights."""
        self._model = None
        _free_memory(self.device)


class VideoEncoder:
    """Frames <-> latents through CogVideoX's causal 3D VAE.

    Args:
        model_path: folder in the published layout.
        device, dtype: where and in which number format the VAE runs.
        tiling: work in overlapping tiles: less memory, and slightly other latents.

    Raises:
        UserError: the VAE cannot be loaded, or its scaling factor is out of bounds.
    """

    def __init__(self, model_path: Path, device: torch.device | str, dtype: torch.dtype, tiling: bool) -> None:
        self.device = torch.device(device)
        self.dtype = dtype
        self._vae: Any = load_vae(model_path / "vae", dtype)
        self._vae.requires_grad_(False).eval().to(self.device)
        self.normalisation = read_normalisation(model_path)
        if tiling:
            self._vae.enable_tiling()

    def tensors(self, frames_FHWC: Tensor, fps: float) -> dict[str, Tensor]:
        """``moments`` (2C, T, H, W); the rate does not matter."""
        return {"moments": self.encode(frames_FHWC)}

    def image_tensors(self, image_HWC: Tensor, geometry: Geometry) -> dict[str, Tensor]:
        """Never called: CogVideoX makes videos from text alone."""
        raise NotImplementedError

    @torch.inference_mode()
    def encode(self, frames_FHWC: Tensor) -> Tensor:
        """Moments of the posterior, unscaled.

        Args:
            frames_FHWC: uint8 RGB, 8k+1 frames: the VAE works in chunks of 8 with a causal cache.

        Returns:
            (2C, T, H, W), mean then log-variance, on the encoder's device and in its dtype.
        """
        num_frames = frames_FHWC.shape[0]
        if num_frames % GRID.frame_step != 1:
            raise UserError(f"num_frames={num_frames}: the VAE needs 8k+1 frames, e.g. 49, 81 or 129")
        video_CFHW = frames_FHWC.to(self.device).permute(3, 0, 1, 2).float() / 127.5 - 1.0
        distribution = self._vae.encode(video_CFHW[None].to(self.dtype)).latent_dist
        moments_CTHW: Tensor = distribution.parameters[0]
        expected = tuple(pixels // GRID.pixels_per_latent for pixels in frames_FHWC.shape[1:3])
        if moments_CTHW.shape[2:] != expected:
            # diffusers rounds tile borders to whole pixels; of odd tile sizes the pieces do not add up.
            raise UserError(
                f"tiling=true: this VAE's tiles ({self._vae.config.sample_height}x{self._vae.config.sample_width} "
                f"halved) give {tuple(moments_CTHW.shape[2:])} latents for {tuple(frames_FHWC.shape[1:3])} pixels; "
                "set tiling=false"
            )
        return moments_CTHW

    @torch.inference_mode()
    def decode(self, latents_TCHW: Tensor) -> tuple[Tensor, float]:
        """Frames of a scaled latent, as the DiT gives it, and the share of their numbers that were finite.

        Args:
            latents_TCHW: (T, C, H, W), times the VAE's scaling factor.

        Returns:
            uint8 RGB (F, H, W, C) on the CPU, with F = 4 (T - 1) + 1; black where they were not finite.
        """
        latents_CTHW = self.normalisation.undo(latents_TCHW.to(self.device, self.dtype).transpose(0, 1))
        video_CFHW = self._decode_whole(latents_CTHW)
        if video_CFHW is None:
            # Hours of sampling may be in these latents: tiles change the picture by little and fit.
            print("warning: decoding ran out of memory; decoding in tiles instead", file=sys.stderr, flush=True)
            _free_memory(self.device)
            self._vae.enable_tiling()
            video_CFHW = self._vae.decode(latents_CTHW[None]).sample[0]
        unit_FHWC = (video_CFHW.float().permute(1, 2, 3, 0) / 2 + 0.5).clamp(0, 1)
        # Infinity is clamped, NaN stays: what it becomes as an integer depends on the machine.
        share_finite = float(torch.isfinite(video_CFHW).float().mean())
        return (unit_FHWC.nan_to_num(0.0) * 255).round().to(torch.uint8).cpu(), share_finite

    def _decode_whole(self, latents_CTHW: Tensor) -> Tensor | None:
        """Pixels (C, F, H, W), or None when memory does not suffice; a caught error would keep its tensors alive."""
        try:
            video_CFHW: Tensor = self._vae.decode(latents_CTHW[None]).sample[0]
            return video_CFHW
        except torch.OutOfMemoryError:
            return None

    def close(self) -> None:
        """Free the weights."""
        self._vae = None
        _free_memory(self.device)


def _free_memory(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
