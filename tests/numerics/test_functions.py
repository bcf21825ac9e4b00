"""Functions with gradients of their own, against the operators that they stand for."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support.updates import randomise_b
from torch import Tensor, nn
from torch.autograd import gradcheck
from torch.utils.flop_counter import FlopCounterMode

from exvideo_train.extensions.lora import LoraExtension, apply_lora, choose_lora, compute_as_one, lora_parameters
from exvideo_train.models.cogvideox import modulation, positions
from exvideo_train.models.cogvideox.modulation import Modulation

NUM_TEXT = 3


def random(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype).requires_grad_()


@pytest.mark.parametrize("num_text", [0, NUM_TEXT, 7])
def test_gradients_of_modulation_and_gate(num_text: int) -> None:
    vectors = [random(2, 1, 4, seed=seed) for seed in range(4)]
    x, joint = random(2, 7, 4, seed=5), random(2, 7, 4, seed=6)
    assert gradcheck(lambda *args: modulation._Modulate.apply(*args, num_text), (x, *vectors))
    assert gradcheck(lambda *args: modulation._AddGated.apply(*args, num_text), (joint, x, *vectors[:2]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("frozen", [False, True], ids=["trained vectors", "frozen vectors"])
def test_modulation_and_gate_are_those_of_plain_operators(dtype: torch.dtype, frozen: bool) -> None:
    """Bit for bit, forward and backward; vectors without gradients cost nothing."""
    outputs = []
    for functions in (
        (modulation._Modulate.apply, modulation._AddGated.apply),
        (modulation._modulate, modulation._add_gated),
    ):
        vectors = [random(2, 1, 4, dtype=dtype, seed=seed).requires_grad_(not frozen) for seed in range(6)]
        x, joint = random(2, 7, 4, dtype=dtype, seed=5), random(2, 7, 4, dtype=dtype, seed=6)
        modulated = functions[0](x, *vectors[:4], NUM_TEXT)
        result = functions[1](joint, modulated, *vectors[4:], NUM_TEXT)
        result.square().sum().backward()
        outputs.append([modulated, result, *(tensor.grad for tensor in (x, joint, *vectors))])
    for one, plain in zip(*outputs, strict=True):
        assert (one is None) == (plain is None)
        assert one is None or torch.equal(one, plain)
    assert (outputs[0][-1] is None) == frozen


def test_names_of_modulation_reach_the_function() -> None:
    shift, scale = (Modulation(random(1, 1, 4, seed=s), random(1, 1, 4, seed=s + 1), NUM_TEXT) for s in (1, 3))
    x = random(1, 7, 4)
    expected = torch.cat(
        [
            x[:, :NUM_TEXT] * (1 + scale.text_B1C) + shift.text_B1C,
            x[:, NUM_TEXT:] * (1 + scale.video_B1C) + shift.video_B1C,
        ],
        dim=1,
    )
    torch.testing.assert_close(modulation.modulate(x, shift, scale), expected)
    gated = torch.cat([x[:, :NUM_TEXT] * (1 + scale.text_B1C), x[:, NUM_TEXT:] * (1 + scale.video_B1C)], dim=1)
    torch.testing.assert_close(modulation.add_gated(x, x, scale), gated)


def test_rotation() -> None:
    x, angles = random(2, 5, 3, 8), random(5, 4, seed=1).detach().repeat_interleave(2, dim=1)
    tables = angles.cos(), angles.sin()
    assert gradcheck(lambda x: positions.rotate(x, *tables), (x,))
    half, tables = x.detach().bfloat16(), tuple(table.float() for table in tables)
    real, imaginary = half.float().unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([-imaginary, real], dim=-1).flatten(-2)
    expected = half.float() * tables[0][:, None] + turned * tables[1][:, None]
    rotated = positions.rotate(half, *tables)
    assert rotated.dtype == torch.bfloat16
    # One unit in the last place where the sum lies between two numbers.
    torch.testing.assert_close(rotated.float(), expected, rtol=2**-8, atol=1e-6)
    # Strided input, as a gradient of attention is.
    assert torch.equal(positions.rotate(half.transpose(1, 2).contiguous().transpose(1, 2), *tables), rotated)


SETTINGS = LoraExtension(4, 6.0, ("0", "2"))


def two_networks(dtype: torch.dtype, bias: bool = True) -> tuple[nn.Module, nn.Module]:
    """PEFT's own computation, and ours, with the same weights."""
    torch.manual_seed(0)
    plain = apply_lora(nn.Sequential(nn.Linear(16, 24, bias), nn.GELU(), nn.Linear(24, 8, bias)).to(dtype), SETTINGS, 0)
    randomise_b(plain)
    ours = copy.deepcopy(plain)
    compute_as_one(ours)
    return plain, ours


def run(network: nn.Module, dtype: torch.dtype, needs_input: bool = True) -> list[Tensor | None]:
    x = random(2, 50, 16, dtype=torch.float32).detach().to(dtype).requires_grad_(needs_input)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        output = network(x)
    output.float().square().mean().backward()
    return [output, x.grad, *(parameter.grad for parameter in lora_parameters(network).values())]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("needs_input", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_a_linear_with_its_update_is_that_of_peft(
    dtype: torch.dtype, tolerance: float, needs_input: bool, bias: bool
) -> None:
    for ours, theirs in zip(*(run(n, dtype, needs_input) for n in reversed(two_networks(dtype, bias))), strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None and theirs is not None:
            assert ours.dtype == theirs.dtype
            assert (ours.float() - theirs.float()).norm() <= tolerance * theirs.float().norm()


def test_products_are_those_of_peft_and_passes_in_between_are_gone() -> None:
    from exvideo_train.planning.trace import CostCounter

    counted: list[Any] = []
    for network in two_networks(torch.float32):
        with FlopCounterMode(display=False) as flops:
            run(network, torch.float32)
        with CostCounter() as meter:
            run(network, torch.float32)
        counted.append((flops.get_total_flops(), meter.flops, meter.moved_bytes))
    (theirs, _, their_bytes), (ours, metered, our_bytes) = counted
    assert ours == metered == theirs
    assert our_bytes < 0.6 * their_bytes


def test_what_peft_alone_can_do_is_left_to_it() -> None:
    """Dropout, updates switched off, another strength, several at once."""
    for change in (
        lambda network: choose_lora(network, {}),
        lambda network: choose_lora(network, {"default": 0.3}),
    ):
        plain, ours = two_networks(torch.float32)
        x = random(2, 50, 16, dtype=torch.float32)
        for network in (plain, ours):
            change(network)
        torch.testing.assert_close(ours(x), plain(x))
    dropping = LoraExtension(4, 6.0, ("0",), dropout=0.5)
    network = apply_lora(nn.Sequential(nn.Linear(16, 8)), dropping, 0)
    randomise_b(network)
    compute_as_one(network)
    x = random(2, 50, 16, dtype=torch.float32)
    assert not torch.equal(network.train()(x), network(x))
    assert torch.equal(network.eval()(x), network(x))
