"""The options of the commands that take an experiment, and of export.

The data commands' own options stand in :mod:`exvideo_train.config.clips` and :mod:`exvideo_train.config.latents`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from omegaconf import MISSING

from exvideo_train.config.experiment import Experiment
from exvideo_train.config.options import Options


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
class Export(Options):
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
    card: bool = False
    """Write README.md beside the file: base model, frames, steps, samples, losses, and how to load it."""
    push: str | None = None
    """Repository on the hub, owner/name, that gets the file and its card; `hf auth login` first."""
    private: bool = True
    """Whether a repository that push makes is private."""


@dataclass
class Sample(Experiment):
    output: str = MISSING
    """Folder for the videos."""
    prompt: str | None = None
    """Text of the video to make."""
    prompts_file: str | None = None
    """Text file with a prompt a line, instead of prompt."""
    image: str | None = None
    """Picture that every video begins with, for models that take one; cut and resized to the frames' size."""
    adapter: str | None = None
    """Adapter file in any exported format; unset samples the base model."""
    adapter_scale: float = 1.0
    """Strength of the adapter."""
    compare: bool = False
    """Make the same video from the same noise without the adapter too, and both side by side."""
    batched_guidance: bool = True
    """Predict with and without prompt in one call of the backbone; false takes less memory."""
    vae_tiling: bool = False
    """Decode in tiles: less memory, faint seams."""
    device: str = "auto"
    """auto takes the first GPU, else the CPU."""
