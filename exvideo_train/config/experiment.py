"""What an experiment fixes for every stage: geometry, model, adapter, optimisation, memory, parallelism.

Each option stands here once: its type, its default, and below it its unit and reason. ``--help`` of every command
is made from these texts, and ``conf/`` holds the choices.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Annotated, Any

from omegaconf import OmegaConf

from exvideo_train.config.options import Options, Range
from exvideo_train.errors import UserError
from exvideo_train.geometry import Geometry


class Dtype(Enum):
    """Number format of frozen weights and of autocast."""

    bf16 = "bf16"
    fp16 = "fp16"
    fp32 = "fp32"


class LearningRateSchedule(Enum):
    """Shape of the learning rate after warm-up."""

    constant = "constant"
    cosine = "cosine"
    linear = "linear"


class Recompute(Enum):
    """What the backward pass computes again instead of keeping."""

    none = "none"
    full = "full"
    keep_attention = "keep_attention"


class AttentionKernel(Enum):
    """Which attention kernel is asked for; the one that runs is probed and logged at start."""

    auto = "auto"
    flash = "flash"
    cudnn = "cudnn"
    flash_attn = "flash_attn"
    math = "math"


class SamplerKind(Enum):
    """Sampler of evaluation videos, both from diffusers."""

    ddim = "ddim"
    dpm = "dpm"


class TimestepSpacing(Enum):
    """Which of the training timesteps sampling visits."""

    trailing = "trailing"
    linspace = "linspace"


class Positions(Enum):
    """Positions in time of latent frames beyond the base model's length."""

    trained = "trained"
    interpolated = "interpolated"
    riflex = "riflex"


# What can be meant, as wide as that: beyond it a number is a slip of the keyboard, and some end hours later.
MANY = 10**9
# Beyond it alpha / rank has no use, and near the ends of float32 the update would become infinite or nothing.
ALPHA = Range(1e-6, 1e6, advice="alpha equal to rank scales updates by 1")

LORA_TARGETS = [
    "attn1.to_q",
    "attn1.to_k",
    "attn1.to_v",
    "attn1.to_out.0",
    "ff.net.0.proj",
    "ff.net.2",
    "norm1.linear",
    "norm2.linear",
]


@dataclass
class ModelConfig(Options, group="model"):
    path: str = "zai-org/CogVideoX-5b"
    """A folder in the published layout (transformer/ vae/ text_encoder/ tokenizer/ scheduler/) or a hub id."""
    revision: str | None = None
    """Hub revision (branch, tag or commit); unset takes the newest. Pin it for runs that must be repeatable."""
    dtype: Dtype = Dtype.bf16
    """Number format of the frozen backbone and of autocast: CogVideoX-5B is bf16, 2B is fp16."""


@dataclass
class LoraConfig(Options, group="lora"):
    rank: Annotated[int, Range(1, 8192, advice="64 is the default of exp=129f")] = 64
    """Rank of each update. 64 on the eight Linears of 42 blocks is 250,478,592 parameters, 1.0 GB in fp32."""
    alpha: Annotated[float, ALPHA] = 64.0
    """Scale numerator: the update is alpha/rank * B @ A. Equal to rank, no program can get the scale wrong."""
    dropout: Annotated[float, Range(0, below=1)] = 0.0
    """Dropout before A, 0..1. Recomputation stays exact with it; few long clips may profit from 0.05."""
    targets: list[str] = field(default_factory=lambda: list(LORA_TARGETS))
    """Suffixes of the Linears that get an update, as published in the checkpoint's names."""

    init: str | None = None
    """Adapter file of any program that training begins from, of this rank, alpha and targets; unset begins with an
    update of zero."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.targets:
            raise UserError("lora.targets=[]: nothing would be trained; name at least one Linear, e.g. attn1.to_q")


@dataclass
class OptimConfig(Options, group="optim"):
    lr: Annotated[float, Range(above=0, most=1, advice="1e-4 is the default")] = 1e-4
    """Peak learning rate of AdamW."""
    schedule: LearningRateSchedule = LearningRateSchedule.cosine
    """Shape after warm-up, from lr to lr * final_lr_ratio at max_steps: constant, cosine, linear."""
    warmup_steps: Annotated[int, Range(0, MANY)] = 100
    """Optimizer steps of linear warm-up from 0."""
    final_lr_ratio: Annotated[float, Range(0, 1)] = 0.1
    """Learning rate at max_steps as a share of lr (cosine and linear)."""
    betas: Annotated[list[float], Range(0, below=1)] = field(default_factory=lambda: [0.9, 0.95])
    """AdamW's decay of the first and second moment."""
    eps: Annotated[float, Range(0, 1)] = 1e-8
    """AdamW's epsilon."""
    weight_decay: Annotated[float, Range(0, 10)] = 1e-4
    """AdamW's decoupled weight decay."""
    gradient_clip: Annotated[float, Range(0, 1e6)] = 1.0
    """Largest gradient norm of one optimizer step, over all ranks and micro-steps; 0 turns clipping off."""
    accumulation_steps: Annotated[int, Range(1, 10_000)] = 1
    """Micro-steps added up to one optimizer step."""
    ema_decay: Annotated[float, Range(0, below=1)] = 0.0
    """Decay of the adapter's moving average a step; 0 keeps none. 0.999 averages about 1000 steps."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.betas) != 2:
            raise UserError(f"optim.betas={self.betas}: must be two numbers, like [0.9,0.95]")


@dataclass
class DataConfig(Options, group="data"):
    batch_size: Annotated[int, Range(1, 10_000)] = 1
    """Samples of the experiment's geometry a data-parallel rank and micro-step."""
    geometries: list[str] = field(default_factory=list)
    """Geometries of the store to mix, as names like 49x480x720_8fps; empty takes the experiment's own."""
    token_budget: Annotated[int, Range(0, MANY)] = 0
    """Video tokens a data-parallel rank and micro-step when geometries are mixed: shorter clips then come
    several at a time. 0 takes batch_size of every geometry."""
    caption_dropout: Annotated[float, Range(0, below=1)] = 0.1
    """Share of samples trained with the empty prompt, so that guidance works in sampling."""
    num_workers: Annotated[int, Range(0, 256)] = 2
    """Processes that read and prepare samples ahead of the step, a rank; 0 reads in the training process."""
    max_corrupt_clips: Annotated[int, Range(0, MANY)] = 100
    """Corrupt latent files that are replaced by the next clip before the run stops."""
    held_out_clips: Annotated[int, Range(0, MANY)] = 0
    """Clips never trained on, the same for every run over the store: they are the validation set. At most a quarter
    of the store."""


@dataclass
class MemoryConfig(Options, group="memory"):
    zero_stage: Annotated[int, Range(1, 3, advice="2 is the default")] = 2
    """DeepSpeed ZeRO: 1 shards optimizer states, 2 gradients too, 3 parameters too."""
    offload_optimizer: bool = False
    """Keep optimizer states in host memory: saves 3 GB over N ranks for a slower step."""
    recompute: Recompute = Recompute.full
    """none keeps all activations; full keeps each block's input; keep_attention keeps attention outputs too
    (11.6 GB more at 129 frames in bf16, and 17 % fewer FLOPs)."""
    offload_activations: bool = False
    """Keep the inputs of recomputed blocks in pinned host memory between forward and backward: 11 GB of device memory
    less at 129 frames, for as much host memory a rank and 22 GB over PCIe a micro-step. Changes no bit."""
    feed_forward_chunks: Annotated[int, Range(1, 256)] = 1
    """Pieces of the sequence that feed-forward layers take one after another, recomputing each once more: their hidden
    activations, 1.1 GB a layer at 129 frames, shrink by as much. Sampling takes them so, too."""
    attention: AttentionKernel = AttentionKernel.auto
    """auto takes the fastest kernel that runs and refuses, on a GPU, one that builds the whole attention map
    (192 GB at 129 frames); the others force one."""
    compile: bool = False
    """Compile each block with torch.compile (first step slower by minutes)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.offload_activations and self.recompute is Recompute.none:
            raise UserError(
                "memory.offload_activations=true: moves the inputs of recomputed blocks, and memory.recompute=none "
                "recomputes none; set memory.recompute=full"
            )
        if self.compile and self.zero_stage == 3:
            raise UserError(
                "memory.compile=true: ZeRO-3 gathers parameters by hooks that break up every compiled block, which "
                "makes it no faster; set memory.zero_stage=2 or memory.compile=false"
            )


@dataclass
class ParallelConfig(Options, group="parallel"):
    sequence: int = 1
    """Ranks that share one sample's joint sequence (Ulysses); divides the world size and the heads."""


@dataclass
class BoardsConfig(Options, group="logger"):
    wandb: bool = False
    """Log to Weights & Biases; WANDB_MODE=offline keeps it local."""
    wandb_project: str = "exvideo"
    """Weights & Biases project."""
    wandb_name: str | None = None
    """Weights & Biases run name; unset takes the name of the run's or the report's folder."""
    tensorboard: bool = False
    """Write TensorBoard events into that folder."""


@dataclass
class LoggerConfig(BoardsConfig, group="logger"):
    log_every_steps: Annotated[int, Range(1, MANY)] = 1
    """Steps between console lines and records in metrics.jsonl; only these steps synchronise the device."""


@dataclass
class CheckpointConfig(Options, group="checkpoint"):
    every_steps: Annotated[int, Range(0, MANY)] = 250
    """Optimizer steps between checkpoints; one is always written at the end. 0 writes only that."""
    keep_last: Annotated[int, Range(0, MANY)] = 2
    """Newest checkpoints kept."""
    keep_every: Annotated[int, Range(0, MANY)] = 0
    """Checkpoints at multiples of this many steps are kept for ever; 0 keeps none."""


@dataclass
class ValidationConfig(Options, group="validation"):
    every_steps: Annotated[int, Range(0, MANY)] = 250
    """Optimizer steps between validations, the first before step 0; 0 turns it off. Needs data.held_out_clips."""
    timestep_quantiles: Annotated[int, Range(1, 1000)] = 4
    """Timesteps at which each held-out clip is scored, evenly spread over the schedule: one band each."""
    sample_every_steps: Annotated[int, Range(0, MANY)] = 0
    """Optimizer steps between sample videos written by a separate process on spare time; 0 writes none."""
    sample_prompts: list[str] = field(default_factory=list)
    """Prompts of the sample videos; empty takes the captions of the first two held-out clips."""
    sample_device: str = "cpu"
    """Device of the process that makes sample videos: name a GPU that does not train, like cuda:7, by the machine's
    own numbers."""
    sample_wait_minutes: Annotated[float, Range(0, 1e6)] = 30.0
    """How long a finished run waits for its last sample videos before it gives them up."""


@dataclass
class SafetyConfig(Options, group="safety"):
    max_nonfinite_steps: Annotated[int, Range(0, MANY)] = 10
    """Updates in a row that may be skipped for a non-finite loss or gradient before the run stops."""
    loss_spike_factor: Annotated[float, Range(1, 1e6)] = 4.0
    """A loss above this multiple of its running mean is logged with its clips."""
    rank_timeout_seconds: Annotated[float, Range(0, 1e6)] = 600.0
    """Seconds after which a rank that stopped answering brings the job down."""
    time_limit_minutes: Annotated[float, Range(0, 1e6)] = 0.0
    """Save and exit with the resume code after this many minutes of wall clock; 0 has no limit."""


@dataclass
class Experiment(Options):
    """What ``+exp=...`` fixes for every command."""

    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    data: DataConfig = field(default_factory=DataConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    safety: SafetyConfig = field(default_factory=SafetyConfig)
    num_frames: int = 129
    """Video frames, 8k+1. The base model makes 49."""
    height: int = 480
    """Frame height in pixels, a multiple of 16."""
    width: int = 720
    """Frame width in pixels, a multiple of 16."""
    fps: float = 8.0
    """Frames a second at which clips are sampled and videos written; CogVideoX is trained at 8."""
    seed: Annotated[int, Range(0, 2**63 - 1)] = 6
    """Seed of adapter initialisation, sample order, noise and sampling."""
    max_steps: Annotated[int, Range(1, MANY)] = 4000
    """Optimizer steps of the run."""
    guidance_scale: float = 7.0
    """Classifier-free guidance of evaluation videos, constant over the steps."""
    num_inference_steps: int = 100
    """Denoising steps of evaluation videos."""
    scheduler: SamplerKind = SamplerKind.ddim
    """Sampler of evaluation videos: ddim or dpm."""
    timestep_spacing: TimestepSpacing = TimestepSpacing.trailing
    """Timesteps of evaluation videos: trailing begins at pure noise in equal strides, linspace spreads them evenly from
    the last to the first, as DiffSynth-Studio does."""
    negative_prompt: str = ""
    """What evaluation videos are guided away from; empty is the empty prompt that the model is trained with."""
    batched_guidance: bool = True
    """Predict the two sides of guidance in one call of the backbone; false takes less memory."""
    vae_tiling: bool = False
    """Decode evaluation videos in tiles: less memory, faint seams."""
    positions: Positions = Positions.trained
    """Where latent frames beyond the base model's length stand in time, in training and sampling: trained goes on
    counting, interpolated presses them into the known range (arXiv 2306.15595), riflex slows the rotary frequency
    that would repeat (arXiv 2502.15894). Both lengthen without training, too."""

    @property
    def geometry(self) -> Geometry:
        """The experiment's geometry; raises UserError for values that no model takes."""
        return Geometry(self.num_frames, self.height, self.width, self.fps)

    @property
    def trained_geometries(self) -> list[Geometry]:
        """Those that are mixed, or the experiment's own; raises UserError for bad ones."""
        own = self.geometry
        return [Geometry.from_name(name) for name in self.data.geometries] or [own]


def plain_config(config: Experiment) -> dict[str, Any]:
    """A config as JSON values."""
    content = OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True)
    assert isinstance(content, dict)
    return {str(key): value for key, value in content.items()}
