"""Sequence parallelism over gloo processes equals the unsplit computation, gradients included."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from support.updates import randomise_b
from torch import Tensor

from exvideo_train.config.experiment import LORA_TARGETS, Experiment
from exvideo_train.errors import UserError
from exvideo_train.extensions.lora import LoraExtension, apply_lora, lora_parameters
from exvideo_train.models.registry import load_backbone
from exvideo_train.parallel.mesh import Mesh, check_mesh, init_mesh
from exvideo_train.parallel.parallelize import parallelize
from exvideo_train.parallel.sequence import slice_sizes

# 15 text tokens and 5 latent frames of 4x6 patches: 135 tokens divide by neither 2 nor 4.
TEXT_TOKENS = 15


def test_slice_sizes() -> None:
    assert slice_sizes(12, 4) == [3, 3, 3, 3]
    assert slice_sizes(135, 4) == [34, 34, 34, 33]
    assert slice_sizes(3, 4) == [1, 1, 1, 0]


def test_check_mesh_names_what_does_not_divide() -> None:
    with pytest.raises(UserError, match=r"parallel.sequence=3 does not divide the 4 ranks"):
        check_mesh(4, 3, 48)
    with pytest.raises(UserError, match=r"parallel.sequence=5 does not divide the model's 48 attention heads"):
        check_mesh(5, 5, 48)
    check_mesh(8, 4, 48)


def gradients(model: Path, mesh: Mesh, recompute: str) -> tuple[Tensor, dict[str, Tensor]]:
    """Output and LoRA gradients of a loss on this data group's own sample."""
    config = Experiment()
    config.memory.recompute = type(config.memory.recompute)[recompute]
    backbone = load_backbone(model, torch.float32, torch.device("cpu"))
    apply_lora(backbone, LoraExtension(4, 4.0, tuple(LORA_TARGETS)), seed=0)
    randomise_b(backbone)
    backbone.train()
    parallelize(backbone, config.memory, mesh, torch.float32, has_dropout=False)
    sample = torch.Generator().manual_seed(1 + mesh.data_rank)
    latents = torch.randn(2, 5, 16, 8, 12, generator=sample)
    text = torch.randn(2, TEXT_TOKENS, 32, generator=sample)
    target = torch.randn(2, 5, 16, 8, 12, generator=sample)
    output = backbone(latents, torch.tensor([10, 900]), text)
    (output - target).square().mean().backward()
    return output.detach(), {name: p.grad.clone() for name, p in lora_parameters(backbone).items()}


def unsplit(model: Path, data_rank: int) -> tuple[Tensor, dict[str, Tensor]]:
    return gradients(model, Mesh(data_rank, data_rank + 1, 1, torch.device("cpu")), "none")


def compare_on_rank(rank: int, world_size: int, sequence: int, model: Path, init_file: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{init_file}", rank=rank, world_size=world_size)
    mesh = init_mesh(sequence, 60.0)
    assert (mesh.data_rank, mesh.sequence_rank) == divmod(rank, sequence)
    expected_output, _ = unsplit(model, mesh.data_rank)
    expected = [unsplit(model, data_rank)[1] for data_rank in range(mesh.data_size)]
    for recompute in ("none", "full", "keep_attention"):
        output, own = gradients(model, mesh, recompute)
        torch.testing.assert_close(output, expected_output, rtol=1e-5, atol=1e-6)
        for name, gradient in own.items():
            # What ZeRO does: the mean over all ranks.
            dist.all_reduce(gradient)
            mean = torch.stack([part[name] for part in expected]).mean(dim=0)
            scale = float(mean.abs().max())
            torch.testing.assert_close(
                gradient / world_size, mean, rtol=1e-5, atol=2e-6 * scale, msg=f"{name} {recompute}"
            )
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def tiny_model_8_heads(tiny_model_5b: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny 5B with as many heads as the largest sequence group needs."""
    from diffusers import CogVideoXTransformer3DModel

    folder = tmp_path_factory.mktemp("eight_heads")
    config = json.loads((tiny_model_5b / "transformer" / "config.json").read_text())
    config = {name: value for name, value in config.items() if not name.startswith("_")}
    torch.manual_seed(0)
    CogVideoXTransformer3DModel(**{**config, "num_attention_heads": 8}).save_pretrained(folder / "transformer")
    return folder


@pytest.mark.parametrize(
    ("variant", "world_size", "sequence"), [("5b", 2, 2), ("5b", 4, 4), ("8_heads", 8, 8), ("2b", 2, 2), ("5b", 4, 2)]
)
def test_gradients_equal_the_unsplit_run(
    variant: str, world_size: int, sequence: int, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    model: Any = request.getfixturevalue(f"tiny_model_{variant}")
    torch.multiprocessing.start_processes(
        compare_on_rank, (world_size, sequence, model, tmp_path / "init"), nprocs=world_size, start_method="fork"
    )
