"""Loading: strict, one copy, and a message with a remedy for every fault."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import CogVideoXTransformer3DModel
from safetensors.torch import load_file, save_file

from exvideo_train.errors import UserError
from exvideo_train.models.cogvideox import published, weights
from exvideo_train.models.cogvideox.network import CogVideoXDiT
from exvideo_train.models.registry import backbone_config, backbone_family, load_backbone

INDEX = "diffusion_pytorch_model.safetensors.index.json"


def _shards(folder: Path) -> list[Path]:
    return sorted((folder / "transformer").glob("*.safetensors"))


def _all_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for shard in _shards(folder) for name, tensor in load_file(shard).items()}


def _edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("variant", ["5b", "2b"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_loads_what_diffusers_loads(variant: str, dtype: torch.dtype, pristine_5b: Path, pristine_2b: Path) -> None:
    folder = pristine_5b if variant == "5b" else pristine_2b
    assert len(_shards(folder)) >= 2
    ours = load_backbone(folder, dtype).state_dict()
    reference = CogVideoXTransformer3DModel.from_pretrained(folder / "transformer", torch_dtype=dtype)
    expected = reference.state_dict()
    assert ours.keys() == expected.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == dtype
        assert tensor.device.type == "cpu"
        assert torch.equal(tensor, expected[name]), name


def _mapped_ranges(files: list[Path]) -> list[tuple[int, int]]:
    """Address ranges of this process that are these files."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    ends = [line.split()[0].split("-") for line in lines if any(line.endswith(str(file)) for file in files)]
    return [(int(start, 16), int(end, 16)) for start, end in ends]


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's /proc")
def test_in_the_stored_dtype_parameters_are_the_mapped_file_and_writing_spares_it(model_folder: Path) -> None:
    before = [shard.read_bytes() for shard in _shards(model_folder)]
    model = load_backbone(model_folder, torch.bfloat16)
    ranges = _mapped_ranges(_shards(model_folder))
    for name, parameter in model.named_parameters():
        assert any(start <= parameter.data_ptr() < end for start, end in ranges), name
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert [shard.read_bytes() for shard in _shards(model_folder)] == before


@pytest.mark.parametrize("name", ["", ".fp16"])
def test_loads_a_single_file_with_or_without_a_variant(name: str, model_folder: Path) -> None:
    tensors = _all_tensors(model_folder)
    for path in [*_shards(model_folder), model_folder / "transformer" / INDEX]:
        path.unlink()
    save_file(tensors, model_folder / "transformer" / f"diffusion_pytorch_model{name}.safetensors")
    loaded = load_backbone(model_folder, torch.bfloat16).state_dict()
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[key], tensors[key]) for key in tensors)


def test_loads_variant_shards(model_folder: Path) -> None:
    expected = _all_tensors(model_folder)
    index = model_folder / "transformer" / INDEX
    renamed = {shard.name: shard.name.replace("model-", "model.fp16-") for shard in _shards(model_folder)}
    for shard in _shards(model_folder):
        shard.rename(shard.with_name(renamed[shard.name]))
    content = json.loads(index.read_text())
    content["weight_map"] = {name: renamed[file] for name, file in content["weight_map"].items()}
    index.unlink()
    index.with_name("diffusion_pytorch_model.safetensors.index.fp16.json").write_text(json.dumps(content))
    loaded = load_backbone(model_folder, torch.bfloat16).state_dict()
    assert all(torch.equal(loaded[key], expected[key]) for key in expected)


def test_config_of_published_models() -> None:
    config = weights.config_from_fields(published.TRANSFORMER_5B, "5B")
    assert (config.num_layers, config.inner_dim, config.use_rotary_positional_embeddings) == (42, 3072, True)
    # The first release of 2B leaves out fields that have defaults.
    sparse = {"num_layers": 30, "num_attention_heads": 30}
    full = weights.config_from_fields(published.TRANSFORMER_2B, "2B")
    assert weights.config_from_fields(sparse, "2B") == full


def _remove_second_shard(folder: Path) -> None:
    _shards(folder)[1].unlink()


def _truncate_second_shard(folder: Path) -> None:
    shard = _shards(folder)[1]
    shard.write_bytes(shard.read_bytes()[:-100])


def _truncate_in_header(folder: Path) -> None:
    shard = _shards(folder)[0]
    shard.write_bytes(shard.read_bytes()[:50])


def _empty_shard(folder: Path) -> None:
    _shards(folder)[0].write_bytes(b"")


def _rewrite_first_shard(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(_shards(folder)[0])
    change(tensors)
    save_file(tensors, _shards(folder)[0])


def _drop_tensor(folder: Path) -> None:
    _rewrite_first_shard(folder, lambda tensors: tensors.pop("transformer_blocks.0.attn1.to_q.bias"))


def _reshape_tensor(folder: Path) -> None:
    _rewrite_first_shard(folder, lambda t: t.update({"transformer_blocks.0.attn1.to_q.bias": torch.zeros(65)}))


def _quantise_tensor(folder: Path) -> None:
    quantised = {"transformer_blocks.0.attn1.to_q.bias": torch.zeros(64, dtype=torch.int8)}
    _rewrite_first_shard(folder, lambda tensors: tensors.update(quantised))


def _index(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    _edit_json(folder / "transformer" / INDEX, change)


def _unlist_tensor(folder: Path) -> None:
    _index(folder, lambda content: content["weight_map"].pop("proj_out.weight"))


def _list_unexpected(folder: Path) -> None:
    _index(folder, lambda content: content["weight_map"].update(surprise=_shards(folder)[0].name))


def _config(folder: Path, **fields: Any) -> None:
    _edit_json(folder / "transformer" / "config.json", lambda content: content.update(fields))


def _only_pickles(folder: Path) -> None:
    for path in [*_shards(folder), folder / "transformer" / INDEX]:
        path.unlink()
    (folder / "transformer" / "diffusion_pytorch_model.bin").write_bytes(b"")


def _two_variants(folder: Path) -> None:
    _only_pickles(folder)
    for name in ("fp16", "bf16"):
        (folder / "transformer" / f"diffusion_pytorch_model.{name}.safetensors").write_bytes(b"")


FAULTS: list[tuple[str, Callable[[Path], None], list[str]]] = [
    ("shard missing", _remove_second_shard, ["00002-of", "missing", "download"]),
    ("shard truncated", _truncate_second_shard, ["00002-of", "truncated"]),
    ("shard truncated in its header", _truncate_in_header, ["00001-of", "truncated"]),
    ("shard empty", _empty_shard, ["00001-of", "truncated"]),
    ("tensor not in its shard", _drop_tensor, ["00001-of", "blocks.0.attn1.to_q.bias", "missing", "download"]),
    ("tensor misshaped", _reshape_tensor, ["00001-of", "to_q.bias", "[65]", "[64]"]),
    ("tensor quantised", _quantise_tensor, ["to_q.bias", "I8", "unquantised"]),
    ("tensor not in the index", _unlist_tensor, ["transformer", "proj_out.weight", "missing"]),
    ("tensor unknown", _list_unexpected, ["surprise", "not part of the network"]),
    ("index broken", lambda f: (f / "transformer" / INDEX).write_text("{") and None, [INDEX, "download"]),
    ("pickles only", _only_pickles, ["diffusion_pytorch_model.safetensors", ".bin", "convert"]),
    ("two variants", _two_variants, ["bf16.safetensors", "fp16.safetensors", "keep one"]),
    ("more layers", lambda f: _config(f, num_layers=4), ["transformer_blocks.3", "missing", "download"]),
    ("CogVideoX 1.5", lambda f: _config(f, patch_size_t=2), ["patch_size_t=2", "CogVideoX 1.5", "CogVideoX-5B"]),
    ("image-to-video", lambda f: _config(f, in_channels=32), ["in_channels=32", "text-to-video"]),
    ("learned positions", lambda f: _config(f, use_learned_positional_embeddings=True), ["image-to-video"]),
    ("field of a wrong type", lambda f: _config(f, num_layers="3"), ["num_layers='3'", "download"]),
    ("odd head", lambda f: _config(f, attention_head_dim=20), ["attention_head_dim=20", "16"]),
    ("other class", lambda f: _config(f, _class_name="Other"), ["config.json", "'Other'", "supported"]),
    ("config missing", lambda f: (f / "transformer/config.json").unlink(), ["transformer/config.json", "model.path"]),
    (
        "config broken",
        lambda f: (f / "transformer/config.json").write_text("{") and None,
        ["config.json", "JSON", "download"],
    ),
]


@pytest.mark.parametrize(("damage", "words"), [fault[1:] for fault in FAULTS], ids=[f[0] for f in FAULTS])
def test_a_fault_is_named_with_its_remedy(damage: Callable[[Path], None], words: list[str], model_folder: Path) -> None:
    damage(model_folder)
    with pytest.raises(UserError) as caught:
        load_backbone(model_folder, torch.bfloat16)
    message = str(caught.value)
    assert str(model_folder) in message
    for word in words:
        assert word in message, f"{word!r} not in {message!r}"


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model\.path=.*nowhere.*no such folder"):
        backbone_family(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"transformer/config\.json.*does not exist"):
        weights.load(tmp_path / "transformer", torch.float32, "cpu")


def test_the_registry_reads_the_class_name(pristine_5b: Path) -> None:
    family = backbone_family(pristine_5b)
    assert family.name == "cogvideox"
    config = backbone_config(pristine_5b)
    assert family.text_length(config) == 16
    model = load_backbone(pristine_5b, torch.float32)
    assert isinstance(model, CogVideoXDiT)
    assert model.config == config
    assert family.published_config("THUDM/CogVideoX-5b").num_layers == 42
    assert family.published_config("someone/else") is None
