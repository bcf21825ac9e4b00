"""Shift, scale and gate of the joint sequence, of which text and video tokens have each their own.

The functions write both kinds of tokens into one output and read no sequence more often than the product takes: done by
operators one by one, cutting the sequence and joining it again is a seventh of a step's element-wise traffic.

Axis letters: B batch, S joint sequence (text first), C channels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Modulation:
    """A shift, scale or gate from the timestep: one vector for the text tokens and one for the video tokens.

    Vectors are (B, 1, C) and meet the sequence by broadcasting: spread out to (B, S, C) first, they would be written,
    read and kept for the backward pass like activations.

    Attributes:
        num_text: text tokens of the sequence that is here; they come first.
    """

    text_B1C: Tensor
    video_B1C: Tensor
    num_text: int


def modulate(normed_BSC: Tensor, shift: Modulation, scale: Modulation) -> Tensor:
    """``normed * (1 + scale) + shift``."""
    vectors = (shift.text_B1C, shift.video_B1C, 1 + scale.text_B1C, 1 + scale.video_B1C)
    function = _modulate if torch.compiler.is_compiling() else _Modulate.apply
    modulated: Tensor = function(normed_BSC, *vectors, shift.num_text)
    return modulated


def add_gated(joint_BSC: Tensor, update_BSC: Tensor, gate: Modulation) -> Tensor:
    """``joint + gate * update``."""
    function = _add_gated if torch.compiler.is_compiling() else _AddGated.apply
    sum_BSC: Tensor = function(joint_BSC, update_BSC, gate.text_B1C, gate.video_B1C, gate.num_text)
    return sum_BSC


def _kinds(num_text: int, *sequences: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The text tokens of each sequence, then the video tokens, as views."""
    yield tuple(sequence[:, :num_text] for sequence in sequences)
    yield tuple(sequence[:, num_text:] for sequence in sequences)


def _modulate(x: Tensor, shift_t: Tensor, shift_v: Tensor, factor_t: Tensor, factor_v: Tensor, num_text: int) -> Tensor:
    """What the compiler makes one kernel of."""
    vectors = ((shift_t, factor_t), (shift_v, factor_v))
    parts = zip(_kinds(num_text, x), vectors, strict=True)
    return torch.cat([torch.addcmul(shift, part, factor) for (part,), (shift, factor) in parts], dim=1)


def _add_gated(joint: Tensor, update: Tensor, gate_t: Tensor, gate_v: Tensor, num_text: int) -> Tensor:
    parts = zip(_kinds(num_text, joint, update), (gate_t, gate_v), strict=True)
    return torch.cat([torch.addcmul(part, gate, change) for (part, change), gate in parts], dim=1)


class _Modulate(torch.autograd.Function):
    """:func:`_modulate` into one output."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, shift_t: Tensor, shift_v: Tensor, factor_t: Tensor, factor_v: Tensor, num_text: int
    ) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[3] else None, factor_t, factor_v)
        ctx.num_text = num_text
        output = torch.empty_like(x)
        vectors = ((shift_t, factor_t), (shift_v, factor_v))
        for (part, target), (shift, factor) in zip(_kinds(num_text, x, output), vectors, strict=True):
            torch.addcmul(shift, part, factor, out=target)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, *factors = ctx.saved_tensors
        grad_x = torch.empty_like(grad) if ctx.needs_input_grad[0] else None
        shifts: list[Tensor | None] = [None, None]
        scales: list[Tensor | None] = [None, None]
        if grad_x is not None:
            for (part, target), factor in zip(_kinds(ctx.num_text, grad, grad_x), factors, strict=True):
                torch.mul(part, factor, out=target)
        if ctx.needs_input_grad[1]:
            shifts = [part.sum(dim=1, keepdim=True) for (part,) in _kinds(ctx.num_text, grad)]
        if ctx.needs_input_grad[3]:
            scales = [(part * of_x).sum(dim=1, keepdim=True) for part, of_x in _kinds(ctx.num_text, grad, x)]
        return grad_x, *shifts, *scales, None


class _AddGated(torch.autograd.Function):
    """:func:`_add_gated` into one output."""

    @staticmethod
    def forward(ctx: Any, joint: Tensor, update: Tensor, gate_t: Tensor, gate_v: Tensor, num_text: int) -> Tensor:
        ctx.save_for_backward(update if ctx.needs_input_grad[2] else None, gate_t, gate_v)
        ctx.num_text = num_text
        output = torch.empty_like(joint)
        for (part, change, target), gate in zip(_kinds(num_text, joint, update, output), (gate_t, gate_v), strict=True):
            torch.addcmul(part, gate, change, out=target)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        update, *gates = ctx.saved_tensors
        grad_update = torch.empty_like(grad) if ctx.needs_input_grad[1] else None
        of_gates: list[Tensor | None] = [None, None]
        if grad_update is not None:
            for (part, target), gate in zip(_kinds(ctx.num_text, grad, grad_update), gates, strict=True):
                torch.mul(part, gate, out=target)
        if ctx.needs_input_grad[2]:
            of_gates = [(part * change).sum(dim=1, keepdim=True) for part, change in _kinds(ctx.num_text, grad, update)]
        return grad if ctx.needs_input_grad[0] else None, grad_update, *of_gates, None
