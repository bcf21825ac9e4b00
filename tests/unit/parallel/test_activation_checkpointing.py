from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from support.updates import randomise_b
from torch.utils._python_dispatch import TorchDispatchMode

from exvideo_train.config.experiment import LORA_TARGETS, Experiment, MemoryConfig, Recompute
from exvideo_train.errors import UserError
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


def run(
    model: Path, recompute: Recompute, dropout: float = 0.0, dtype: torch.dtype = torch.float32, **memory: Any
) -> tuple:
    """Loss, gradients, and operators run in the backward pass."""
    config = Experiment()
    config.memory = MemoryConfig(recompute=recompute, **memory)
    config.lora.dropout = dropout
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("recompute", [Recompute.full, Recompute.keep_attention])
@pytest.mark.parametrize("chunks", [1, 5])
def test_inputs_that_wait_in_host_memory_change_no_bit(
    tiny_model_5b: Path, recompute: Recompute, dropout: float, dtype: torch.dtype, chunks: int
) -> None:
    loss, gradients, _ = run(tiny_model_5b, recompute, dropout, dtype, feed_forward_chunks=chunks)
    memory = {"feed_forward_chunks": chunks, "offload_activations": True}
    offloaded_loss, offloaded, _ = run(tiny_model_5b, recompute, dropout, dtype, **memory)
    assert offloaded_loss == loss
    assert all(torch.equal(offloaded[name], gradient) for name, gradient in gradients.items())


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("recompute", list(Recompute))
@pytest.mark.parametrize("chunks", [2, 7, 256])
def test_feed_forward_in_pieces_is_the_whole_one(
    tiny_model_5b: Path, recompute: Recompute, dtype: torch.dtype, tolerance: float, chunks: int
) -> None:
    """Gradients of the updates are the same sums in another order."""
    loss, gradients, _ = run(tiny_model_5b, recompute, 0.0, dtype)
    loss_in_pieces, in_pieces, calls = run(tiny_model_5b, recompute, 0.0, dtype, feed_forward_chunks=chunks)
    assert loss_in_pieces == pytest.approx(loss, rel=tolerance)
    for name, gradient in gradients.items():
        assert (in_pieces[name] - gradient).norm() <= tolerance * gradient.norm(), name
    assert calls["gelu"] >= NUM_BLOCKS * min(chunks, 10)


def test_levers_that_do_not_go_together_are_refused() -> None:
    with pytest.raises(UserError, match=r"offload_activations=true.*recompute=full"):
        MemoryConfig(recompute=Recompute.none, offload_activations=True)
    with pytest.raises(UserError, match=r"compile=true: ZeRO-3"):
        MemoryConfig(compile=True, zero_stage=3)


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
