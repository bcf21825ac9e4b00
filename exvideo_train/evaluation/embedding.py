"""What CLIP and DINO see in a video, with weights of the user's own: no network is loaded unless it is named.

Frames are prepared as VBench prepares them (the shorter side resized to 224 pixels without antialiasing, CLIP's cut at
the centre), so that with VBench's networks its numbers come out. Axis letters: F frames, C channel, D features,
H height, W width.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor

from exvideo_train.clips.container import UnreadableClip
from exvideo_train.clips.workers import Failure
from exvideo_train.devices import choose_devices
from exvideo_train.errors import UserError
from exvideo_train.evaluation.reading import Reading, read_frames

# VBench shows DINO frames of this shorter side, whatever it was trained with.
DINO_SIDE = 224
_CLIP_MEAN, _CLIP_DEVIATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_DINO_MEAN, _DINO_DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_DINO_KINDS = ("vit", "dinov2", "dinov2_with_registers")
_BATCH = 16


@dataclass(frozen=True)
class Prepared:
    """Frames of one video as uint8 RGB, each as large as its network wants them; None for one that is not asked."""

    clip_FHWC: np.ndarray | None
    dino_FHWC: np.ndarray | None


def prepare_video(path: Path, reading: Reading, clip_side: int | None, with_dino: bool) -> Prepared | Failure:
    """Decode and resize; in a process that a foreign video may kill."""
    cv2.setNumThreads(1)
    clip: list[np.ndarray] = []
    dino: list[np.ndarray] = []
    try:
        for _, frame_HWC in read_frames(str(path), reading):
            if clip_side is not None:
                clip.append(_centre(_resized(frame_HWC, clip_side, cv2.INTER_CUBIC), clip_side))
            if with_dino:
                dino.append(_resized(frame_HWC, DINO_SIDE, cv2.INTER_LINEAR))
    except UnreadableClip as error:
        return Failure(error.reason, error.detail)
    return Prepared(np.stack(clip) if clip else None, np.stack(dino) if dino else None)


def _resized(frame_HWC: np.ndarray, side: int, interpolation: int) -> np.ndarray:
    """The shorter side becomes ``side``; like torchvision's Resize of uint8 without antialiasing."""
    height, width = frame_HWC.shape[:2]
    size = (side, int(side * height / width)) if width <= height else (int(side * width / height), side)
    # In float32: of whole numbers OpenCV weighs by whole numbers too, and is a level off.
    resized = cv2.resize(frame_HWC.astype(np.float32), size, interpolation=interpolation)
    return np.rint(resized).clip(0, 255).astype(np.uint8)


def _centre(frame_HWC: np.ndarray, side: int) -> np.ndarray:
    top, left = (round((length - side) / 2) for length in frame_HWC.shape[:2])
    return frame_HWC[top : top + side, left : left + side]


class Networks:
    """CLIP and DINO, or one of them.

    Args:
        clip: folder or hub name of a CLIPModel with its tokenizer.
        dino: folder or hub name of a ViT trained by DINO, or of a Dinov2.
        device: "auto" takes the first GPU, else the CPU.

    Raises:
        UserError: one cannot be loaded whole, or is of another kind.
    """

    def __init__(self, clip: str | None, dino: str | None, device: str) -> None:
        self.device = torch.device(choose_devices(device)[0])
        self.clip = self.dino = self.tokenizer = None
        if clip is not None:
            from transformers import CLIPModel, CLIPTokenizer

            self.clip = _load(CLIPModel, "clip", clip, ("clip",)).to(self.device)
            self.tokenizer = _told("clip", clip, lambda: CLIPTokenizer.from_pretrained(clip))
        if dino is not None:
            from transformers import AutoModel

            self.dino = _load(AutoModel, "dino", dino, _DINO_KINDS).to(self.device)

    @property
    def clip_side(self) -> int | None:
        """Pixels of CLIP's square frames."""
        return None if self.clip is None else int(self.clip.config.vision_config.image_size)

    @torch.inference_mode()
    def embed(self, prepared: Prepared) -> tuple[np.ndarray, np.ndarray]:
        """Unit vectors clip_FD and dino_FD of every frame; of a network that was not named, (0, 0)."""
        clip, dino = prepared.clip_FHWC, prepared.dino_FHWC
        nothing = np.empty((0, 0), np.float32)
        return (
            nothing if clip is None else self._in_batches(clip, _CLIP_MEAN, _CLIP_DEVIATION, self._clip_features),
            nothing if dino is None else self._in_batches(dino, _DINO_MEAN, _DINO_DEVIATION, self._dino_features),
        )

    @torch.inference_mode()
    def embed_text(self, prompt: str) -> np.ndarray:
        """CLIP's unit vector (D,) of a prompt, whose end is left out where CLIP reads no further."""
        assert self.clip is not None
        assert self.tokenizer is not None
        longest = self.clip.config.text_config.max_position_embeddings
        tokens = self.tokenizer([prompt], truncation=True, max_length=longest, return_tensors="pt").to(self.device)
        return np.asarray(_unit(self.clip.get_text_features(**tokens).pooler_output)[0].cpu())

    def _in_batches(self, frames_FHWC: np.ndarray, mean: Any, deviation: Any, network: Any) -> np.ndarray:
        mean_C11, deviation_C11 = (
            torch.tensor(values, device=self.device)[:, None, None] for values in (mean, deviation)
        )
        found = []
        for start in range(0, len(frames_FHWC), _BATCH):
            frames_BCHW = torch.from_numpy(frames_FHWC[start : start + _BATCH]).to(self.device).permute(0, 3, 1, 2)
            found.append(_unit(network((frames_BCHW.float() / 255 - mean_C11) / deviation_C11)).cpu())
        return np.asarray(torch.cat(found))

    def _clip_features(self, frames_BCHW: Tensor) -> Tensor:
        assert self.clip is not None
        features: Tensor = self.clip.get_image_features(frames_BCHW).pooler_output
        return features

    def _dino_features(self, frames_BCHW: Tensor) -> Tensor:
        assert self.dino is not None
        # Of frames that are not square, positions are interpolated; Dinov2 always does.
        more = {"interpolate_pos_encoding": True} if self.dino.config.model_type == "vit" else {}
        features: Tensor = self.dino(frames_BCHW, **more).last_hidden_state[:, 0]
        return features


@lru_cache(maxsize=1)
def load_networks(clip: str | None, dino: str | None, device: str) -> Networks:
    """Those of one evaluation, once."""
    return Networks(clip, dino, device)


def _unit(features_BD: Tensor) -> Tensor:
    return torch.nn.functional.normalize(features_BD.float(), dim=-1)


def _load(kind: Any, option: str, name: str, model_types: Iterable[str]) -> Any:
    from transformers import AutoConfig

    config = _told(option, name, lambda: AutoConfig.from_pretrained(name, trust_remote_code=False))
    if config.model_type not in model_types:
        raise UserError(f"{option}={name}: a model of kind {config.model_type}; name one of {', '.join(model_types)}")
    # No pickles, and in float32, for equal numbers on every device.
    options = {"use_safetensors": True, "trust_remote_code": False, "dtype": torch.float32, "output_loading_info": True}
    if config.model_type == "vit":
        options["add_pooling_layer"] = False
    model, loading = _told(option, name, lambda: kind.from_pretrained(name, **options))
    # transformers fills what the file lacks with random numbers.
    if missing := sorted(loading["missing_keys"]):
        raise UserError(f"{option}={name}: its weights lack {missing[0]} ({len(missing)} in all); fetch it again")
    return model.eval()


def _told(option: str, name: str, load: Any) -> Any:
    try:
        return load()
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{option}={name}: cannot be loaded ({reason}); name a folder with config.json, model.safetensors and, of "
            "CLIP, its tokenizer, or a model on the hub that has them"
        ) from error
