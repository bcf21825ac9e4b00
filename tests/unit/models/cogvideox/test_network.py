"""The DiT's manner: dtypes under autocast, hooks, and no memory of a geometry."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from exvideo_train.config.experiment import LORA_TARGETS
from exvideo_train.models.cogvideox.network import CogVideoXDiT
from exvideo_train.models.registry import load_backbone


def _inputs(model: CogVideoXDiT, num_latent_frames: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, num_latent_frames, 16, 8, 12, generator=generator)
    text = torch.randn(2, model.config.max_text_seq_length, model.config.text_embed_dim, generator=generator)
    return latents, torch.tensor([5, 900]), text


def _load(folder: Path, dtype: torch.dtype = torch.float32) -> CogVideoXDiT:
    model = load_backbone(folder, dtype)
    assert isinstance(model, CogVideoXDiT)
    return model


@pytest.mark.parametrize("weights_dtype", [torch.bfloat16, torch.float32])
def test_stream_stays_bf16_under_autocast_with_an_fp32_lora(pristine_5b: Path, weights_dtype: torch.dtype) -> None:
    model = _load(pristine_5b, weights_dtype)
    settings = LoraConfig(r=4, target_modules=list(LORA_TARGETS), init_lora_weights=False)
    adapted = get_peft_model(model, settings, autocast_adapter_dtype=True)
    seen: list[torch.dtype] = []
    attended: list[torch.dtype] = []

    def run_and_note(block: nn.Module, *args: object) -> Tensor:
        output: Tensor = block(*args)
        seen.append(output.dtype)
        return output

    def attend_and_note(q_BNSD: Tensor, k_BNSD: Tensor, v_BNSD: Tensor) -> Tensor:
        attended.extend([q_BNSD.dtype, k_BNSD.dtype, v_BNSD.dtype])
        return nn.functional.scaled_dot_product_attention(q_BNSD, k_BNSD, v_BNSD)

    model.run_block = run_and_note
    for block in model.blocks:
        block.attn1.attend = attend_and_note
        for norm in (block.norm1, block.norm2):
            norm.register_forward_hook(
                lambda _m, _i, outputs: seen.extend([outputs[0].dtype, outputs[1].video_B1C.dtype])
            )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        velocity = adapted(*_inputs(model))
    velocity.float().square().mean().backward()
    assert velocity.dtype == torch.bfloat16
    assert set(seen) == set(attended) == {torch.bfloat16}
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            assert parameter.dtype == torch.float32, name
            assert parameter.grad is not None, name
            assert parameter.grad.dtype == torch.float32
            assert torch.isfinite(parameter.grad).all()
        else:
            assert parameter.grad is None, name


@pytest.mark.parametrize("variant", ["5b", "2b"])
def test_bf16_weights_without_autocast_stay_near_fp32(variant: str, pristine_5b: Path, pristine_2b: Path) -> None:
    folder = pristine_5b if variant == "5b" else pristine_2b
    exact, rounded = _load(folder), _load(folder, torch.bfloat16)
    inputs = _inputs(exact, 13)
    with torch.no_grad():
        velocity, expected = rounded(*inputs), exact(*inputs)
    assert velocity.dtype == torch.bfloat16
    assert ((velocity - expected).norm() / expected.norm()).item() < 0.02


@pytest.mark.parametrize("num_ranks", [2, 4])
@pytest.mark.parametrize("variant", ["5b", "2b"])
def test_slices_of_the_sequence_give_the_whole(
    variant: str, num_ranks: int, pristine_5b: Path, pristine_2b: Path
) -> None:
    """Ranks in lockstep, as threads: each holds a slice and attends with its queries to all ranks' keys."""
    model = _load(pristine_5b if variant == "5b" else pristine_2b)
    inputs = _inputs(model)
    with torch.no_grad():
        expected = model(*inputs)
        sliced = _run_in_slices(model, inputs, num_ranks)
    torch.testing.assert_close(sliced, expected, rtol=1e-5, atol=1e-5)


def _run_in_slices(model: CogVideoXDiT, inputs: tuple[Tensor, Tensor, Tensor], num_ranks: int) -> Tensor:
    """Run the network once for each slice, all in step: each attention sees the keys and values of every slice."""
    barrier = threading.Barrier(num_ranks)
    ranks = [copy.deepcopy(model) for _ in range(num_ranks)]
    sent: list[tuple[Tensor, ...]] = [()] * num_ranks

    def hang_hooks(model: CogVideoXDiT, rank: int) -> None:
        def own_tokens(length: int) -> slice:
            # Uneven on purpose, and with a cut inside the text.
            edges = [0, *(7 + part * (length - 7) // (num_ranks - 1) for part in range(num_ranks))]
            return slice(edges[rank], edges[rank + 1])

        def exchange(*tensors: Tensor) -> list[tuple[Tensor, ...]]:
            barrier.wait()
            sent[rank] = tensors
            barrier.wait()
            return list(sent)

        def attend(q_BNSD: Tensor, k_BNSD: Tensor, v_BNSD: Tensor) -> Tensor:
            keys, values = zip(*exchange(k_BNSD, v_BNSD), strict=True)
            return nn.functional.scaled_dot_product_attention(q_BNSD, torch.cat(keys, 2), torch.cat(values, 2))

        def join(tensor: Tensor, dim: int) -> Tensor:
            return torch.cat([part for (part,) in exchange(tensor)], dim=dim)

        model.own_tokens, model.join_sequence = own_tokens, join
        for block in model.blocks:
            block.attn1.attend = attend

    def run(rank: int) -> Tensor:
        hang_hooks(ranks[rank], rank)
        with torch.no_grad():
            output: Tensor = ranks[rank](*inputs)
        return output

    with ThreadPoolExecutor(num_ranks) as threads:
        outputs = list(threads.map(run, range(num_ranks)))
    assert all(torch.equal(outputs[0], output) for output in outputs)
    return outputs[0]


def test_recomputing_blocks_from_outside_changes_no_gradient(pristine_5b: Path) -> None:
    gradients = []
    for recompute in (False, True):
        model = _load(pristine_5b)
        if recompute:
            model.run_block = lambda block, *args: checkpoint(block, *args, use_reentrant=False)
        model(*_inputs(model)).square().mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert gradient is not None
        assert torch.equal(gradient, gradients[1][name]), name


def test_one_network_serves_any_geometry_in_any_order(pristine_2b: Path) -> None:
    model = _load(pristine_2b)
    with torch.no_grad():
        first = model(*_inputs(model, 3))
        model(*_inputs(model, 33))
        assert torch.equal(model(*_inputs(model, 3)), first)
    assert not list(model.buffers())


def test_the_network_imports_torch_and_einops_alone() -> None:
    """Neither libraries that would load a text encoder or a VAE, nor anything distributed."""
    code = (
        "import sys, exvideo_train.models.registry\n"
        "bad = {'diffusers', 'transformers', 'peft', 'deepspeed', 'decord', 'av', 'hydra', 'sentencepiece'}\n"
        "print(sorted(bad & sys.modules.keys()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=dict(os.environ)
    )
    assert done.stdout.strip() == "[]"
