"""Sequence parallelism over the joint text and video sequence (DeepSpeed-Ulysses, arXiv 2309.14509).

Every rank of a sequence group holds a slice of the tokens; around each attention an all-to-all trades tokens for heads,
so that a rank sees the whole sequence for its share of the heads.

Gradients: the whole loss is computed on every rank of the group from the gathered output, so a rank's backward pass
yields what its own tokens contribute, times the group's size (see :class:`_Join`). The mean over ALL ranks, which is
what ZeRO takes, is then the mean over samples of the whole gradients: ZeRO shards over every rank and needs to know
nothing of the split.

Axis letters: B batch, S joint sequence, N heads, D head dim; p = ranks of the group.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def slice_sizes(length: int, parts: int) -> list[int]:
    """Tokens of each rank: as even as possible, the first ranks take the remainder."""
    return [length // parts + (rank < length % parts) for rank in range(parts)]


class SequenceSplit:
    """The hooks that make a backbone sequence parallel."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.size = dist.get_world_size(group)
        self.rank = dist.get_rank(group)
        self._length = 0

    def own_tokens(self, length: int) -> slice:
        """This rank's tokens of a joint sequence of ``length``."""
        self._length = length
        sizes = slice_sizes(length, self.size)
        start = sum(sizes[: self.rank])
        return slice(start, start + sizes[self.rank])

    def join(self, tensor: Tensor, dim: int) -> Tensor:
        """The whole sequence from every rank's slice."""
        joined: Tensor = _Join.apply(tensor, dim, self)
        return joined

    def attend_with(self, attend: Attend) -> Attend:
        """Attention over the whole sequence for this rank's share of the heads."""

        def attend_split(q_BNSD: Tensor, k_BNSD: Tensor, v_BNSD: Tensor) -> Tensor:
            q, k, v = (self._tokens_to_heads(part) for part in (q_BNSD, k_BNSD, v_BNSD))
            return self._heads_to_tokens(attend(q, k, v))

        return attend_split

    def _tokens_to_heads(self, x_BNSD: Tensor) -> Tensor:
        """(B, N, S/p, D) -> (B, N/p, S, D)."""
        heads = x_BNSD.shape[1] // self.size
        sizes = slice_sizes(self._length, self.size)
        outgoing = [part.permute(2, 0, 1, 3) for part in x_BNSD.split(heads, dim=1)]
        sent_XBND = torch.cat(outgoing)
        received_SBND: Tensor = _AllToAll.apply(sent_XBND, [x_BNSD.shape[2]] * self.size, sizes, self.group)
        # Token-major in memory, as without a split; fused kernels take any order but that of the last axis.
        return received_SBND.permute(1, 2, 0, 3)

    def _heads_to_tokens(self, x_BNSD: Tensor) -> Tensor:
        """(B, N/p, S, D) -> (B, N, S/p, D)."""
        sizes = slice_sizes(self._length, self.size)
        own = sizes[self.rank]
        sent_SBND = x_BNSD.permute(2, 0, 1, 3).contiguous()
        received_XBND: Tensor = _AllToAll.apply(sent_SBND, sizes, [own] * self.size, self.group)
        return torch.cat([part.transpose(0, 1) for part in received_XBND.split(own)], dim=2).transpose(1, 2)


class _AllToAll(torch.autograd.Function):
    """Slices of axis 0 to and from every rank; the backward pass sends them home."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, send_sizes: list[int], receive_sizes: list[int], group: Any) -> Tensor:
        ctx.sizes = send_sizes, receive_sizes
        ctx.group = group
        return _exchange(x, send_sizes, receive_sizes, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        send_sizes, receive_sizes = ctx.sizes
        return _exchange(gradients[0], receive_sizes, send_sizes, ctx.group), None, None, None


def _exchange(x: Tensor, send_sizes: list[int], receive_sizes: list[int], group: Any) -> Tensor:
    received = x.new_empty((sum(receive_sizes), *x.shape[1:]))
    dist.all_to_all_single(received, x.contiguous(), receive_sizes, send_sizes, group=group)
    return received


class _Join(torch.autograd.Function):
    """Gather slices forward; backward, this rank's slice of the gradient times the group's size.

    The factor undoes ZeRO's division by all ranks: a group's ranks each hold a part of one gradient, to be added.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, split: SequenceSplit) -> Tensor:
        ctx.dim, ctx.split = dim, split
        sizes = slice_sizes(split._length, split.size)
        ctx.sizes = sizes
        # Slices of unequal length travel padded to the longest: gloo gathers equal shapes only.
        sent = x.movedim(dim, 0)
        padded = sent.new_zeros((max(sizes), *sent.shape[1:]))
        padded[: sent.shape[0]] = sent
        gathered = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(gathered, padded, group=split.group)
        return torch.cat([part[:size] for part, size in zip(gathered, sizes, strict=True)]).movedim(0, dim)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        own = gradients[0].split(ctx.sizes, dim=ctx.dim)[ctx.split.rank]
        return own * ctx.split.size, None, None
