"""Exported adapters in the programs that they are written for."""

import json

import pytest
import torch
from diffusers import CogVideoXPipeline
from peft import LoraConfig
from safetensors.torch import load_file
from support.updates import randomise_b

from exvideo_train.config.experiment import LORA_TARGETS
from exvideo_train.extensions.adapter_file import write_adapter
from exvideo_train.extensions.lora import LoraExtension, apply_lora, lora_layers, lora_state
from exvideo_train.models.registry import load_backbone
from exvideo_train.tensor_files import read_safetensors_header

RANK, ALPHA = 4, 10.0
SETTINGS = LoraExtension(RANK, ALPHA, tuple(LORA_TARGETS))


def load_ours(model_path):
    return load_backbone(model_path, torch.float32).eval()


def train(model):
    randomise_b(model, seed=5, scale=0.05)
    return model


@pytest.mark.parametrize("format", ["diffusers", "comfyui"])
def test_diffusers_loads_the_file_and_computes_the_same(tiny_model_5b, tmp_path, format):
    path = tmp_path / "adapter.safetensors"
    ours = train(apply_lora(load_ours(tiny_model_5b), SETTINGS, seed=6))
    write_adapter(path, format, lora_state(ours), RANK, ALPHA, LORA_TARGETS, {"steps": 1})

    pipeline = CogVideoXPipeline.from_pretrained(tiny_model_5b, torch_dtype=torch.float32)
    theirs = pipeline.transformer
    config = theirs.config
    generator = torch.Generator().manual_seed(1)
    latents_BTCHW = torch.randn(2, 33, config.in_channels, 8, 12, generator=generator)
    text_BLC = torch.randn(2, config.max_text_seq_length, config.text_embed_dim, generator=generator)
    timesteps_B = torch.tensor([300, 999])
    rotary = pipeline._prepare_rotary_positional_embeddings(64, 96, 33, torch.device("cpu"))

    def run_theirs():
        return theirs(latents_BTCHW, text_BLC, timesteps_B, image_rotary_emb=rotary, return_dict=False)[0]

    with torch.no_grad():
        base = run_theirs()
        pipeline.load_lora_weights(path)
        adapted, expected = run_theirs(), ours(latents_BTCHW, timesteps_B, text_BLC)
    assert (adapted - base).abs().max() > 1e-2 * base.abs().max()
    torch.testing.assert_close(adapted, expected, rtol=1e-5, atol=1e-5)
    assert sum("lora_A" in name for name, _ in theirs.named_parameters()) == len(lora_layers(ours))


def test_metadata_is_a_peft_config(tiny_model_5b, tmp_path):
    path = tmp_path / "adapter.safetensors"
    ours = apply_lora(load_ours(tiny_model_5b), SETTINGS, seed=6)
    write_adapter(path, "diffusers", lora_state(ours), RANK, ALPHA, LORA_TARGETS, {})
    metadata = json.loads(read_safetensors_header(path)["__metadata__"]["lora_adapter_metadata"])
    config = LoraConfig(**{name.removeprefix("transformer."): value for name, value in metadata.items()})
    assert (config.r, config.lora_alpha, set(config.target_modules)) == (RANK, ALPHA, set(LORA_TARGETS))


def test_diffsynth_delta_is_the_merge_of_peft(tiny_model_5b, tmp_path):
    path = tmp_path / "adapter.safetensors"
    reference = load_ours(tiny_model_5b).state_dict()
    ours = train(apply_lora(load_ours(tiny_model_5b), SETTINGS, seed=6))
    write_adapter(path, "diffsynth", lora_state(ours), RANK, ALPHA, LORA_TARGETS, {})
    # As DiffSynth-Studio 1.1.9 does (models/lora.py): names without lora and adapter, B @ A with strength 1.
    content = load_file(path)
    added = {
        name.replace(".lora_B.default", ""): up @ content[name.replace("lora_B", "lora_A")]
        for name, up in content.items()
        if ".lora_B." in name
    }
    layers = lora_layers(ours)
    assert len(added) == len(layers)
    for name, layer in layers.items():
        layer.merge()
        merged = layer.get_base_layer().weight - reference[f"{name}.weight"]
        theirs = name.replace("transformer_blocks", "blocks").replace("to_out.0", "to_out").replace("net.", "")
        theirs = theirs.replace("ff.0.proj", "ff.0") + ".weight"
        assert merged.abs().max() > 1e-3
        torch.testing.assert_close(added[theirs], merged, rtol=0, atol=1e-6)
