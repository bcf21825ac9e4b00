"""Muon for matrices and convolutions, AdamW for the rest: with AdamW alone the VAE stays six decibels worse."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

MOMENTUM = 0.95
# The quintic of K. Jordan's Muon (2024): five rounds bring all singular values to between 0.7 and 1.2.
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_ROUNDS = 5


class Muon(torch.optim.Optimizer):
    """Muon for weights of any number of axes: a convolution is a matrix with a row for each filter.

    torch's own takes matrices alone and multiplies in bfloat16, which is slow on a CPU without instructions for it.

    Args:
        parameters: of two axes or more.
        lr: root mean square of an update's entries, times five.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Move every parameter that has a gradient; ``closure`` is there for torch's interface."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(parameter)
                momentum: Tensor = state["momentum"]
                momentum.lerp_(parameter.grad, 1 - MOMENTUM)
                matrix = parameter.grad.lerp(momentum, MOMENTUM).flatten(1)
                scale = 0.2 * max(matrix.shape) ** 0.5
                parameter.add_(orthogonalised(matrix).view_as(parameter), alpha=-group["lr"] * scale)


def orthogonalised(matrix: Tensor) -> Tensor:
    """The nearest matrix whose singular values are all about one."""
    wide = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    wide = wide / wide.norm().clamp(min=1e-7)
    first, third, fifth = NEWTON_SCHULZ
    for _ in range(NEWTON_SCHULZ_ROUNDS):
        gram = wide @ wide.T
        wide = first * wide + (third * gram + fifth * gram @ gram) @ wide
    return wide.T if matrix.shape[0] > matrix.shape[1] else wide


def make_optimizers(
    model: nn.Module, lr_matrices: float, lr_rest: float, matrices: set[str]
) -> list[torch.optim.Optimizer]:
    """Muon for the named parameters, AdamW for all others."""
    named = dict(model.named_parameters())
    rest = [parameter for name, parameter in named.items() if name not in matrices]
    return [
        Muon([named[name] for name in named if name in matrices], lr_matrices),
        torch.optim.AdamW(rest, lr=lr_rest, betas=(0.9, 0.95), weight_decay=0.0),
    ]
