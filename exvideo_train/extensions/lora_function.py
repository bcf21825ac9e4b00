"""A Linear with its LoRA update as one function: what PEFT computes, without passes over whole activations in between.

PEFT's ``base(x) + scaling * B(A(x))`` reads and writes the output three times more than its products do, and as often
in the backward pass; 32 % of the element-wise traffic of a step of CogVideoX-5B at 129 frames. Here the products add
up in place and the scale is applied to rank-sized tensors.

Axis letters: T tokens, I input and O output channels, R rank.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import flop_registry

# Torch counts FLOPs of the form that makes a new tensor alone.
flop_registry.setdefault(torch.ops.aten.addmm_, flop_registry[torch.ops.aten.addmm])


class LoraLinear(torch.autograd.Function):
    """``x W^T + bias + scale (x A^T) B^T``; the base Linear gets no gradient.

    All products in the dtype of ``x`` and ``W``; gradients of A and B are fp32.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight_OI: Tensor, bias_O: Tensor | None, a_RI: Tensor, b_OR: Tensor, scale: float
    ) -> Tensor:
        a_RI, b_OR = a_RI.to(x.dtype), b_OR.to(x.dtype)
        output = F.linear(x, weight_OI, bias_O)
        hidden_TR = x.flatten(0, -2) @ a_RI.t()
        output.view(-1, output.shape[-1]).addmm_(hidden_TR, b_OR.t(), alpha=scale)
        ctx.save_for_backward(x, weight_OI, a_RI, b_OR, hidden_TR)
        ctx.scale = scale
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight_OI, a_RI, b_OR, hidden_TR = ctx.saved_tensors
        grad_TO, x_TI = grad.flatten(0, -2), x.flatten(0, -2)
        scaled_TR = (grad_TO @ b_OR).mul_(ctx.scale)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad_TO @ weight_OI).addmm_(scaled_TR, a_RI).view_as(x)
        grad_a_RI = _product_in_fp32(scaled_TR.t(), x_TI)
        grad_b_OR = _product_in_fp32(grad_TO.t(), hidden_TR).mul_(ctx.scale)
        return grad_x, None, None, grad_a_RI, grad_b_OR, None


def _product_in_fp32(left: Tensor, right: Tensor) -> Tensor:
    """A sum over all tokens: where the device can, it is not rounded to bf16 on its way out."""
    if left.is_cuda and left.dtype != torch.float32:
        return torch.mm(left, right, out_dtype=torch.float32)
    return (left @ right).float()
