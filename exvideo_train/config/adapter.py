"""The options of ``python -m exvideo_train.adapter``, a group an action."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Annotated

from omegaconf import MISSING

from exvideo_train.config.commands import AdapterFormat, CardOptions, Weights
from exvideo_train.config.options import Options, Range


class AverageOf(Enum):
    """What a mean is taken of."""

    updates = "updates"
    factors = "factors"


@dataclass
class AdapterOptions(Options):
    family: str | None = None
    """Family of the model that foreign files are for; unset takes the file's own word, or cogvideox."""
    weights: Weights = Weights.raw
    """Which copy is taken of run folders and checkpoints: raw or ema."""


@dataclass
class OneAdapter(AdapterOptions):
    adapter: str = MISSING
    """Adapter file, PEFT's folder, checkpoint or run folder."""


@dataclass
class AdapterInspect(OneAdapter):
    pass


@dataclass
class AdapterConvert(OneAdapter, CardOptions):
    output: str = MISSING
    """File to write, ending in .safetensors; adapter_model.safetensors for format=peft."""
    format: AdapterFormat = MISSING
    """diffusers, peft, kohya (which state alpha), diffsynth, comfyui (alpha/rank folded into B)."""


@dataclass
class AdapterDiff(AdapterOptions):
    adapter: str = MISSING
    """Adapter file, PEFT's folder, checkpoint or run folder, whose updates the difference is relative to."""
    other: str = MISSING
    """The one that is held against it."""


@dataclass
class AdapterAverage(AdapterOptions):
    adapters: list[str] = field(default_factory=list)
    """Two or more adapter files, PEFT's folders, checkpoints or run folders, like [A.safetensors,RUN]."""
    output: str = MISSING
    """File to write, ending in .safetensors."""
    shares: Annotated[list[float], Range(-1e3, 1e3)] = field(default_factory=list)
    """Weight of each adapter; empty weighs all alike, and they add up to 1."""
    ema_steps: Annotated[float | None, Range(above=0)] = None
    """Weigh points of one run, by exp(-steps before the last / ema_steps) instead: the moving average that the run need
    not have kept, as far as its checkpoints tell (post-hoc EMA, cf. arXiv 2312.02696)."""
    of: AverageOf = AverageOf.updates
    """updates: the mean of B @ A, brought to rank by SVD. factors: the means of A and of B, for points of one run."""
    rank: Annotated[int | None, Range(1, 8192)] = None
    """Rank of the mean of updates; unset takes the largest of the adapters'."""
    format: AdapterFormat = AdapterFormat.diffusers
    """Format of the file."""


@dataclass
class AdapterResize(OneAdapter):
    output: str = MISSING
    """File to write, ending in .safetensors."""
    rank: Annotated[int, Range(1, 8192)] = MISSING
    """Rank to bring every update to, by SVD where it is smaller."""
    format: AdapterFormat = AdapterFormat.diffusers
    """Format of the file."""


@dataclass
class AdapterMerge(OneAdapter):
    model_path: str = MISSING
    """The base model: a folder in the published layout or a hub id."""
    model_revision: str | None = None
    """Hub revision (branch, tag or commit); unset takes the newest."""
    output: str = MISSING
    """Folder that gets the network's folder with the adapter in its weights, bf16."""
    strength: Annotated[float, Range(-1e3, 1e3)] = 1.0
    """1 is as trained."""
