"""T5 and the 3D VAE, each loaded and freed alone.

Axis letters: B batch, C channel, T latent frames, F video frames, H height, W width, L text tokens.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from exvideo_train.errors import UserError
from exvideo_train.geometry import Geometry
from exvideo_train.models.cogvideox.encoder_weights import load_text_encoder, load_tokenizer, load_vae
from exvideo_train.models.cogvideox.encoding import read_normalisation
from exvideo_train.models.cogvideox.family import GRID
from exvideo_train.models.stages import is_out_of_memory


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
        self._model: Any = load_text_encoder(model_path / "text_encoder", dtype, self.device)
        self._tokenizer = load_tokenizer(model_path / "tokenizer", self._model.config.vocab_size)
        self._model.requires_grad_(False).eval()

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

    def num_tokens_unknown(self, caption: str) -> int:
        """Tokens that stand for letters which the tokenizer does not know; T5's knows those of a few languages."""
        tokens = self._tokenizer(caption, truncation=False, add_special_tokens=True, verbose=False)
        return int(sum(token == self._tokenizer.unk_token_id for token in tokens.input_ids))

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
        self._vae.decoder = self._decoder = _ContinuedDecoder(self._vae.decoder)
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
    def decode(self, latents_TCHW: Tensor) -> Iterator[tuple[Tensor, float]]:
        """Frames of a scaled latent, as the DiT gives it: 4 or 8 at a time, as they come through the causal cache.

        Args:
            latents_TCHW: (T, C, H, W), times the VAE's scaling factor.

        Yields:
            uint8 RGB (F, H, W, C) on the CPU, of 4 (T - 1) + 1 frames in all, black where their numbers were not
            finite; and the share that was. Equal to decoding the whole at once.

        Raises:
            UserError: not even tiles fit the device's memory.
        """
        latents_CTHW = self.normalisation.undo(latents_TCHW.to(self.device, self.dtype).transpose(0, 1))
        # The published decoder's own chunks: two latents, three at the beginning of an odd number.
        size = self._vae.num_latent_frames_batch_size
        num_first = min(size + len(latents_TCHW) % size, len(latents_TCHW))
        chunks = [latents_CTHW[:, :num_first], *latents_CTHW[:, num_first:].split(size, dim=1)]
        chunks = [chunk for chunk in chunks if chunk.shape[1]]
        self._decoder.begin_video()
        try:
            for number, chunk_CTHW in enumerate(chunks):
                video_CFHW = self._decode_chunk(chunk_CTHW)
                if video_CFHW is None:
                    self._turn_to_tiles()
                    # The tiles' caches.
                    for earlier_CTHW in chunks[:number]:
                        self._decode_chunk(earlier_CTHW)
                    video_CFHW = self._decode_chunk(chunk_CTHW)
                if video_CFHW is None:
                    raise UserError(
                        f"the memory of {self.device} is too small to decode {tuple(latents_CTHW.shape[2:])} latents "
                        "even in tiles; keep_latents=true keeps what was drawn, and latents= decodes it elsewhere"
                    )
                unit_FHWC = (video_CFHW.float().permute(1, 2, 3, 0) / 2 + 0.5).clamp(0, 1)
                # Infinity is clamped, NaN stays: what it becomes as an integer depends on the machine.
                share_finite = float(torch.isfinite(video_CFHW).float().mean())
                yield (unit_FHWC.nan_to_num(0.0) * 255).round().to(torch.uint8).cpu(), share_finite
        finally:
            self._decoder.begin_video()

    def _decode_chunk(self, latents_CTHW: Tensor) -> Tensor | None:
        """Pixels (C, F, H, W), or None when memory does not suffice; a caught error would keep its tensors alive."""
        self._decoder.begin_chunk()
        try:
            video_CFHW: Tensor = self._vae.decode(latents_CTHW[None]).sample[0]
            return video_CFHW
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            return None

    def _turn_to_tiles(self) -> None:
        # Hours of sampling may be in these latents: tiles change the picture by little and fit.
        print("warning: decoding ran out of memory; decoding in tiles instead", file=sys.stderr, flush=True)
        self._decoder.begin_video()
        _free_memory(self.device)
        self._vae.enable_tiling()

    def close(self) -> None:
        """Free the weights."""
        self._vae = None
        _free_memory(self.device)


class _ContinuedDecoder(torch.nn.Module):
    """Diffusers' decoder, which goes on where the last chunk of the video ended.

    The library's own loop over the chunks of a video, and over those of each tile, begins with an empty causal cache.
    Called for one chunk at a time, it is handed the cache of the same tile's last chunk here instead.
    """

    def __init__(self, decoder: torch.nn.Module) -> None:
        super().__init__()
        self.decoder = decoder
        self.begin_video()

    def begin_video(self) -> None:
        """Forget all caches."""
        self._caches: dict[int, Any] = {}
        self._tile = 0

    def begin_chunk(self) -> None:
        """The next call is for the first tile."""
        self._tile = 0

    def forward(self, latents_BCTHW: Tensor, conv_cache: Any = None) -> tuple[Tensor, None]:
        video_BCFHW, cache = self.decoder(latents_BCTHW, conv_cache=self._caches.get(self._tile))
        self._caches[self._tile] = cache
        self._tile += 1
        return video_BCFHW, None


def _free_memory(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
