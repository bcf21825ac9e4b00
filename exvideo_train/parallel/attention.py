"""Which attention kernel runs, found out by a probe and not by what was asked.

Without a fused kernel one attention map at 129 frames takes 48 x 44,776^2 x 2 bytes = 192 GB: on a GPU that is refused
at start instead of failing at step 1.

Axis letters: B batch, N heads, S joint sequence, D head dim.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from exvideo_train.config.experiment import AttentionKernel
from exvideo_train.devices import cudnn_is_sound, cudnn_version
from exvideo_train.errors import UserError
from exvideo_train.parallel.sequence import Attend

WITHOUT_CUDNN = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
# cuDNN is the fastest on Hopper and newer, flash on Ampere; torch's own order knows which, from 2.11 on.
BACKENDS = {
    AttentionKernel.flash: [SDPBackend.FLASH_ATTENTION],
    AttentionKernel.cudnn: [SDPBackend.CUDNN_ATTENTION],
    AttentionKernel.math: [SDPBackend.MATH],
}


def choose_attention(
    kernel: AttentionKernel, device: torch.device, dtype: torch.dtype, num_heads: int, head_dim: int
) -> tuple[Attend, str]:
    """An attention function (q, k, v of (B, N, S, D)) and the name of the kernel that a probe saw it use.

    Raises:
        UserError: the kernel asked for does not run here, or none but the one that builds the whole map does.
    """
    if kernel is AttentionKernel.cudnn and device.type == "cuda" and not cudnn_is_sound():
        raise UserError(
            f"memory.attention=cudnn: attention of the cuDNN that torch has loaded ({cudnn_version()}) is unsafe for "
            "lengths that 128 does not divide, as all of CogVideoX's; it takes one newer than 9.15.0: look for another "
            "cuDNN on LD_LIBRARY_PATH, which hides torch's own, or use memory.attention=auto"
        )
    prefers_package = kernel is AttentionKernel.auto and device.type == "cuda" and _has_flash_attn(device)
    if kernel is AttentionKernel.flash_attn or prefers_package:
        attend = _flash_attn_package()
    elif kernel is AttentionKernel.auto:
        is_unsafe = device.type == "cuda" and not cudnn_is_sound()
        attend = _sdpa_with(WITHOUT_CUDNN) if is_unsafe else F.scaled_dot_product_attention
    else:
        attend = _sdpa_with(BACKENDS[kernel])
    name = probe_kernel(attend, device, dtype, num_heads, head_dim)
    if kernel is AttentionKernel.auto and device.type == "cuda" and name == "math":
        raise UserError(
            f"memory.attention=auto: only the kernel that builds the whole attention map runs for {dtype} on "
            f"{torch.cuda.get_device_name(device)} (192 GB at 129 frames); use model.dtype=bf16, or install "
            "flash-attn (--no-build-isolation), or set memory.attention=math for small sizes"
        )
    if kernel is AttentionKernel.auto and device.type == "cuda" and name != "cudnn" and _is_hopper_or_newer(device):
        print(
            f"warning: attention runs on the {name} kernel, not on cuDNN, the fastest on "
            f"{torch.cuda.get_device_name(device)}: torch has loaded cuDNN {cudnn_version()}, which must be newer than "
            "9.15.0; another one on LD_LIBRARY_PATH hides torch's own",
            file=sys.stderr,
            flush=True,
        )
    return attend, name


def _is_hopper_or_newer(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (9, 0)


def _has_flash_attn(device: torch.device) -> bool:
    """flash-attn is preferred where torch's cuDNN path is not: below Hopper."""
    if _is_hopper_or_newer(device):
        return False
    try:
        import flash_attn  # noqa: F401
    except ImportError:
        return False
    return True


def _flash_attn_package() -> Attend:
    try:
        from flash_attn import flash_attn_func
    except ImportError:
        raise UserError(
            "memory.attention=flash_attn: the package is not installed; "
            "pip install flash-attn --no-build-isolation, or use memory.attention=auto"
        ) from None

    def attend(q_BNSD: Tensor, k_BNSD: Tensor, v_BNSD: Tensor) -> Tensor:
        out_BSND: Tensor = flash_attn_func(q_BNSD.transpose(1, 2), k_BNSD.transpose(1, 2), v_BNSD.transpose(1, 2))
        return out_BSND.transpose(1, 2)

    return attend


def _sdpa_with(backends: list[SDPBackend]) -> Attend:
    def attend(q_BNSD: Tensor, k_BNSD: Tensor, v_BNSD: Tensor) -> Tensor:
        with sdpa_kernel(backends):
            return F.scaled_dot_product_attention(q_BNSD, k_BNSD, v_BNSD)

    return attend


def attend_by_shape(q_BNSD: Tensor, k_BNSD: Tensor, v_BNSD: Tensor) -> Tensor:
    """A GPU's flash attention by its operator: for tensors without content, which no kernel runs on."""
    output_BNSD: Tensor = torch.ops.aten._scaled_dot_product_flash_attention(q_BNSD, k_BNSD, v_BNSD)[0]
    return output_BNSD


# Operators as torch dispatches them, and what to call them.
_KERNEL_OPERATORS = {
    "_scaled_dot_product_cudnn_attention": "cudnn",
    "_scaled_dot_product_flash_attention": "flash",
    "_scaled_dot_product_flash_attention_for_cpu": "flash (CPU)",
    "_scaled_dot_product_efficient_attention": "memory-efficient",
    "_scaled_dot_product_attention_math": "math",
    "_flash_attn_forward": "flash-attn package",
}


class _OperatorNames(TorchDispatchMode):
    """Notes the name of every operator that runs."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def probe_kernel(attend: Attend, device: torch.device, dtype: torch.dtype, num_heads: int, head_dim: int) -> str:
    """Run a short attention forward and name the operator that it dispatched to.

    The probe's length is not divisible by 128, like every length CogVideoX has, because kernels differ in that.

    Raises:
        UserError: the kernel does not run for this device and dtype.
    """
    shape = (1, num_heads, 226 + 64, head_dim)
    q, k, v = (torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for _ in range(3))
    with _OperatorNames() as operators:
        try:
            attend(q, k, v)
        except RuntimeError as error:
            reason = str(error).split("\n")[0]
            raise UserError(
                f"the attention kernel asked for does not run on {device} in {dtype} ({reason}); "
                "use memory.attention=auto"
            ) from error
    for operator, name in _KERNEL_OPERATORS.items():
        if operator in operators.seen:
            return name
    # Without a fused operator, attention is two matrix products with the whole map between them.
    return "math" if {"bmm", "_softmax", "_safe_softmax"} & set(operators.seen) else "unknown"
