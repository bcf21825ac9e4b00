"""LoRA on a published network: names, dtypes, initialisation, refusal."""

import copy
import subprocess
import sys

import pytest
import torch
from diffusers import CogVideoXTransformer3DModel
from support.updates import randomise_b
from torch import nn

from exvideo_train.config.experiment import LORA_TARGETS, LoraConfig
from exvideo_train.errors import UserError
from exvideo_train.extensions.extension import Trained
from exvideo_train.extensions.lora import (
    LoraExtension,
    apply_lora,
    choose_lora,
    load_lora_state,
    lora_parameters,
    lora_state,
    place_lora,
)

SETTINGS = LoraExtension(rank=4, alpha=6.0, target_modules=tuple(LORA_TARGETS))
TINY = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 4,
    "time_embed_dim": 16,
    "text_embed_dim": 24,
    "num_layers": 2,
    "sample_width": 8,
    "sample_height": 6,
    "sample_frames": 9,
    "max_text_seq_length": 5,
    "use_rotary_positional_embeddings": False,
}


@pytest.fixture
def network():
    torch.manual_seed(0)
    return CogVideoXTransformer3DModel(**TINY).eval()


def inputs(dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    return {
        "hidden_states": torch.randn(1, 3, 4, 6, 8, generator=generator).to(dtype),
        "encoder_hidden_states": torch.randn(1, 5, 24, generator=generator).to(dtype),
        "timestep": torch.tensor([500]),
        "return_dict": False,
    }


def test_names_are_the_published_modules(network):
    published = {name for name, module in network.named_modules() if isinstance(module, nn.Linear)}
    model = apply_lora(network, SETTINGS, seed=6)
    assert model is network
    names = list(lora_parameters(model))
    assert len(names) == 2 * 8 * 2
    assert names[0] == "transformer_blocks.0.norm1.linear.lora_A.weight"
    assert {name.rsplit(".lora_", 1)[0] for name in names} < published


def test_only_updates_train_in_float32_whatever_the_backbone(network):
    model = apply_lora(network.bfloat16(), SETTINGS, seed=6)
    ours = {id(parameter) for parameter in lora_parameters(model).values()}
    for name, parameter in model.named_parameters():
        trained = id(parameter) in ours
        assert parameter.requires_grad == trained, name
        assert parameter.dtype == (torch.float32 if trained else torch.bfloat16), name


def test_initialisation_depends_on_seed_and_name_alone(network):
    other = copy.deepcopy(network)
    fewer = copy.deepcopy(network)
    before = torch.get_rng_state()
    state = lora_state(apply_lora(network, SETTINGS, seed=6))
    assert torch.equal(before, torch.get_rng_state())
    torch.randn(3)
    again = lora_state(apply_lora(other.bfloat16(), SETTINGS, seed=6))
    assert all(torch.equal(state[name], again[name]) for name in state)
    only_q = lora_state(apply_lora(fewer, LoraExtension(4, 4.0, ("attn1.to_q",)), seed=6))
    assert all(torch.equal(state[name], only_q[name]) for name in only_q)

    a = {name: tensor for name, tensor in state.items() if "lora_A" in name}
    assert all(not tensor.any() for name, tensor in state.items() if "lora_B" in name)
    assert len({tensor.flatten()[0].item() for tensor in a.values()}) == len(a)
    for tensor in a.values():
        assert tensor.abs().max() <= tensor.shape[1] ** -0.5
        assert tensor.std() > 0.4 * tensor.shape[1] ** -0.5


def test_rank_64_on_a_full_size_5b_is_the_published_size():
    with torch.device("meta"):
        network = CogVideoXTransformer3DModel(
            num_attention_heads=48, num_layers=42, use_rotary_positional_embeddings=True
        )
        assert sum(parameter.numel() for parameter in network.parameters()) == 5_570_283_072
        model = apply_lora(network, LoraExtension(64, 64.0, tuple(LORA_TARGETS)), seed=6)
    assert sum(parameter.numel() for parameter in lora_parameters(model).values()) == 250_478_592


def test_the_room_imports_no_text_encoder_and_no_video_reader():
    code = (
        "import sys, exvideo_train.extensions.lora;"
        "unwanted = ('diffusers', 'transformers.models.t5.modeling_t5', 'av', 'decord', 'cv2');"
        "print([name for name in sys.modules if name.startswith(unwanted)])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_update_is_alpha_over_rank_b_a(network):
    base = copy.deepcopy(network)
    model = apply_lora(network, SETTINGS, seed=6)
    with torch.no_grad():
        assert torch.equal(model(**inputs())[0], base(**inputs())[0])
        randomise_b(model, seed=2)
        state = lora_state(model)
        for name in {name.rsplit(".lora_", 1)[0] for name in state}:
            delta = state[f"{name}.lora_B.weight"] @ state[f"{name}.lora_A.weight"]
            base.get_submodule(name).weight += 6.0 / 4 * delta
        torch.testing.assert_close(model(**inputs())[0], base(**inputs())[0], rtol=1e-5, atol=1e-5)


def test_disabled_and_scaled(network):
    base = copy.deepcopy(network)
    model = apply_lora(network, SETTINGS, seed=6)
    randomise_b(model, seed=2)
    with torch.no_grad():
        reference, adapted = base(**inputs())[0], model(**inputs())[0]
        assert (adapted - reference).abs().max() > 1e-3
        choose_lora(model, {})
        assert torch.equal(model(**inputs())[0], reference)
        assert all(parameter.requires_grad for parameter in lora_parameters(model).values())
        choose_lora(model, {"default": 1.0})
        assert torch.equal(model(**inputs())[0], adapted)
        choose_lora(model, {"default": 0.0})
        assert torch.equal(model(**inputs())[0], reference)


def test_placed_adapters_are_added_up_as_chosen(network):
    """Of other ranks and targets, with one Linear in common."""
    base, placed = copy.deepcopy(network), {}
    for name, targets, rank in (("one", ("attn1.to_q", "ff.net.2"), 4), ("two", ("attn1.to_q", "norm1.linear"), 2)):
        extension = LoraExtension(rank, 2.0 * rank, targets)
        trained = apply_lora(copy.deepcopy(base), extension, seed=len(placed))
        randomise_b(trained)
        placed[name] = Trained(extension, {key: value.clone() for key, value in lora_state(trained).items()}, {})
        place_lora(network, name, placed[name], torch.float32, name)
    for strengths in ({"one": 0.5}, {"two": 1.5, "one": 1.0}, {}, {"two": 1.0}):
        merged = copy.deepcopy(base)
        weights = dict(merged.named_parameters())
        with torch.no_grad():
            for name, strength in strengths.items():
                tensors = placed[name].tensors
                for key in (key for key in tensors if key.endswith("lora_A.weight")):
                    update = tensors[key.replace("lora_A", "lora_B")] @ tensors[key]
                    weights[key.replace("lora_A.", "")] += 2.0 * strength * update
            choose_lora(network, strengths)
            torch.testing.assert_close(network(**inputs())[0], merged(**inputs())[0], rtol=1e-4, atol=1e-5)
    wrong = {key.replace("blocks.0", "blocks.9"): value for key, value in placed["one"].tensors.items()}
    third = Trained(placed["one"].extension, wrong, {})
    with pytest.raises(UserError, match=r"third does not fit the model: it updates transformer_blocks\.9"):
        place_lora(network, "third", third, torch.float32, "third")


def test_autocast_computes_in_bf16_without_casting_inputs_up(network):
    linear = nn.Sequential(nn.Linear(16, 8)).bfloat16()
    model = apply_lora(linear, LoraExtension(2, 2.0, ("0",)), seed=0)
    seen = []
    model[0].lora_A["default"].register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(torch.randn(3, 16, dtype=torch.bfloat16))
    assert seen == [torch.bfloat16]
    assert output.dtype == torch.bfloat16
    output.sum().backward()
    gradients = [parameter.grad for parameter in lora_parameters(model).values()]
    assert all(gradient is not None and gradient.dtype == torch.float32 for gradient in gradients)


def test_half_precision_without_autocast(network):
    other = apply_lora(copy.deepcopy(network), SETTINGS, seed=6)
    place_lora(network.bfloat16(), "placed", Trained(SETTINGS, lora_state(other), {}), torch.bfloat16, "other")
    choose_lora(network, {"placed": 1.0})
    with torch.no_grad():
        assert network(**inputs(torch.bfloat16))[0].dtype == torch.bfloat16
    assert not any(parameter.requires_grad for parameter in network.parameters())


def test_state_round_trip(network):
    other = copy.deepcopy(network)
    model = apply_lora(network, SETTINGS, seed=6)
    randomise_b(model, seed=2)
    fresh = apply_lora(other, SETTINGS, seed=7)
    load_lora_state(fresh, lora_state(model))
    assert all(torch.equal(lora_state(model)[name], tensor) for name, tensor in lora_state(fresh).items())


def test_state_of_another_model_is_refused_whole(network):
    model = apply_lora(network, SETTINGS, seed=6)
    before = {name: tensor.clone() for name, tensor in lora_state(model).items()}
    tensors = {name: tensor + 1 for name, tensor in before.items()}
    last = list(tensors)[-1]
    with pytest.raises(UserError, match=rf"file.* 1 tensors missing \({last}\)"):
        load_lora_state(model, {name: tensor for name, tensor in tensors.items() if name != last}, "file")
    with pytest.raises(UserError, match=r"1 unknown \(x\)"):
        load_lora_state(model, tensors | {"x": torch.zeros(1)})
    with pytest.raises(UserError, match=r"\(5, 4\)"):
        load_lora_state(model, tensors | {last: torch.zeros(5, 4)})
    assert all(torch.equal(before[name], tensor) for name, tensor in lora_state(model).items())


@pytest.mark.parametrize(
    ("target", "nearest"), [("attn1.to_qq", "attn1.to_q"), ("norm1", "norm1.linear"), ("to_out", "attn1.to_out.0")]
)
def test_a_target_that_matches_nothing_names_its_neighbours(network, target, nearest):
    with pytest.raises(UserError) as error:
        apply_lora(network, LoraExtension(4, 4.0, ("attn1.to_k", target)), seed=0)
    assert repr(target) in str(error.value)
    assert nearest in str(error.value)
    assert all(parameter.requires_grad for parameter in network.parameters())


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"rank": 0}, "lora.rank=0"),
        ({"alpha": 0.0}, "lora.alpha=0"),
        ({"dropout": 1.0}, "lora.dropout=1"),
        ({"targets": []}, r"lora.targets=\[\]"),
    ],
)
def test_settings_outside_their_range(values, field):
    with pytest.raises(UserError, match=field):
        LoraConfig(**values)
