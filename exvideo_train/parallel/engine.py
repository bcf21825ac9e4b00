"""The one file that knows DeepSpeed.

The engine runs in fp32: ``bf16.enabled`` would cast the LoRA to bf16 with the rest. The backbone is bf16 because it was
loaded so, the LoRA fp32 because it was made so, and products are computed in bf16 by autocast inside the forward pass
(on CUDA the engine turns off an autocast that is on around it).

State is read and written parameter by parameter in full fp32 tensors, so that what is saved knows nothing of ZeRO's
stage or of the number of ranks.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from exvideo_train.config.experiment import Experiment
from exvideo_train.parallel.mesh import Mesh

# The optimizer's own states, and the moving average that lives beside them, sharded as they are.
MOMENTS = ("exp_avg", "exp_avg_sq")
EMA = "ema"
_NEVER = 10**12
# fp32 gradients that are reduced at a time: 0.2 GB. DeepSpeed's own 5e8 is twice a whole LoRA of rank 64, and is
# allocated whole. The 5B's LoRA then takes six reductions a step.
REDUCE_BUCKET_ELEMENTS = 50_000_000


def deepspeed_config(config: Experiment) -> dict[str, Any]:
    """DeepSpeed's JSON configuration for an experiment."""
    zero: dict[str, Any] = {
        "stage": config.memory.zero_stage,
        "contiguous_gradients": True,
        # Overlapped reduction copies gradients in a side stream; LoRA gradients are too small to need it.
        "overlap_comm": False,
        "reduce_bucket_size": REDUCE_BUCKET_ELEMENTS,
        "stage3_param_persistence_threshold": 0,
    }
    if config.memory.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return {
        "train_micro_batch_size_per_gpu": config.data.batch_size,
        "gradient_accumulation_steps": config.optim.accumulation_steps,
        "gradient_clipping": config.optim.gradient_clip,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        # torch's AdamW on the host instead of DeepSpeed's own, which is compiled on first use.
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": _NEVER,
        # Our own meters measure; DeepSpeed's timer waits for the device in every micro-step.
        "timers": {"throughput": {"enabled": False}},
    }


class TrainingEngine:
    """A backbone with its sharded optimizer.

    Args:
        model: backbone with its extension, on this rank's device, already loaded with the weights to start from;
            DeepSpeed broadcasts rank 0's.
        trainable: the trained parameters by published name, all fp32.
        config: the experiment.
        mesh: this rank's place.
        weights_key: what the weights themselves are called among the states.
    """

    def __init__(
        self,
        model: nn.Module,
        trainable: Mapping[str, nn.Parameter],
        config: Experiment,
        mesh: Mesh,
        weights_key: str,
    ) -> None:
        assert all(parameter.dtype == torch.float32 for parameter in trainable.values())
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        os.environ.setdefault("DS_SKIP_CUDA_CHECK", "1")
        import deepspeed

        _keep_quiet(deepspeed)
        optim = config.optim
        self.trainable = dict(trainable)
        self.weights_key = weights_key
        self.mesh = mesh
        self._accumulation_steps = optim.accumulation_steps
        self._ema_decay = optim.ema_decay
        self.optimizer = torch.optim.AdamW(
            list(self.trainable.values()),
            lr=optim.lr,
            betas=(optim.betas[0], optim.betas[1]),
            eps=optim.eps,
            weight_decay=optim.weight_decay,
            fused=True,
        )
        self.engine, *_ = deepspeed.initialize(
            model=model, optimizer=self.optimizer, config=deepspeed_config(config), dist_init_required=None
        )
        self._zero: Any = self.engine.optimizer
        self._create_states()

    @property
    def module(self) -> nn.Module:
        module: nn.Module = self.engine.module
        return module

    def __call__(self, *args: Tensor, **conditions: Tensor) -> Tensor:
        output: Tensor = self.engine(*args, **conditions)
        return output

    def backward(self, loss: Tensor) -> None:
        """Accumulate gradients of the mean over the accumulated micro-steps and all ranks."""
        self.engine.backward(loss)

    def step(self, lr: float) -> tuple[bool, float]:
        """Finish a micro-step; on the last one of an optimizer step clip, update and refresh the moving average.

        Returns:
            whether an update was applied (never for a non-finite gradient: that update is skipped on all ranks), and
            the norm of the whole gradient before clipping, inf when it was not finite.
        """
        self._set_lr(lr)
        last_micro_step = self.engine.is_gradient_accumulation_boundary()
        self.engine.step()
        if not last_micro_step:
            return False, math.nan
        norm = self._zero._global_grad_norm
        norm = float("inf") if norm is None or self._zero.overflow else float(norm)
        applied = bool(self.engine.was_step_applied())
        if applied and self._ema_decay:
            self._update_ema()
        return applied, norm

    def _set_lr(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    def _partitions(self) -> list[Tensor]:
        """This rank's flat fp32 shards of the trained parameters."""
        zero = self._zero
        shards = getattr(zero, "single_partition_of_fp32_groups", None)
        if shards is None:
            shards = zero.fp32_partitioned_groups_flat
        return list(shards)

    def _create_states(self) -> None:
        """Zero moments, a zero step count and, if kept, the moving average at the weights.

        AdamW would create the moments at its first step; loading a checkpoint needs them before.
        """
        optimizer = self._zero.optimizer
        for shard in self._partitions():
            on_gpu = shard.device.type == "cuda"
            state = {
                "step": torch.zeros((), dtype=torch.float32, device=shard.device if on_gpu else "cpu"),
                **{key: torch.zeros_like(shard, requires_grad=False) for key in MOMENTS},
            }
            if self._ema_decay:
                state[EMA] = shard.detach().clone()
            optimizer.state[shard] = state
        link = getattr(self._zero, "_lazy_init_hp_params_optimizer_state", None)
        if link is not None:
            link()

    def _update_ema(self) -> None:
        states = self._zero.optimizer.state
        for shard in self._partitions():
            states[shard][EMA].lerp_(shard.detach(), 1.0 - self._ema_decay)

    def holds_finite_weights(self) -> bool:
        """Whether this rank's shards of the weights have neither NaN nor infinity in them; waits for the device."""
        return all(bool(torch.isfinite(shard).all()) for shard in self._partitions())

    def state_keys(self) -> list[str]:
        """Names of the full tensors kept for each parameter: the weights, the moments and, if kept, "ema"."""
        return [self.weights_key, *MOMENTS, *([EMA] if self._ema_decay else [])]

    def gather_state(self, keys: list[str] | None = None) -> dict[str, dict[str, Tensor]]:
        """{key: {parameter name: full fp32 CPU tensor}} on rank 0, empty dicts elsewhere. Every rank must call it."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        keys = keys or self.state_keys()
        gathered: dict[str, dict[str, Tensor]] = {key: {} for key in keys}
        for name, parameter in self.trainable.items():
            for key in keys:
                if key == self.weights_key:
                    tensor = safe_get_full_fp32_param(parameter)
                else:
                    tensor = safe_get_full_optimizer_state(parameter, key)
                if self.mesh.is_main:
                    shape = getattr(parameter, "ds_shape", parameter.shape)
                    # ZeRO-1 and 2 hand out a buffer of its own, ZeRO-3 may hand out its state itself.
                    copy = hasattr(parameter, "ds_id")
                    gathered[key][name] = tensor.detach().reshape(shape).to("cpu", copy=copy)
        return gathered

    def load_optimizer_state(self, read: Callable[[str, str], Tensor], num_updates: int) -> None:
        """Set moments, moving average and AdamW's step count.

        Args:
            read: (key, parameter name) -> full fp32 tensor, called for every key but the weights' on every rank.
            num_updates: updates applied so far.
        """
        for name, parameter in self.trainable.items():
            for key in self.state_keys()[1:]:
                self._set_state(parameter, key, read(key, name))
        states = self._zero.optimizer.state
        for shard in self._partitions():
            states[shard]["step"].fill_(num_updates)

    def _set_state(self, parameter: nn.Parameter, key: str, full: Tensor) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        full = full.to(self.mesh.device)
        if not hasattr(parameter, "ds_id"):
            safe_set_full_optimizer_state(parameter, full, key)
            return
        # ZeRO-3 pads every parameter to a multiple of the ranks.
        length = parameter.ds_tensor.numel()  # type: ignore[attr-defined]
        padded = torch.zeros(length * self.mesh.world_size, device=full.device)
        padded[: full.numel()] = full.flatten()
        safe_set_local_optimizer_state(parameter, padded[self.mesh.rank * length :][:length], key)

    @contextlib.contextmanager
    def weights(self, *, averaged: bool) -> Iterator[None]:
        """Inside, the module holds the weights themselves or their moving average, in eval mode.

        Every rank must enter.
        """
        from deepspeed import zero
        from deepspeed.utils import safe_get_full_optimizer_state

        parameters = list(self.trainable.values())
        self.module.eval()
        kept: list[Tensor] = []
        if averaged:
            averages = [safe_get_full_optimizer_state(parameter, EMA) for parameter in parameters]
            with zero.GatheredParameters(parameters, modifier_rank=0):
                kept = [parameter.detach().clone() for parameter in parameters]
                _copy_into(parameters, averages)
        try:
            yield
        finally:
            if averaged:
                with zero.GatheredParameters(parameters, modifier_rank=0):
                    _copy_into(parameters, kept)
            self.module.train()


def _keep_quiet(deepspeed: Any) -> None:
    """Nothing compiled at start, no warnings about what only DeepSpeed can change."""
    # DeepSpeed tries every compiler of the machine at start and, on CPUs, builds a collective for inference: training
    # never calls it, not every machine has a compiler, and a build that is killed leaves a lock on which all later
    # runs wait for ever.
    deepspeed.ops.__compatible_ops__ = {}
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.c10d_logger")


def _copy_into(parameters: list[nn.Parameter], values: list[Tensor]) -> None:
    with torch.no_grad():
        for parameter, value in zip(parameters, values, strict=True):
            parameter.copy_(value.reshape(parameter.shape))
