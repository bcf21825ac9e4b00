"""The options of the commands that take an experiment, and of export.

The data commands' own options stand in :mod:`exvideo_train.config.clips` and :mod:`exvideo_train.config.latents`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Annotated

from omegaconf import MISSING

from exvideo_train.config.experiment import Experiment
from exvideo_train.config.options import Options, Range
from exvideo_train.errors import UserError


class AdapterFormat(Enum):
    """Program family an adapter file is written for."""

    diffusers = "diffusers"
    diffsynth = "diffsynth"
    comfyui = "comfyui"
    peft = "peft"
    kohya = "kohya"


class Weights(Enum):
    """Which copy of the adapter is taken."""

    raw = "raw"
    ema = "ema"


@dataclass
class Train(Experiment):
    latents: str = MISSING
    """Latent store written by encode_latents with the same experiment."""
    run_dir: str = MISSING
    """Run folder: config, metrics, checkpoints and the exported adapter. The same folder again continues the run."""
    resume: str = "auto"
    """auto continues from the newest valid checkpoint of run_dir, never refuses a run_dir that has one, a path
    begins from there (repeated, the command continues run_dir)."""
    dry_run: bool = False
    """Load, check and print everything, run no step and write nothing."""


@dataclass
class CardOptions(Options):
    card: bool = False
    """Write README.md beside the file: base model and its licence, frames, steps, samples, losses, verdicts, and how to
    load it."""
    evaluation: str | None = None
    """results.json of `python -m exvideo_train.evaluate`, or its folder, whose verdicts go into the card."""
    push: str | None = None
    """Repository on the hub, owner/name, that gets the file and its card; `hf auth login` first."""
    private: bool = True
    """Whether a repository that push makes is private."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.evaluation is not None and not (self.card or self.push):
            raise UserError(f"evaluation={self.evaluation}: goes into the card; set card=true")


@dataclass
class Export(CardOptions):
    run_dir: str = MISSING
    """Run folder of launch/train.py."""
    adapter: str = MISSING
    """File to write, ending in .safetensors."""
    format: AdapterFormat = AdapterFormat.diffusers
    """diffusers (also PEFT), diffsynth and comfyui (alpha/rank folded in), peft (a folder's adapter_model.safetensors
    and its adapter_config.json), kohya (lora_down, lora_up and alpha)."""
    weights: Weights = Weights.raw
    """raw, or ema when the run kept a moving average."""
    step: int | None = None
    """Checkpoint step to export; unset takes the newest."""


class PromptSet(Enum):
    """Prompts that come with the project."""

    english = "english"
    chinese = "chinese"


@dataclass
class Sample(Experiment):
    output: str = MISSING
    """Folder for the videos, one in it for each variant. The same command again goes on; others may share the work."""
    prompt: str | None = None
    """Text of the video to make."""
    prompts_file: str | None = None
    """File of prompts instead: text with one a line, or .jsonl with an object a line: prompt, and as needed
    negative_prompt, seed, num_frames, height, width, fps and image (relative to the file)."""
    prompt_set: PromptSet | None = None
    """The project's own evaluation prompts instead, in english or chinese: camera flights, landscapes, people, animals,
    actions of 16 seconds."""
    seeds: Annotated[int, Range(1, 10_000)] = 1
    """Videos of each prompt, of seeds seed, seed + 1, ..."""
    image: str | None = None
    """Picture that every video begins with, for models that take one; cut and resized to the frames' size."""
    adapter: list[str] = field(default_factory=list)
    """Adapter file in any exported format, with a strength: A.safetensors:0.7. A list, [A.safetensors,B.safetensors],
    makes a video with each; A.safetensors+B.safetensors:0.5 takes both at once. None samples the base model."""
    compare: bool = False
    """Make the same video from the same noise without any adapter too."""
    keep_latents: bool = False
    """Keep each video's latents beside it, as .safetensors."""
    latents: str | None = None
    """Kept latents, a file or a folder of them, to decode instead of making videos anew."""
    overwrite: bool = False
    """Make videos again that the folder holds with other settings; unset refuses to."""
    dry_run: bool = False
    """Check everything, say which videos would be made, and make none."""
    device: str = "auto"
    """auto takes all GPUs, else the CPU; or names with commas between, like cuda:1,cuda:3: each makes videos."""
