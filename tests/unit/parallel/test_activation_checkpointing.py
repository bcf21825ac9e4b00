from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from support.updates import randomise_b
from torch.utils._python_dispatch import TorchDispatchMode

from exvideo_train.config.experiment import LORA_TARGETS, Experiment, Recompute
from exvideo_train.extensions.lora import LoraExtension, apply_lora, lora_parameters
from exvideo_train.models.registry import load_backbone
from exvideo_train.parallel.activation_checkpointing import attention_ops
from exvideo_train.parallel.mesh import Mesh
from exvideo_train.parallel.parallelize import parallelize

CPU = torch.device("cpu")
NUM_BLOCKS = 3


class CountOps(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def run(model: Path, recompute: Recompute, dropout: float = 0.0, dtype: torch.dtype = torch.float32) -> tuple:
    """Loss, gradients, and operators run in the backward pass."""
    config = Experiment()
    config.memory.recompute, config.lora.dropout = recompute, dropout
    backbone = load_backbone(model, dtype, CPU)
    apply_lora(backbone, LoraExtension(4, 4.0, tuple(LORA_TARGETS), dropout), seed=0)
    randomise_b(backbone)
    backbone.train()
    assert parallelize(backbone, config.memory, Mesh(0, 1, 1, CPU), dtype, dropout > 0) == "flash (CPU)"
    generator = torch.Generator().manual_seed(1)
    latents, target = (torch.randn(1, 5, 16, 8, 12, generator=generator) for _ in range(2))
    text = torch.randn(1, 16, 32, generator=generator)
    torch.manual_seed(3)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        loss = (backbone(latents, torch.tensor([500]), text).float() - target).square().mean()
    with CountOps() as backward:
        loss.backward()
    return loss.item(), {name: p.grad for name, p in lora_parameters(backbone).items()}, backward.calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("recompute", [Recompute.full, Recompute.keep_attention])
def test_recomputation_changes_no_bit(
    tiny_model_5b: Path, recompute: Recompute, dropout: float, dtype: torch.dtype
) -> None:
    loss, gradients, _ = run(tiny_model_5b, Recompute.none, dropout, dtype)
    recomputed_loss, recomputed, _ = run(tiny_model_5b, recompute, dropout, dtype)
    assert recomputed_loss == loss
    assert all(bool(gradient.abs().max() > 0) for gradient in gradients.values())
    for name, gradient in gradients.items():
        assert gradient.dtype == torch.float32
        assert torch.equal(recomputed[name], gradient), name


def test_only_full_recomputation_runs_attention_again(tiny_model_5b: Path) -> None:
    counts = {recompute: run(tiny_model_5b, recompute)[2] for recompute in Recompute}
    attention = "_scaled_dot_product_flash_attention_for_cpu"
    assert {recompute.name: calls[attention] for recompute, calls in counts.items()} == {
        "none": 0,
        "full": NUM_BLOCKS,
        "keep_attention": 0,
    }
    # Keeping attention still recomputes the Linears: it is no disguised `none`.
    assert counts[Recompute.keep_attention]["gelu"] == counts[Recompute.full]["gelu"] == NUM_BLOCKS
    assert counts[Recompute.none]["gelu"] == 0


def test_every_fused_kernel_of_torch_is_kept_by_name() -> None:
    """A kernel that is missing from the list is recomputed without a word."""
    known = {op.overloadpacket.__name__ for op in attention_ops()}
    names = {
        name.split("::")[1].split(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("aten::_scaled_dot_product") and "backward" not in name
    }
    quantised = {name for name in names if "quant" in name or "mps" in name}
    assert names - quantised <= known, names - quantised - known
