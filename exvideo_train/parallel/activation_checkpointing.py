"""What the backward pass recomputes: everything, everything but attention, or nothing.

``full`` keeps each block's input (44,776 x 3072 bf16 = 0.28 GB a block at 129 frames). ``keep_attention`` keeps each
attention's output and log-sum-exp too, which spares the most expensive recomputation: attention is 70 % of the forward
work at 129 frames.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
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


def block_runner(recompute: Recompute, has_dropout: bool) -> Callable[..., Any] | None:
    """A function ``(block, *args)`` that runs a block under the policy, or None to run it plainly.

    Args:
        recompute: the policy.
        has_dropout: the extension draws random numbers in the block, which recomputation must draw again alike.
    """
    if recompute is Recompute.none:
        return None
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": has_dropout}
    if recompute is Recompute.keep_attention:
        policy = partial(_keep_attention, attention_ops())
        options["context_fn"] = partial(create_selective_checkpoint_contexts, policy)

    def run_block(block: torch.nn.Module, *args: Any) -> Any:
        return checkpoint(block, *args, **options) if torch.is_grad_enabled() else block(*args)

    return run_block
