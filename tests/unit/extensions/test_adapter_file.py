"""Adapter files: names, headers, round trips, refusal."""

import json
import re

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from exvideo_train.config.experiment import LORA_TARGETS
from exvideo_train.errors import UserError
from exvideo_train.extensions.adapter_file import FORMATS, read_adapter, write_adapter
from exvideo_train.extensions.provenance import make_provenance, source_commit
from exvideo_train.geometry import Geometry
from exvideo_train.tensor_files import read_safetensors_header

PROVENANCE = make_provenance("zai-org/CogVideoX-5b", "cogvideox", Geometry(129, 480, 720, 8), steps=4000, weights="raw")


def make_tensors(num_blocks=2, rank=3):
    generator = torch.Generator().manual_seed(0)
    return {
        f"transformer_blocks.{block}.{target}.{half}.weight": torch.randn(shape, generator=generator)
        for block in range(num_blocks)
        for target in LORA_TARGETS
        for half, shape in (("lora_A", (rank, 8)), ("lora_B", (6, rank)))
    }


def named_for(format):
    return "adapter_model.safetensors" if format == "peft" else "a.safetensors"


def deltas(tensors, scale):
    modules = {name.rsplit(".lora_", 1)[0] for name in tensors}
    return {m: scale * tensors[f"{m}.lora_B.weight"] @ tensors[f"{m}.lora_A.weight"] for m in modules}


def header(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("alpha", [3.0, 5.0])
def test_round_trip_keeps_the_update(tmp_path, format, alpha):
    tensors, path = make_tensors(), tmp_path / named_for(format)
    write_adapter(path, format, tensors, 3, alpha, LORA_TARGETS, PROVENANCE)
    adapter = read_adapter(path)
    assert adapter.tensors.keys() == tensors.keys()
    assert adapter.rank == 3
    assert adapter.alpha == (alpha if format in ("diffusers", "peft", "kohya") else 3.0)
    expected = deltas(tensors, alpha / 3)
    for module, delta in deltas(adapter.tensors, adapter.alpha / adapter.rank).items():
        torch.testing.assert_close(delta, expected[module], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("format", FORMATS)
def test_provenance_survives(tmp_path, format):
    path = tmp_path / named_for(format)
    write_adapter(path, format, make_tensors(), 3, 5.0, LORA_TARGETS, PROVENANCE)
    read = read_adapter(path).provenance
    assert read == {**PROVENANCE, "rank": 3, "alpha": 5.0, "adapter_format": format}
    assert read["base_model"] == "zai-org/CogVideoX-5b"
    assert (read["num_frames"], read["steps"]) == (129, 4000)
    assert all(isinstance(value, str) for value in header(path).values())


def test_the_commit_is_a_commit_of_this_checkout_or_unknown():
    assert re.fullmatch(r"[0-9a-f]{40}(\+changes)?|unknown", source_commit())


def test_equal_content_is_equal_bytes(tmp_path):
    for name in ("a", "b"):
        write_adapter(tmp_path / f"{name}.safetensors", "diffusers", make_tensors(), 3, 5.0, LORA_TARGETS, PROVENANCE)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_comfyui_keys_begin_with_transformer_and_nothing_states_alpha_twice(tmp_path):
    path = tmp_path / "a.safetensors"
    write_adapter(path, "comfyui", make_tensors(), 3, 5.0, LORA_TARGETS, PROVENANCE)
    assert all(key.startswith("transformer.") for key in load_file(path))
    assert "lora_adapter_metadata" not in header(path)


def test_every_diffsynth_key_of_a_full_adapter_is_a_name_of_its_network(tmp_path):
    # DiffSynth-Studio 1.1.9, models/cog_dit.py and attention.py: the Linears of one CogDiTBlock.
    linears = [
        "norm1.linear",
        "norm2.linear",
        "attn1.to_q",
        "attn1.to_k",
        "attn1.to_v",
        "attn1.to_out",
        "ff.0",
        "ff.2",
    ]
    path = tmp_path / "a.safetensors"
    write_adapter(path, "diffsynth", make_tensors(num_blocks=42, rank=1), 1, 1.0, LORA_TARGETS, PROVENANCE)
    expected = {
        f"blocks.{block}.{linear}.{half}.default.weight"
        for block in range(42)
        for linear in linears
        for half in ("lora_A", "lora_B")
    }
    assert load_file(path).keys() == expected


@pytest.mark.parametrize("suffix", ["", ".default"])
@pytest.mark.parametrize("prefix", ["", "transformer.", "diffusion_model.", "base_model.model."])
def test_reads_files_of_other_programs(tmp_path, prefix, suffix):
    path = tmp_path / "a.safetensors"
    renamed = {f"{prefix}{name.removesuffix('.weight')}{suffix}.weight": t for name, t in make_tensors().items()}
    save_file({name: tensor.bfloat16() for name, tensor in renamed.items()}, path)
    adapter = read_adapter(path)
    assert adapter.tensors.keys() == make_tensors().keys()
    assert (adapter.rank, adapter.alpha, adapter.provenance) == (3, 3.0, {})
    assert {tensor.dtype for tensor in adapter.tensors.values()} == {torch.float32}


@pytest.mark.parametrize("prefix", ["lora_unet_", "lora_unet__", "lora_transformer_"])
def test_reads_kohyas_files_with_an_alpha_a_module(tmp_path, prefix):
    path, tensors = tmp_path / "a.safetensors", make_tensors()
    content = {}
    for name, tensor in tensors.items():
        module, half = name.rsplit(".lora_", 1)
        flat = prefix + module.replace(".", "_")
        content[f"{flat}.lora_{'down' if half == 'A.weight' else 'up'}.weight"] = tensor
        content[f"{flat}.alpha"] = torch.tensor(1.5 if "attn1" in name else 6.0)
    save_file(content, path)
    adapter = read_adapter(path)
    assert (adapter.rank, adapter.alpha) == (3, 3.0)
    expected = {m: d * (0.5 if "attn1" in m else 2.0) for m, d in deltas(tensors, 1.0).items()}
    for module, delta in deltas(adapter.tensors, 1.0).items():
        assert torch.equal(delta, expected[module])  # powers of two


def test_an_alpha_that_float32_rounds_comes_back_as_it_was(tmp_path):
    path = tmp_path / "a.safetensors"
    write_adapter(path, "kohya", make_tensors(), 3, 0.1, LORA_TARGETS, PROVENANCE)
    assert read_adapter(path).alpha == 0.1


def test_other_linears_have_diffsynth_names_too(tmp_path):
    modules = ["patch_embed.text_proj", "time_embedding.linear_1", "time_embedding.linear_2", "norm_out.linear"]
    tensors = {}
    for module in [*modules, "proj_out"]:
        tensors |= {f"{module}.lora_A.weight": torch.ones(2, 4), f"{module}.lora_B.weight": torch.ones(4, 2)}
    write_adapter(tmp_path / "a.safetensors", "diffsynth", tensors, 2, 2.0, modules, {})
    assert "time_embedder.timestep_embedder.2.lora_B.default.weight" in load_file(tmp_path / "a.safetensors")
    assert read_adapter(tmp_path / "a.safetensors").tensors.keys() == tensors.keys()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "tomorrow"}, "format=tomorrow"),
        ({"path": "a.pt"}, "safetensors"),
        ({"tensors": {}}, "empty"),
        ({"rank": 4}, "rank 4"),
        ({"tensors": {"x.lora_A.weight": torch.ones(3, 2)}}, r"x\.lora_B\.weight is missing"),
        ({"tensors": {"x.weight": torch.ones(3, 2)}}, r"x\.weight is no LoRA"),
        (
            {"tensors": {"x.lora_A.weight": torch.ones(3, 2), "x.lora_B.weight": torch.full((2, 3), torch.nan)}},
            "not finite",
        ),
        (
            {
                "tensors": {"x.lora_A.weight": torch.ones(3, 2), "x.lora_B.weight": torch.ones(2, 3)},
                "format": "diffsynth",
            },
            "no name for x",
        ),
    ],
)
def test_refuses_to_write(tmp_path, change, message):
    arguments = {"path": "a.safetensors", "format": "diffusers", "tensors": make_tensors(), "rank": 3} | change
    with pytest.raises(UserError, match=message):
        write_adapter(tmp_path / arguments.pop("path"), **arguments, alpha=3.0, targets=LORA_TARGETS, provenance={})
    assert not list(tmp_path.iterdir())


def test_refuses_to_read(tmp_path):
    path = tmp_path / "a.safetensors"
    with pytest.raises(UserError, match="does not exist"):
        read_adapter(path)
    write_adapter(path, "diffusers", make_tensors(), 3, 5.0, LORA_TARGETS, PROVENANCE)
    content = path.read_bytes()
    path.write_bytes(content[:-10])
    with pytest.raises(UserError, match="truncated"):
        read_adapter(path)
    save_file({"weight": torch.ones(2)}, path)
    with pytest.raises(UserError, match="no LoRA tensor"):
        read_adapter(path)
    for name, value in {"rank_pattern": {"x": 2}, "use_dora": True, "r": 8}.items():
        save_file(make_tensors(), path, {"lora_adapter_metadata": json.dumps({f"transformer.{name}": value})})
        with pytest.raises(UserError, match="header"):
            read_adapter(path)
    save_file(make_tensors(), path, {"lora_adapter_metadata": "{"})
    with pytest.raises(UserError, match="not JSON"):
        read_adapter(path)


def test_the_header_is_read_without_the_tensors(tmp_path):
    path = tmp_path / "a.safetensors"
    write_adapter(path, "diffusers", make_tensors(), 3, 5.0, LORA_TARGETS, PROVENANCE)
    assert json.loads(read_safetensors_header(path)["__metadata__"]["exvideo_train"])["steps"] == 4000
