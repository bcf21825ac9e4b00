"""How a backbone is made to fit and to fly: every step from outside, in one function."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from exvideo_train.config.experiment import Dtype, MemoryConfig
from exvideo_train.parallel.activation_checkpointing import HostMemory, block_runner, chunk_runner
from exvideo_train.parallel.attention import choose_attention
from exvideo_train.parallel.mesh import Mesh, check_mesh
from exvideo_train.parallel.sequence import Attend, SequenceSplit


def compute_dtype(dtype: Dtype) -> torch.dtype:
    """Number format of the frozen weights and of autocast.

    An fp16 model trains in bf16: without loss scaling, gradients at 129 frames underflow in fp16.
    """
    return torch.float32 if dtype is Dtype.fp32 else torch.bfloat16


def parallelize(
    backbone: nn.Module,
    memory: MemoryConfig,
    mesh: Mesh,
    compute_dtype: torch.dtype,
    has_dropout: bool,
    attend: Attend | None = None,
    host: HostMemory | None = None,
) -> str:
    """Apply attention kernel, sequence parallelism, compilation, recomputation and autocast to what is trained.

    Args:
        backbone: a network with what it has of these: ``blocks``, ``run_block``, attention modules with ``attend``,
            ``num_heads`` and ``head_dim``, and ``own_tokens`` and ``join_sequence`` to split their sequence; changed
            in place.
        compute_dtype: what attention is computed in.
        has_dropout: blocks draw random numbers, which recomputation must draw again alike.
        attend: the attention to take instead of ``memory.attention``, unprobed: a plan has no device to run one on.
        host: where offloaded activations go, instead of real memory: a plan counts them there.

    Returns:
        The name of the attention kernel that runs, for the log.

    Raises:
        UserError: the choices do not fit the ranks, the heads or the device.
    """
    # Gradients of the extension are sums over all tokens, 44,776 at 129 frames: partial sums stay in fp32.
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    attentions: list[Any] = [module for module in backbone.modules() if hasattr(module, "attend")]
    num_heads, head_dim = (attentions[0].num_heads, attentions[0].head_dim) if attentions else (0, 0)
    check_mesh(mesh.world_size, mesh.sequence_size, num_heads)

    # 1. The kernel first: the all-to-all wraps it.
    kernel = "given" if attentions else "none"
    if attend is None and attentions:
        attend, kernel = choose_attention(memory.attention, mesh.device, compute_dtype, num_heads, head_dim)

    # 2. Sequence parallelism trades tokens for heads around the kernel, inside what is recomputed.
    if mesh.sequence_group is not None and attend is not None:
        split = SequenceSplit(mesh.sequence_group)
        attend = split.attend_with(attend)
        backbone.own_tokens = split.own_tokens  # type: ignore[assignment]
        backbone.join_sequence = split.join  # type: ignore[assignment]
    for attention in attentions:
        attention.attend = attend  # type: ignore[assignment]

    # 3. Compilation before recomputation: a compiled block inside a checkpoint keeps the policy's view of operators.
    if memory.compile:
        for block in getattr(backbone, "blocks", [backbone]):
            block.compile()

    # 4. Feed-forward layers in pieces, within what is recomputed.
    run_in_chunks(backbone, memory.feed_forward_chunks, has_dropout)

    # 5. Recomputation last and outermost, so that it sees the block as it will run.
    inputs_on = (host or HostMemory()) if memory.offload_activations else None
    runner = block_runner(memory.recompute, has_dropout, inputs_on)
    if runner is not None and hasattr(backbone, "run_block"):
        backbone.run_block = runner  # type: ignore[assignment]

    # 6. Autocast inside the forward pass: on CUDA, DeepSpeed's engine turns off one that is on around it.
    if compute_dtype != torch.float32:
        autocast = torch.autocast(mesh.device.type, dtype=compute_dtype)
        backbone.forward = autocast(backbone.forward)  # type: ignore[method-assign]
    return kernel


def run_in_chunks(backbone: nn.Module, num_chunks: int, has_dropout: bool = False) -> None:
    """Let what sees one token at a time (``run_by_token``) take the sequence in pieces; 1 leaves it as it is."""
    if num_chunks > 1:
        runner = chunk_runner(num_chunks, has_dropout)
        for module in backbone.modules():
            if hasattr(module, "run_by_token"):
                module.run_by_token = runner  # type: ignore[assignment]
