"""What a rank holds in device memory, by category and by moment of the step.

Activations come from a trace (:mod:`exvideo_train.planning.trace`). What the optimizer holds is written down here from
what DeepSpeed allocates with an engine in fp32 (``runtime/zero/stage_1_and_2.py`` and ``stage3.py`` of 0.19); a test
holds it against the tensors of real engines. P is the number of trained parameters, N of ranks, 4 bytes each.
"""

from __future__ import annotations

from dataclasses import dataclass

FP32_BYTES = 4
# AdamW's first and second moment.
NUM_MOMENTS = 2
# DeepSpeed's default of stage3_max_live_parameters: with ZeRO-3, at most so many are gathered at once.
MAX_LIVE_PARAMETERS = 1_000_000_000


@dataclass(frozen=True)
class Sharding:
    """How weights and optimizer are divided.

    Attributes:
        trained: parameters that are trained, all in fp32.
        frozen_bytes: of the parameters that are not.
        stage: of ZeRO; 0 keeps everything on every rank (plain data parallelism).
        reduce_bucket: elements of DeepSpeed's gradient bucket.
        offload: optimizer states live in host memory.
        keep_ema: a moving average is kept beside the moments.
        accumulation_steps: micro-steps added up to one optimizer step.
    """

    trained: int
    frozen_bytes: int
    world_size: int
    stage: int
    reduce_bucket: int
    offload: bool = False
    keep_ema: bool = False
    accumulation_steps: int = 1


@dataclass(frozen=True)
class OptimizerMemory:
    """Bytes of one rank, without activations.

    Attributes:
        frozen: weights that are not trained.
        trained: weights that are, in fp32.
        states: fp32 master copy, moments and moving average.
        gathered: ZeRO-3 only: parameters of others, present while they are used.
        gradients_forward, gradients_backward, gradients_update: gradients and their buffers at each moment.
        host: what offloading keeps in host memory instead.
    """

    frozen: int
    trained: int
    states: int
    gathered: int
    gradients_forward: int
    gradients_backward: int
    gradients_update: int
    host: int


def optimizer_memory(sharding: Sharding) -> OptimizerMemory:
    """What ZeRO of this stage holds on one rank."""
    whole = FP32_BYTES * sharding.trained
    copies = 1 + NUM_MOMENTS + sharding.keep_ema
    if sharding.stage == 0:
        # No flat copies: AdamW steps on the parameters themselves.
        kept = whole if sharding.accumulation_steps > 1 else 0
        return OptimizerMemory(sharding.frozen_bytes, whole, (copies - 1) * whole, 0, kept, whole, whole, 0)
    share = -(-whole // sharding.world_size)
    bucket = FP32_BYTES * sharding.reduce_bucket
    if sharding.stage == 3:
        return _stage3(sharding, share, copies, bucket)
    accumulates = sharding.accumulation_steps > 1
    if sharding.stage == 1:
        # Whole gradients, and the bucket from the first one on, until the last micro-step has been reduced.
        forward, backward, update = (whole + bucket) * accumulates, whole + bucket, whole + bucket
    else:
        # The bucket is made at the first gradient; each time it is full it is reduced and this rank's share kept.
        overflows = sharding.trained > sharding.reduce_bucket
        forward = share * accumulates
        backward, update = forward + bucket + share * overflows, forward + bucket + share
    # Reducing over ranks copies what the bucket holds to a flat tensor; the update copies this rank's share to one.
    reduced = min(whole, bucket) if sharding.world_size > 1 else 0
    update = max(update + reduced, 2 * share)
    states, host = copies * share, 0
    if sharding.offload:
        # Master, moments, average, the gradient and the copy that goes back to the device.
        states, host, forward = 0, (copies + 2) * share, 0
        backward, update = bucket, bucket + reduced
    return OptimizerMemory(sharding.frozen_bytes, whole, states, 0, forward, backward, update, host)


def _stage3(sharding: Sharding, share: int, copies: int, bucket: int) -> OptimizerMemory:
    """Parameters of every kind are cut into N parts; gradients and the bucket stay allocated through the run."""
    frozen = -(-sharding.frozen_bytes // sharding.world_size)
    # Mostly frozen parameters of 2 bytes are live at once; the bound is on their number, not their bytes.
    total_bytes = sharding.frozen_bytes + FP32_BYTES * sharding.trained
    gathered = 0 if sharding.world_size == 1 else min(total_bytes, 2 * MAX_LIVE_PARAMETERS)
    states, gradients, host = copies * share, share + bucket, 0
    if sharding.offload:
        states, gradients, host = 0, bucket, (copies + 1) * share
    return OptimizerMemory(frozen, share, states, gathered, gradients, gradients, gradients + 2 * share, host)


# Outside torch's allocator: CUDA context, cuBLAS and cuDNN handles, NCCL's buffers. Assumed; 1.0-2.0 GiB are commonly
# seen on A100 and H100 with one NCCL communicator.
RUNTIME_BYTES = int(1.5 * 2**30)
# Allocated blocks that the caching allocator cannot reuse, as a share of the peak. Assumed.
FRAGMENTATION_SHARE = 0.05


@dataclass(frozen=True)
class StepMemory:
    """One rank's device memory at the worst moment of a step, by category, in bytes.

    Attributes:
        moment: forward, backward or update: when the sum is largest.
        weights: frozen weights, with what ZeRO-3 gathers.
        trained: weights that are trained.
        optimizer: fp32 master copy, moments, moving average.
        gradients: gradients and DeepSpeed's buffers for them.
        kept: activations kept for the backward pass, and the batch.
        working: what the moment needs on top: the block being recomputed, a kernel's own workspace.
        runtime: outside torch's allocator, and fragmentation: a reserve, not counted in ``allocated``.
        host: in host memory, a rank.
    """

    moment: str
    weights: int
    trained: int
    optimizer: int
    gradients: int
    kept: int
    working: int
    runtime: int
    host: int

    @property
    def allocated(self) -> int:
        """What ``torch.cuda.max_memory_allocated`` would say."""
        return self.weights + self.trained + self.optimizer + self.gradients + self.kept + self.working

    @property
    def total(self) -> int:
        """What the device must have."""
        return self.allocated + self.runtime


def step_memory(
    optimizer: OptimizerMemory,
    forward_peak: int,
    kept: int,
    backward_peak: int,
    workspace: int,
    batch: int,
    host: int = 0,
) -> StepMemory:
    """Put a trace's activations and the optimizer's bytes together, at the moment when their sum is largest.

    Args:
        forward_peak, kept, backward_peak: of a :class:`exvideo_train.planning.trace.StepTrace`, in bytes.
        workspace: that the attention kernel takes for itself in its backward pass.
        batch: latents, noise and text of a micro-step, which are there at every moment.
        host: activations that wait in host memory.
    """
    moments = {
        "forward": (kept, forward_peak - kept, optimizer.gradients_forward),
        "backward": (kept, backward_peak - kept + workspace, optimizer.gradients_backward),
        "update": (batch, 0, optimizer.gradients_update),
    }
    moment = max(moments, key=lambda name: sum(moments[name]))
    kept_now, working, gradients = moments[moment]
    weights = optimizer.frozen + optimizer.gathered
    allocated = weights + optimizer.trained + optimizer.states + gradients + kept_now + working
    return StepMemory(
        moment=moment,
        weights=weights,
        trained=optimizer.trained,
        optimizer=optimizer.states,
        gradients=gradients,
        kept=kept_now,
        working=working,
        runtime=RUNTIME_BYTES + int(FRAGMENTATION_SHARE * allocated),
        host=optimizer.host + host,
    )
