"""One training step run without data or memory: its exact FLOPs, and every byte it would hold, from the real model.

The step runs on fake tensors (shapes without content) through the real network, extension, autocast, recomputation
policy and sequence split, so nothing about them is restated in a formula. Two depths are traced and every further block
adds what the third one added to the second: the first block differs (nothing before it needs a gradient), the others
are alike.

Axis letters: B batch, T latent frames, C channel, H height, W width, L text tokens, N heads, S joint sequence,
D head dim.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from exvideo_train.config.experiment import MemoryConfig, Recompute
from exvideo_train.extensions.extension import Extension
from exvideo_train.geometry import Geometry
from exvideo_train.models.family import Family
from exvideo_train.models.noise_levels import squared_error
from exvideo_train.parallel.activation_checkpointing import HostMemory
from exvideo_train.parallel.attention import attend_by_shape
from exvideo_train.parallel.mesh import Mesh
from exvideo_train.parallel.parallelize import parallelize
from exvideo_train.training.flops import empty_inputs

# CUDA's caching allocator hands out multiples of this many bytes (c10/cuda/CUDACachingAllocator, kMinBlockSize).
ALLOCATION_BYTES = 512
# Blocks of the deeper trace; one fewer in the other.
TRACED_BLOCKS = 3
# Operators that only make or name memory; allocation is counted, no byte moves.
NO_WORK = frozenset(
    {torch.ops.aten.empty, torch.ops.aten.empty_like, torch.ops.aten.new_empty, torch.ops.aten.empty_strided}
    | {torch.ops.aten._unsafe_view, torch.ops.aten._reshape_alias, torch.ops.aten.detach}
)
_TRACING = threading.Lock()


class TracedKernel(Enum):
    """Which attention a trace runs: one that keeps the output and a log-sum-exp, or the one that keeps whole maps."""

    fused = "fused"
    math = "math"


@dataclass(frozen=True)
class Work:
    """What is traced, all of it; equal works have equal traces.

    Attributes:
        config: the backbone's config, of ``family``'s config class.
        extension: what is trained; None trains the whole backbone instead (to show what freezing saves).
        recompute: the policy of activation checkpointing.
        offload_activations, feed_forward_chunks: as in ``memory``.
        compute_dtype: of autocast; float32 runs without it.
        weights_dtype: of the backbone's weights.
        sequence_size: ranks that share the sample; the trace is of the first rank, which has the longest slice.
    """

    family: Family[Any]
    config: Any
    extension: Extension | None
    geometry: Geometry
    recompute: Recompute
    batch_size: int = 1
    compute_dtype: torch.dtype = torch.bfloat16
    weights_dtype: torch.dtype = torch.bfloat16
    kernel: TracedKernel = TracedKernel.fused
    sequence_size: int = 1
    offload_activations: bool = False
    feed_forward_chunks: int = 1


@dataclass(frozen=True)
class StepTrace:
    """One micro-step's cost on one rank, weights, their gradients and the optimizer's states not included.

    Attributes:
        forward_flops: of the forward pass, as torch's FlopCounterMode counts them.
        backward_flops: of the backward pass, recomputation included.
        attention_forward_flops: part of both that is attention kernels run forward, recomputed ones included.
        attention_backward_flops: part of backward_flops that is attention kernels run backward.
        moved_bytes: read and written by all operators but products and views: what takes time without FLOPs.
        sequence_wire_bytes: sent by this rank to the others that share its sample.
        forward_peak_bytes: most bytes alive during the forward pass.
        kept_bytes: alive between forward and backward: the batch and what the backward pass needs.
        backward_peak_bytes: most bytes alive during the backward pass, without parameter gradients.
        host_bytes: kept in host memory in between; they cross to it and back once each.
    """

    forward_flops: int
    backward_flops: int
    attention_forward_flops: int
    attention_backward_flops: int
    moved_bytes: int
    sequence_wire_bytes: int
    forward_peak_bytes: int
    kept_bytes: int
    backward_peak_bytes: int
    host_bytes: int

    def _deeper(self, shallower: StepTrace, num_blocks: int) -> StepTrace:
        """This trace with more blocks, each of which adds what the last one here added to ``shallower``."""
        fields = self.__dataclass_fields__
        steps = {name: getattr(self, name) - getattr(shallower, name) for name in fields}
        return StepTrace(**{name: getattr(self, name) + num_blocks * step for name, step in steps.items()})


@functools.lru_cache(maxsize=64)
def trace_step(work: Work) -> StepTrace:
    """The cost of one micro-step of the whole network."""
    with torch.device("meta"):
        blocks = getattr(work.family.build(work.config), "blocks", None)
    if blocks is None or (depth := len(blocks)) <= TRACED_BLOCKS:
        return trace_blocks(work, None)
    deep = trace_blocks(work, TRACED_BLOCKS)
    return deep._deeper(trace_blocks(work, TRACED_BLOCKS - 1), depth - TRACED_BLOCKS)


def trace_blocks(work: Work, num_blocks: int | None) -> StepTrace:
    """The cost of one micro-step of the network cut to its first blocks, or of all of it, to the last operator."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with torch.device("meta"):
        model = work.family.build(work.config).to(work.weights_dtype)
    if num_blocks is not None:
        del model.blocks[num_blocks:]  # type: ignore[operator, union-attr]
    if work.extension is not None:
        work.extension.attach(model, seed=0)
    # One at a time: the process group that stands in for the ranks is global.
    with _TRACING, _stand_in_ranks(work.sequence_size) as group, FakeTensorMode():
        _place_on_fake_cpu(model)
        model.train()
        mesh = Mesh(0, work.sequence_size, work.sequence_size, torch.device("cpu"), group)
        memory = MemoryConfig(
            recompute=work.recompute,
            offload_activations=work.offload_activations,
            feed_forward_chunks=work.feed_forward_chunks,
        )
        host = _CountedHost()
        attend = _ATTENDS[work.kernel]
        parallelize(model, memory, mesh, work.compute_dtype, has_dropout=False, attend=attend, host=host)
        for parameter in model.parameters():
            # Gradients are the optimizer's to account for: ZeRO decides where they live and how long.
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(_drop_gradient)
        return _run(model, work, host)


def _place_on_fake_cpu(model: nn.Module) -> None:
    """Parameters from the meta device to one that autocast acts on."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            placed = torch.empty(parameter.shape, dtype=parameter.dtype)
            setattr(module, name, nn.Parameter(placed, requires_grad=parameter.requires_grad))


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


def _attend_math(q_BNSD: Tensor, k_BNSD: Tensor, v_BNSD: Tensor) -> Tensor:
    scores_BNSS = (q_BNSD * q_BNSD.shape[-1] ** -0.5) @ k_BNSD.transpose(-1, -2)
    return scores_BNSS.softmax(dim=-1).to(v_BNSD.dtype) @ v_BNSD


_ATTENDS = {TracedKernel.fused: attend_by_shape, TracedKernel.math: _attend_math}


class _CountedHost(HostMemory):
    """Keeps shapes instead of content: what is here takes nothing of the device."""

    def __init__(self) -> None:
        self.num_bytes = 0

    def put(self, tensor: Tensor) -> Any:
        self.num_bytes += _size_bytes(tensor)
        return tensor.shape, tensor.dtype

    def get(self, token: Any) -> Tensor:
        shape, dtype = token
        return torch.empty(shape, dtype=dtype)


def _run(model: nn.Module, work: Work, host: _CountedHost) -> StepTrace:
    meter = CostCounter()
    with meter:
        inputs = empty_inputs(work.family, work.config, work.geometry, work.batch_size)
        target_BTCHW = torch.empty_like(inputs.latents_BTCHW)
        prediction_BTCHW = model(inputs.latents_BTCHW, inputs.told_B, **inputs.conditions)
        loss = squared_error(prediction_BTCHW, target_BTCHW).mean
        del prediction_BTCHW
        forward_flops, forward_peak_bytes, kept_bytes = meter.flops, meter.peak_bytes, meter.live_bytes
        meter.peak_bytes = kept_bytes
        loss.backward()
    return StepTrace(
        forward_flops=forward_flops,
        backward_flops=meter.flops - forward_flops,
        attention_forward_flops=meter.attention_forward_flops,
        attention_backward_flops=meter.attention_backward_flops,
        moved_bytes=meter.moved_bytes,
        sequence_wire_bytes=meter.sent_bytes * (work.sequence_size - 1) // work.sequence_size,
        forward_peak_bytes=forward_peak_bytes,
        kept_bytes=kept_bytes,
        backward_peak_bytes=meter.peak_bytes,
        host_bytes=host.num_bytes,
    )


class CostCounter(TorchDispatchMode):
    """Adds up FLOPs, and counts the bytes of every tensor from its making to its death.

    FLOPs are those of torch's own formulas, the ones FlopCounterMode adds up; that class itself keeps recomputed
    activations alive, which is what is measured here.

    Attributes:
        flops: of all operators so far; two parts of it are counted apart.
        moved_bytes: read and written by operators that are neither products nor views.
        sent_bytes: given to collectives: by all-to-all the input, by all-gather the input once for every rank.
        live_bytes: of the tensors alive now.
        peak_bytes: most alive at once since it was last set.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0
        self.attention_forward_flops = 0
        self.attention_backward_flops = 0
        self.moved_bytes = 0
        self.sent_bytes = 0
        self.live_bytes = 0
        self.peak_bytes = 0
        self._seen: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        known = {tensor.untyped_storage()._cdata for tensor in inputs}
        output = func(*args, **kwargs)
        outputs = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
        self._count_work(func, args, kwargs, output, [*inputs, *outputs])
        for tensor in outputs:
            self._count(tensor.untyped_storage(), known)
        return output

    def _count_work(self, func: Any, args: Any, kwargs: Any, output: Any, tensors: list[Tensor]) -> None:
        formula = flop_registry.get(func.overloadpacket)
        if func.namespace == "c10d":
            # Both collectives in use take (outputs, inputs, ...), and the outputs are as large as what is sent in all.
            self.sent_bytes += sum(_size_bytes(tensor) for tensor in tree_leaves(args[0]))
            return
        if formula is None:
            # `prim` asks a fake tensor where it is.
            if not func.is_view and func.namespace != "prim" and func.overloadpacket not in NO_WORK:
                self.moved_bytes += sum(_size_bytes(tensor) for tensor in tensors)
            return
        flops = formula(*args, **kwargs, out_val=output)
        self.flops += flops
        name = func.overloadpacket.__name__
        if "attention" in name and "backward" in name:
            self.attention_backward_flops += flops
        elif "attention" in name:
            self.attention_forward_flops += flops

    def _count(self, storage: torch.UntypedStorage, known: set[int]) -> None:
        key = storage._cdata
        if key in self._seen or key in known:
            return
        num_bytes = -(-storage.nbytes() // ALLOCATION_BYTES) * ALLOCATION_BYTES
        self._seen[key] = weakref.ref(storage, functools.partial(self._forget, key, num_bytes))
        self.live_bytes += num_bytes
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)

    def _forget(self, key: int, num_bytes: int, _: Any) -> None:
        self.live_bytes -= num_bytes
        self._seen.pop(key, None)


def _size_bytes(tensor: Tensor) -> int:
    """What reading the tensor once takes; an expanded one is read from caches but for the memory it has."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


@contextlib.contextmanager
def _stand_in_ranks(size: int) -> Iterator[dist.ProcessGroup | None]:
    """A process group of this size whose other ranks do not exist: collectives return at once."""
    if size == 1:
        yield None
        return
    from torch.testing._internal.distributed.fake_pg import FakeStore

    assert not dist.is_initialized(), "a sequence-parallel step is traced by a plan, never inside a run"
    dist.init_process_group("fake", rank=0, world_size=size, store=FakeStore())
    try:
        yield dist.new_group(list(range(size)))
    finally:
        dist.destroy_process_group()
