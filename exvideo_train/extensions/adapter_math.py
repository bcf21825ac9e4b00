"""Norms, differences, averages and other ranks of adapters, of the updates that they make and never of their factors.

An update is ``up @ down``, its scale in ``up``, float64; ``up`` is (out, rank), ``down`` is (rank, in). The whole
matrix is never formed: with ``up = Q_up R_up`` and ``down.T = Q_down R_down`` all that is asked for is in the small
``R_up @ R_down.T``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from exvideo_train.errors import UserError
from exvideo_train.extensions.adapter_file import Adapter
from exvideo_train.extensions.adapter_names import listed
from exvideo_train.models.registry import FIRST_FAMILY
from exvideo_train.randomness import generator_for

# A mean of factors further than this from the mean of the updates is no average of the adapters.
MOST_FACTOR_ERROR = 0.1


class Update(NamedTuple):
    up: Tensor
    down: Tensor

    def norm(self) -> float:
        """Frobenius norm."""
        return float(torch.linalg.matrix_norm(_core(self)[1]))


class Measured(NamedTuple):
    """A new adapter, and how far its updates are from those asked for, relative to these: a module and all together."""

    adapter: Adapter
    error_by_module: dict[str, float]
    error: float


def update_of(adapter: Adapter, module: str) -> Update:
    """A module's update, scale included."""
    up, down = (adapter.tensors[f"{module}.{half}.weight"].double() for half in ("lora_B", "lora_A"))
    return Update(up * (adapter.alpha / adapter.rank), down)


def weighted_sum(updates: Sequence[Update], shares: Sequence[float]) -> Update:
    """``sum(share * update)``, exactly: of the ranks' sum."""
    up = torch.cat([share * update.up for update, share in zip(updates, shares, strict=True)], dim=1)
    return Update(up, torch.cat([update.down for update in updates]))


def norms(adapter: Adapter) -> dict[str, float]:
    """Frobenius norm of each module's update."""
    return {module: update_of(adapter, module).norm() for module in adapter.modules}


def differences(adapter: Adapter, other: Adapter) -> Measured:
    """``other`` against ``adapter``; a module that one of them lacks has no update there.

    Raises:
        UserError: they are of models of different shapes.
    """
    errors, squares = {}, [0.0, 0.0]
    ours, theirs = set(adapter.modules), set(other.modules)
    for module in [*adapter.modules, *(name for name in other.modules if name not in ours)]:
        own = update_of(adapter, module).norm() if module in ours else 0.0
        if module in ours and module in theirs:
            pair = [update_of(adapter, module), update_of(other, module)]
            _check_equal_sizes(module, pair)
            apart = weighted_sum(pair, [1.0, -1.0]).norm()
        else:
            apart = own if module in ours else update_of(other, module).norm()
        errors[module] = _relative(apart, own)
        squares = [squares[0] + apart**2, squares[1] + own**2]
    return Measured(other, errors, _relative(math.sqrt(squares[0]), math.sqrt(squares[1])))


def average_updates(adapters: Sequence[Adapter], shares: Sequence[float], rank: int) -> Measured:
    """The nearest adapter of ``rank`` to the mean of the updates, by SVD; its alpha is its rank.

    Raises:
        UserError: the adapters do not update the same Linears of the same size, or are of different families.
    """
    _check_alike(adapters)
    tensors: dict[str, Tensor] = {}
    squares_by_module = {}
    for module in adapters[0].modules:
        updates = [update_of(adapter, module) for adapter in adapters]
        _check_equal_sizes(module, updates)
        up, down, squares_by_module[module] = _truncated(weighted_sum(updates, shares), rank, module)
        tensors |= _pair(module, up, down)
    provenance = _common_provenance(adapters)
    return _measured(Adapter(tensors, rank, float(rank), adapters[0].targets, provenance), squares_by_module)


def average_factors(adapters: Sequence[Adapter], shares: Sequence[float]) -> Measured:
    """Means of A and of B: near the mean of the updates only where the adapters are points of one course.

    Raises:
        UserError: as :func:`average_updates`; other ranks or alphas; or a mean that is far from that of the updates.
    """
    _check_alike(adapters)
    first = adapters[0]
    if len({(adapter.rank, adapter.alpha) for adapter in adapters}) > 1:
        have = ", ".join(f"rank {adapter.rank} alpha {adapter.alpha:g}" for adapter in adapters)
        raise UserError(f"of=factors: the adapters have {have}, which must be the same; use of=updates")
    for name, tensor in first.tensors.items():
        if any(adapter.tensors[name].shape != tensor.shape for adapter in adapters):
            raise UserError(f"of=factors: {name} has another shape in one of the adapters; give adapters of one model")
    weighted = list(zip(adapters, shares, strict=True))
    tensors = {
        name: sum((share * adapter.tensors[name].double() for adapter, share in weighted), torch.zeros(())).float()
        for name in first.tensors
    }
    made = Adapter(tensors, first.rank, first.alpha, first.targets, _common_provenance(adapters))
    squares = {}
    for module in made.modules:
        wanted = weighted_sum([update_of(adapter, module) for adapter in adapters], shares)
        apart = weighted_sum([wanted, update_of(made, module)], [1.0, -1.0])
        squares[module] = (apart.norm() ** 2, wanted.norm() ** 2)
    measured = _measured(made, squares)
    if measured.error > MOST_FACTOR_ERROR:
        raise UserError(
            f"of=factors: the means of A and B make an update {measured.error:.3g} from the mean of the updates, "
            f"relative to it; above {MOST_FACTOR_ERROR} the adapters are not of one course of training: use of=updates"
        )
    return measured


def resized(adapter: Adapter, rank: int) -> Measured:
    """The nearest adapter of a smaller rank, by SVD; or the same update with room for more, which training can fill."""
    tensors: dict[str, Tensor] = {}
    squares = {}
    for module in adapter.modules:
        up, down = (adapter.tensors[f"{module}.{half}.weight"] for half in ("lora_B", "lora_A"))
        if rank >= adapter.rank:
            pair = _padded(up, down, rank, module)
            squares[module] = (0.0, update_of(adapter, module).norm() ** 2)
        else:
            new_up, new_down, squares[module] = _truncated(update_of(adapter, module), rank, module)
            pair = new_up, new_down
        tensors |= _pair(module, *pair)
    alpha = adapter.alpha * rank / adapter.rank if rank >= adapter.rank else float(rank)
    return _measured(Adapter(tensors, rank, alpha, adapter.targets, adapter.provenance), squares)


def _core(update: Update) -> tuple[Tensor, Tensor, Tensor]:
    q_up, r_up = torch.linalg.qr(update.up)
    q_down, r_down = torch.linalg.qr(update.down.T)
    return q_up, r_up @ r_down.T, q_down


def _truncated(update: Update, rank: int, module: str) -> tuple[Tensor, Tensor, tuple[float, float]]:
    """B and A of the nearest update of a rank, equally large, and squares of what is left out and of the whole."""
    q_up, core, q_down = _core(update)
    left, values, right = torch.linalg.svd(core, full_matrices=False)
    root = values[:rank].sqrt()
    up, down = q_up @ left[:, :rank] * root, (q_down @ right[:rank].T * root).T
    return *_padded(up, down, rank, module), (float(values[rank:].square().sum()), float(values.square().sum()))


def _padded(up: Tensor, down: Tensor, rank: int, module: str) -> tuple[Tensor, Tensor]:
    """More columns and rows, of which the update has nothing: as at the start of training, B zero and A random."""
    missing, size = rank - down.shape[0], down.shape[1]
    drawn = torch.empty(missing, size).uniform_(-1, 1, generator=generator_for(0, f"lora/{module}", down.shape[0]))
    down = torch.cat([down, drawn.to(down.dtype) / math.sqrt(size)])
    return torch.cat([up, up.new_zeros(up.shape[0], missing)], dim=1), down


def _pair(module: str, up: Tensor, down: Tensor) -> dict[str, Tensor]:
    return {f"{module}.lora_A.weight": down.float().contiguous(), f"{module}.lora_B.weight": up.float().contiguous()}


def _measured(adapter: Adapter, squares: Mapping[str, tuple[float, float]]) -> Measured:
    by_module = {module: _relative(math.sqrt(apart), math.sqrt(whole)) for module, (apart, whole) in squares.items()}
    apart, whole = (math.sqrt(sum(pair[index] for pair in squares.values())) for index in (0, 1))
    return Measured(adapter, by_module, _relative(apart, whole))


def _relative(apart: float, whole: float) -> float:
    return apart / whole if whole else (math.inf if apart else 0.0)


def _check_alike(adapters: Sequence[Adapter]) -> None:
    families = {adapter.provenance.get("family", FIRST_FAMILY) for adapter in adapters if adapter.provenance}
    if len(families) > 1:
        raise UserError(f"adapters=: they are of different families, {', '.join(sorted(families))}; give those of one")
    for adapter in adapters[1:]:
        if odd := sorted(set(adapters[0].modules) ^ set(adapter.modules)):
            raise UserError(f"adapters=: not all of them update {listed(odd)}; give adapters of the same targets")


def _check_equal_sizes(module: str, updates: Sequence[Update]) -> None:
    sizes = [(update.up.shape[0], update.down.shape[1]) for update in updates]
    if len(set(sizes)) > 1:
        raise UserError(f"{module}: its updates are {sizes[0]} and {sizes[1]} (out, in); give adapters of one model")


def _common_provenance(adapters: Sequence[Adapter]) -> dict[str, Any]:
    """What is true of all; the steps are those of the longest trained."""
    first = adapters[0].provenance
    common = {
        name: value for name, value in first.items() if all(a.provenance.get(name) == value for a in adapters[1:])
    }
    steps = [adapter.provenance["steps"] for adapter in adapters if "steps" in adapter.provenance]
    return common | ({"steps": max(steps)} if steps else {})
