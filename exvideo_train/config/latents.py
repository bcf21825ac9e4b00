"""The options of encode_latents."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Annotated

from omegaconf import MISSING

from exvideo_train.config.experiment import Dtype, Experiment
from exvideo_train.config.options import Options, Range


class EncodeEngine(Enum):
    """What starts and feeds the encoders."""

    local = "local"
    ray = "ray"


class Decoder(Enum):
    """What decodes clips."""

    decord = "decord"
    pyav = "pyav"


@dataclass
class EncodeLatents(Experiment):
    manifest: str = MISSING
    """Clips to encode: the JSON lines of build_manifest or filter_clips."""
    latents: str = MISSING
    """Latent store to write or continue. Several geometries of one model share a store."""
    engine: EncodeEngine = EncodeEngine.local
    """local takes every GPU of this machine, or of all machines under accelerate launch; ray runs on a Ray cluster."""
    decoder: Decoder = Decoder.decord
    """decord, with PyAV for clips that decord cannot be given; or pyav alone, faster and with more exact colours. The
    moments are the same; a store keeps to one."""
    encoder_dtype: Dtype = Dtype.bf16
    """Number format of T5 and the VAE while encoding. fp32 is for tests on a CPU."""
    tiling: bool = False
    """Encode frames in tiles: less GPU memory, slightly other latents. A store is either tiled or not."""
    device: str = "auto"
    """auto takes every GPU, else the CPU; cuda:N takes one; cpu takes none."""
    decode_workers: Annotated[int, Range(0)] = 0
    """Decoding processes an encoder; 0 shares the machine's cores out among its encoders."""
    prefetch_clips: Annotated[int, Range(1)] = 4
    """Decoded clips that wait for an encoder; 129 frames of 480x720 are 134 MB each."""
    clip_timeout_seconds: Annotated[float, Range(above=0)] = 300.0
    """Decoding one clip may take so long before its process is killed and the clip quarantined."""
    encode_timeout_seconds: Annotated[float, Range(0)] = 0.0
    """Encoding one clip may take so long before its encoder is killed as hanging, and after the second time the clip
    quarantined. 0 takes 1800 on a GPU and 18000 on the CPU."""
    recycle_after_clips: Annotated[int, Range(1)] = 200
    """A decoding process is replaced after so many clips, so that a decoder's leaks cannot grow."""
    max_clips: Annotated[int, Range(0)] = 0
    """Encode so many clips and stop, with the projected time for the rest; 0 encodes all."""
    retry_quarantined: bool = False
    """Try quarantined clips again."""
    dry_run: bool = False
    """Print what would be done, disk needed included, and touch nothing."""


class StoreAction(Enum):
    """What is done with a latent store."""

    verify = "verify"
    stats = "stats"
    preview = "preview"


@dataclass
class InspectLatents(Options):
    action: StoreAction = MISSING
    """verify every file and repair the index, print stats, or decode a preview; the command's first word."""
    latents: str = MISSING
    """Latent store."""
    repair: bool = True
    """verify: move damaged files to damaged/ in the store and rewrite the index. Their clips are encoded again by the
    next run. What cannot be read is left as it is, and keeps its line in the index."""
    num_workers: int = 0
    """verify: threads that read files; 0 takes one a core."""
    num_clips: int = 0
    """stats: clips measured, evenly spread; 0 takes 200. preview: clips shown; 0 takes 4."""
    model_path: str = ""
    """preview: folder or hub id of the model that encoded the store."""
    output: str = ""
    """preview: folder for a picture a geometry; empty takes the store's reports folder."""
    device: str = "auto"
    """preview: auto takes the first GPU, else the CPU."""
