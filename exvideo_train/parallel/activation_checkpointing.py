"""What the backward pass recomputes: everything, everything but attention, or nothing.

``full`` keeps each block's input (44,776 x 3072 bf16 = 0.28 GB a block at 129 frames). ``keep_attention`` keeps each
attention's output and log-sum-exp too, which spares the most expensive recomputation: attention is 70 % of the forward
work at 129 frames. What is kept may wait in host memory, and feed-forward layers may run in pieces.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from exvideo_train.config.experiment import Recompute


def attention_ops() -> frozenset[Any]:
    """Every attention operator that this installation knows.

    A list that misses the one that runs recomputes attention without a word, so the list is long: each of torch's
    kernels by name, and flash-attn's own custom operators when that package is installed.
    """
    names = [
        ("aten", "_scaled_dot_product_flash_attention"),
        ("aten", "_scaled_dot_product_flash_attention_for_cpu"),
        ("aten", "_scaled_dot_product_cudnn_attention"),
        ("aten", "_scaled_dot_product_efficient_attention"),
        ("aten", "_scaled_dot_product_fused_attention_overrideable"),
        ("aten", "_scaled_dot_product_attention_math"),
        ("aten", "_flash_attention_forward"),
        ("aten", "_cudnn_attention_forward"),
        ("aten", "_efficient_attention_forward"),
        ("flash_attn", "_flash_attn_forward"),
        ("flash_attn_3", "fwd"),
        ("flash_attn_3", "_flash_attn_forward"),
    ]
    found = set()
    for namespace, name in names:
        packet = getattr(getattr(torch.ops, namespace), name, None)
        if packet is not None:
            found |= {getattr(packet, overload) for overload in packet.overloads()}
    return frozenset(found)


def _keep_attention(ops: frozenset[Any], context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in ops else CheckpointPolicy.PREFER_RECOMPUTE


class HostMemory:
    """Where tensors wait between forward and backward, away from the device.

    All on the device's current stream, in order: the copy out is done before what it was made from can be written
    over, the copy back before it is read. Pinned blocks come back from torch's own cache of them in every step.
    """

    def put(self, tensor: Tensor) -> Any:
        """A token for the tensor's content."""
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        return tensor.device, host.copy_(tensor, non_blocking=tensor.is_cuda)

    def get(self, token: Any) -> Tensor:
        """The content, on its device."""
        device, host = token
        tensor: Tensor = host.to(device, non_blocking=True)
        return tensor


def block_runner(
    recompute: Recompute, has_dropout: bool, inputs_on: HostMemory | None = None
) -> Callable[..., Any] | None:
    """A function ``(block, *args)`` that runs a block under the policy, or None to run it plainly.

    Args:
        recompute: the policy.
        has_dropout: the extension draws random numbers in the block, which recomputation must draw again alike.
        inputs_on: where each block's first argument waits for its backward pass; None leaves it where it is.
    """
    if recompute is Recompute.none:
        return None
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": has_dropout}
    if recompute is Recompute.keep_attention:
        policy = partial(_keep_attention, attention_ops())
        options["context_fn"] = partial(create_selective_checkpoint_contexts, policy)

    def run_block(block: torch.nn.Module, *args: Any) -> Any:
        if not torch.is_grad_enabled():
            return block(*args)
        with _waiting_on(inputs_on, args[0]) if inputs_on is not None else contextlib.nullcontext():
            return checkpoint(block, *args, **options)

    return run_block


def _waiting_on(host: HostMemory, first: Tensor) -> saved_tensors_hooks:
    """Within it what autograd saves of this tensor goes to the host; its other inputs are the same for all blocks."""
    storage = first.untyped_storage()._cdata

    def pack(tensor: Tensor) -> tuple[bool, Any]:
        is_first = tensor.untyped_storage()._cdata == storage
        return is_first, host.put(tensor) if is_first else tensor

    def unpack(packed: tuple[bool, Any]) -> Tensor:
        is_first, content = packed
        return host.get(content) if is_first else content

    return saved_tensors_hooks(pack, unpack)


def chunk_runner(num_chunks: int, has_dropout: bool) -> Callable[..., Tensor]:
    """A function ``(net, joint_BSC)`` that runs what sees one token at a time in pieces of the sequence.

    With gradients each piece is recomputed in the backward pass, so that the hidden activations of one piece alone are
    there at once.
    """

    def run_by_token(net: torch.nn.Module, joint_BSC: Tensor) -> Tensor:
        pieces = joint_BSC.chunk(num_chunks, dim=1)
        if torch.is_grad_enabled():
            outputs = [checkpoint(net, piece, use_reentrant=False, preserve_rng_state=has_dropout) for piece in pieces]
        else:
            outputs = [net(piece) for piece in pieces]
        return torch.cat(outputs, dim=1)

    return run_by_token
