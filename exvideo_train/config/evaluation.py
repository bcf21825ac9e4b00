"""The options of evaluate."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from omegaconf import MISSING

from exvideo_train.config.experiment import BoardsConfig
from exvideo_train.config.options import Options, Range

VBENCH_DIMENSIONS = [
    "subject_consistency",
    "background_consistency",
    "motion_smoothness",
    "dynamic_degree",
    "aesthetic_quality",
    "imaging_quality",
]


@dataclass
class Evaluate(Options):
    variants: dict[str, str] = field(default_factory=dict)
    """Folders of videos by the name that the report gives them. with=DIR and without=DIR are short for
    +variants.with=DIR and +variants.without=DIR; +variants.NAME=DIR adds any other."""
    baseline: str = "without"
    """The variant that all others are compared with."""
    reference: str | None = None
    """Folder of real videos, shown beside the variants as the level of real footage; cut and resized to the size of
    the variants' videos and sampled at their rate, and compared with none of them pair by pair."""
    follow_links: bool = False
    """Take videos to which links lead out of the folders, for folders of links that are your own. false refuses: in a
    folder of another's, a link may lead to any video of yours, and the report shows it."""
    output: str = MISSING
    """Folder for report.html and results.json."""
    fps: Annotated[float, Range(0)] = 0.0
    """Frames a second at which all videos are read, for variants made at different rates; 0 takes every frame. Flicker
    and motion between neighbouring frames depend on it."""
    shorten: bool = False
    """Compare videos of unequal length over the time that both have; false leaves such pairs out, and says so."""
    max_frames: Annotated[int, Range(2)] = 2048
    """Frames that a video may have; a longer one is left out, and said so. 2048 take 30 MB."""
    high_band: Annotated[float, Range(above=0, below=0.5)] = 0.25
    """Cycles a pixel above which energy counts as fine detail; 0.5 is a line of one pixel beside one of another."""
    repeat_seconds: Annotated[float, Range(above=0)] = 10.0
    """Moment around which a repetition of the opening is expected, for NoRepeat; 10 s are 80 frames at 8 frames a
    second, where RIFLEx expects it of the model that this project extends (N_k = 20 latent frames)."""
    base_frames: Annotated[int, Range(0)] = 49
    """Frames of the base model's own videos, marked in the report's scrubber; 0 marks none."""
    frames_a_latent: Annotated[int, Range(1)] = 4
    """Video frames of one latent frame after the first, which stands alone; for the scrubber's words."""
    clip: str | None = None
    """CLIP model and tokenizer, a folder or a name on the hub (safetensors): measures how frames agree with the prompt
    and with each other."""
    dino: str | None = None
    """ViT trained by DINO (VBench's is facebook/dino-vitb16), or a Dinov2, a folder or a name on the hub (safetensors):
    measures how steady the subject is."""
    device: str = "auto"
    """Of clip and dino; auto takes the first GPU, else the CPU."""
    vbench_python: str | None = None
    """Python of an environment that has the package vbench and a CUDA device: its own measures come into the table."""
    vbench_dimensions: list[str] = field(default_factory=lambda: list(VBENCH_DIMENSIONS))
    """Which of them; overall_consistency (needs prompts) and temporal_flickering (for still scenes) are not by
    default."""
    vbench_timeout_minutes: Annotated[float, Range(above=0)] = 240.0
    """Minutes that VBench may take for one dimension of one variant."""
    num_workers: Annotated[int, Range(0)] = 0
    """Processes that measure; 0 takes one for each core."""
    timeout_seconds: Annotated[float, Range(above=0)] = 600.0
    """Seconds that one video may take before its process is killed and its pair left out."""
    inline_mib: Annotated[float, Range(0)] = 64.0
    """Size up to which videos are put into report.html; those beyond are links, opened only when followed."""
    seed: int = 0
    """Of the bootstrap."""
    logger: BoardsConfig = field(default_factory=BoardsConfig)
