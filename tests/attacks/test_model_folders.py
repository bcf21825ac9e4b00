"""Hostile model folders: no code runs, no other file is opened, no memory is taken for what a config claims."""

from __future__ import annotations

import json
import math
import os
import pickle
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.attacks import Attack, Ending, attacks, check_ending, held, refused

from exvideo_train.latents.fingerprint import component_digest
from exvideo_train.models.cogvideox.encoder_weights import load_text_encoder, load_tokenizer, load_vae
from exvideo_train.models.cogvideox.encoding import read_text_length
from exvideo_train.models.cogvideox.objective import noise_levels
from exvideo_train.models.cogvideox.sampler import load_scheduler
from exvideo_train.models.registry import load_backbone
from exvideo_train.models.stages import SamplerSettings

Edit = Callable[[Path], object]
VOCABULARY = 280
DIT, T5, VAE, TOKENIZER, SCHEDULER = "transformer", "text_encoder", "vae", "tokenizer", "scheduler"
INDEX = {T5: "model.safetensors.index.json", DIT: "diffusion_pytorch_model.safetensors.index.json"}
DEEP = '{"a":' * 100_000


class Payload:
    """A pickle that leaves a file when it is loaded."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


def marker_of(folder: Path) -> Path:
    return folder.parent.parent / "code_ran"


def pickle_in(folder: Path, name: str) -> None:
    (folder / name).write_bytes(pickle.dumps(Payload(marker_of(folder))))


def code_in(folder: Path, name: str) -> None:
    (folder / name).write_text(f"import os\nos.mkdir({str(marker_of(folder))!r})\n")


def edit_json(name: str, **fields: Any) -> Edit:
    def edit(folder: Path) -> None:
        path = folder / name
        content = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**content, **fields}))

    return edit


def config(**fields: Any) -> Edit:
    return edit_json("config.json", **fields)


def write(name: str, content: str | bytes) -> Edit:
    """Replace a file by this content."""
    data = content.encode() if isinstance(content, str) else content
    return lambda folder: (folder / name).write_bytes(data)


def replace(name: str, make: Callable[[Path], object]) -> Edit:
    """Replace a file by what ``make`` makes under its name."""

    def edit(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        make(folder / name)

    return edit


def both(*edits: Edit) -> Edit:
    return lambda folder: [edit(folder) for edit in edits]


def weights(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors*"))


def only_pickles(folder: Path) -> None:
    for path in weights(folder):
        path.unlink()
    pickle_in(folder, "pytorch_model.bin")
    pickle_in(folder, "diffusion_pytorch_model.bin")


def in_index(file: Any, part: str = T5) -> Edit:
    """The index says that its first tensor is in this file, which holds it."""

    def edit(folder: Path) -> None:
        path = folder / INDEX[part]
        content = json.loads(path.read_text())
        name, shard = min(content["weight_map"].items())
        content["weight_map"][name] = file
        path.write_text(json.dumps(content))
        is_name = isinstance(file, str) and "\0" not in file and len(file) < 256
        if is_name and file.endswith((".safetensors", ".bin")):
            target = Path(os.path.normpath(folder / file))
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(folder / shard, target)

    return edit


def absolute_in_index(folder: Path) -> None:
    in_index(str(folder.parent / "other.safetensors"))(folder)


def fifo_in_index(folder: Path) -> None:
    in_index("f.safetensors")(folder)
    replace("f.safetensors", os.mkfifo)(folder)


def first_shard(change: Callable[[dict[str, torch.Tensor]], object]) -> Edit:
    def edit(folder: Path) -> None:
        path = next(path for path in weights(folder) if path.suffix == ".safetensors")
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)

    return edit


def one_as_integers(tensors: dict[str, torch.Tensor]) -> None:
    name = min(tensors)
    tensors[name] = torch.zeros(tensors[name].shape, dtype=torch.int8)


def embedding_renamed(folder: Path) -> None:
    """T5's embedding under the other of its two names, and a decoder, of which nothing is read."""
    path = folder / INDEX[T5]
    content = json.loads(path.read_text())
    shard = content["weight_map"].pop("shared.weight")
    tensors = load_file(folder / shard)
    tensors |= {"encoder.embed_tokens.weight": tensors.pop("shared.weight"), "decoder.x": torch.ones(1)}
    save_file(tensors, folder / shard)
    content["weight_map"] |= {"encoder.embed_tokens.weight": shard, "decoder.x": shard}
    path.write_text(json.dumps(content))


def links_into_blobs(folder: Path) -> None:
    """As a hub's cache: every file is a link out of the folder."""
    blobs = folder.parent.parent / "blobs"
    blobs.mkdir()
    for number, path in enumerate(sorted(folder.iterdir())):
        path.rename(blobs / str(number))
        path.symlink_to(Path("../../blobs") / str(number))


def adapter_beside(folder: Path) -> None:
    """What PEFT's auto-loading would put on the model: an adapter, of a base model that is elsewhere."""
    content = {"peft_type": "LORA", "r": 1, "target_modules": ["q"], "base_model_name_or_path": "../other"}
    (folder / "adapter_config.json").write_text(json.dumps(content))
    save_file({"base_model.model.q.lora_A.weight": torch.ones(1, 32)}, folder / "adapter_model.safetensors")


def sparse(num_bytes: int) -> Callable[[Path], object]:
    def make(path: Path) -> None:
        path.touch()
        os.truncate(path, num_bytes)

    return make


CODE = {"AutoModel": "evil.Evil", "AutoTokenizer": ["evil.Evil", None], "AutoConfig": "evil.Evil"}
TEXT_ENCODERS = [
    held("as it is", (T5, lambda folder: None)),
    held("links into blobs", (T5, links_into_blobs)),
    held("the embedding's other name, and a decoder", (T5, embedding_renamed)),
    held("an adapter beside", (T5, adapter_beside)),
    held("an adapter that is no JSON", (T5, write("adapter_config.json", DEEP))),
    held("pickled weights beside", (T5, lambda folder: pickle_in(folder, "pytorch_model.bin"))),
    held("code beside", (T5, lambda folder: code_in(folder, "modeling_t5.py"))),
    held("attention from a hub", (T5, config(attn_implementation="evil/kernel", _attn_implementation="evil/kernel"))),
    held("attention of a library", (T5, config(_attn_implementation="flash_attention_2"))),
    held("attention by name", (T5, config(_attn_implementation="eager", _attn_implementation_internal="eager"))),
    held("an experts' implementation", (T5, config(_experts_implementation="evil/kernel", use_kernels=True))),
    held("a number format", (T5, config(torch_dtype="int8", dtype="evil"))),
    held("another architecture", (T5, config(architectures=["Evil"], is_decoder=True, pruned_heads={"0": [0]}))),
    held("a generation config that is no JSON", (T5, write("generation_config.json", DEEP))),
    held("a folder of a distributed checkpoint", (T5, lambda folder: (folder / ".metadata").write_bytes(b"x"))),
    refused("pickles only", (T5, only_pickles), "pickled"),
    refused("auto_map", (T5, both(config(auto_map=CODE), lambda f: code_in(f, "evil.py"))), "config.json", "auto_map"),
    refused("quantised", (T5, config(quantization_config={"quant_method": "evil"})), "quantization_config"),
    refused("weights by name", (T5, config(transformers_weights="../other.safetensors")), "transformers_weights"),
    refused("fusion", (T5, config(fusion_config={"evil": True})), "fusion_config"),
    refused("another model", (T5, config(model_type="llama")), "model_type='llama'"),
    refused("10^9 layers", (T5, config(num_layers=10**9)), "num_layers=1000000000"),
    refused("0 layers", (T5, config(num_layers=0)), "num_layers=0"),
    refused("layers a text", (T5, config(num_layers="2")), "num_layers='2'"),
    refused("layers true", (T5, config(num_layers=True)), "num_layers=True"),
    refused("2.5 layers", (T5, config(num_layers=2.5)), "num_layers=2.5"),
    refused("layers null", (T5, config(num_layers=None)), "num_layers=None"),
    refused("10^7 wide", (T5, config(d_model=10**7)), "d_model=10000000"),
    refused("a negative width", (T5, config(d_ff=-64)), "d_ff=-64"),
    refused("10^12 words", (T5, config(vocab_size=10**12)), "vocab_size="),
    refused("a width that its weights have not", (T5, config(d_model=1 << 16)), "has shape"),
    refused("a layer more than its weights", (T5, config(num_layers=3)), "missing"),
    refused("epsilon NaN", (T5, config(layer_norm_epsilon=math.nan)), "NaN"),
    refused("epsilon 0", (T5, config(layer_norm_epsilon=0.0)), "layer_norm_epsilon=0.0"),
    refused("3 buckets", (T5, config(relative_attention_num_buckets=3)), "relative_attention_num_buckets=3"),
    refused("distance within the buckets", (T5, config(relative_attention_max_distance=8)), "max_distance"),
    refused("an unknown activation", (T5, config(feed_forward_proj="gated-evil")), "cannot be loaded"),
    refused("an activation in a list", (T5, config(feed_forward_proj=["relu"])), "cannot be loaded"),
    refused("config a list", (T5, write("config.json", "[]")), "config.json", "not an object"),
    refused("config cut", (T5, write("config.json", '{"a')), "config.json", "not JSON"),
    refused("config nested", (T5, write("config.json", DEEP)), "config.json", "nested deeper"),
    refused("config of 400 digits", (T5, write("config.json", '{"d_model":' + "9" * 400 + "}")), "digits"),
    refused("config with a field twice", (T5, write("config.json", '{"d_ff":1,"d_ff":2}')), "'d_ff'", "twice"),
    refused("config of a terabyte", (T5, replace("config.json", sparse(1 << 40))), "config.json", str(1 << 40)),
    refused("config a FIFO", (T5, replace("config.json", os.mkfifo)), "config.json", "not a regular file"),
    refused("config a folder", (T5, replace("config.json", os.mkdir)), "config.json", "not a regular file"),
    refused("config a device", (T5, replace("config.json", lambda p: p.symlink_to("/dev/zero"))), "not a regular"),
    refused("config missing", (T5, replace("config.json", lambda path: None)), "config.json", "does not exist"),
    refused("a tensor missing", (T5, first_shard(lambda tensors: tensors.pop(min(tensors)))), "missing"),
    refused("integers", (T5, first_shard(one_as_integers)), "I8"),
]  # fmt: skip
INDEXES = [
    refused("above the folder", (T5, in_index("../other.safetensors")), "'../other.safetensors'", "beside it"),
    refused("far above", (T5, in_index("x/../../../other.safetensors")), "beside it"),
    refused("absolute", (T5, absolute_in_index), "beside it"),
    refused("below the folder", (T5, in_index("sub/other.safetensors")), "'sub/other.safetensors'", "beside it"),
    refused("the transformer's, above", (DIT, in_index("../other.safetensors", DIT)), "beside it"),
    refused("hidden, where no fingerprint looks", (T5, in_index(".other.safetensors")), "'.other.safetensors'"),
    refused("another suffix", (T5, in_index("other.bin")), "'other.bin'"),
    refused("the folder itself", (T5, in_index(".")), "'.'"),
    refused("a NUL", (T5, in_index("a\0.safetensors")), "beside it"),
    refused("a name too long for a file", (T5, in_index("a" * 500 + ".safetensors")), "aaa...", "beside it"),
    refused("null", (T5, in_index(None)), "None"),
    refused("a list", (T5, in_index(["a.safetensors"])), "a.safetensors"),
    refused("a map of nothing", (T5, write(INDEX[T5], '{"weight_map":{}}')), "weight_map={}"),
    refused("a map in a list", (T5, write(INDEX[T5], '{"weight_map":[]}')), "weight_map=[]"),
    refused("no map", (T5, write(INDEX[T5], "{}")), "weight_map=None"),
    refused("no object", (T5, write(INDEX[T5], "3")), INDEX[T5], "not an object"),
    refused("nested", (T5, write(INDEX[T5], DEEP)), INDEX[T5], "nested deeper"),
    refused("a FIFO", (T5, fifo_in_index), "f.safetensors"),
]  # fmt: skip


VAES = [
    held("as it is", (VAE, lambda folder: None)),
    held("links into blobs", (VAE, links_into_blobs)),
    held("pickled weights beside", (VAE, lambda folder: pickle_in(folder, "diffusion_pytorch_model.bin"))),
    held("an adapter beside", (VAE, adapter_beside)),
    held("fields of others", (VAE, config(_name_or_path="/etc", attn_implementation="evil/kernel", tomorrow=[1]))),
    refused("pickles only", (VAE, only_pickles), "pickled"),
    refused("auto_map", (VAE, config(auto_map=CODE)), "auto_map"),
    refused("quantised", (VAE, config(quantization_config={"quant_method": "evil"})), "quantization_config"),
    refused("another class", (VAE, config(_class_name="AutoencoderKL")), "_class_name='AutoencoderKL'"),
    refused("another block", (VAE, config(down_block_types=["Evil"] * 4)), "down_block_types="),
    refused("blocks a text", (VAE, config(up_block_types="CogVideoXUpBlock3D")), "up_block_types="),
    refused("a block less", (VAE, config(up_block_types=["CogVideoXUpBlock3D"])), "vae"),
    refused("10^7 wide", (VAE, config(block_out_channels=[10**7] * 4)), "block_out_channels=10000000"),
    refused("10^5 levels", (VAE, config(block_out_channels=[4] * 10**5)), "block_out_channels="),
    refused("a width of 0", (VAE, config(block_out_channels=[4, 4, 8, 0])), "block_out_channels=0"),
    refused("10^9 layers", (VAE, config(layers_per_block=10**9)), "layers_per_block="),
    refused("groups that do not divide", (VAE, config(norm_num_groups=3)), "cannot be loaded"),
    refused("10^9 channels", (VAE, config(latent_channels=10**9)), "latent_channels="),
    refused("4 colours", (VAE, config(in_channels=4)), "in_channels=4"),
    refused("an unknown activation", (VAE, config(act_fn="evil")), "cannot be loaded"),
    refused("tiles of 0", (VAE, config(sample_height=0)), "sample_height=0"),
    refused("factor 0", (VAE, config(scaling_factor=0)), "scaling_factor=0"),
    refused("factor NaN", (VAE, config(scaling_factor=math.nan)), "NaN"),
    refused("factor inf", (VAE, config(scaling_factor=math.inf)), "Infinity"),
    refused("factor a text", (VAE, config(scaling_factor="0.7")), "scaling_factor='0.7'"),
    refused("a compression of 10^300", (VAE, config(temporal_compression_ratio=1e300)), "temporal_compression_ratio"),
    refused("weights of another width", (VAE, config(block_out_channels=[4, 4, 8, 16])), "missing"),
    refused("weights of more channels", (VAE, config(latent_channels=32)), "has shape"),
]
TRANSFORMERS = [
    held("as it is", (DIT, lambda folder: None)),
    held("links into blobs", (DIT, links_into_blobs)),
    held("an adapter beside", (DIT, adapter_beside)),
    held("pickled weights beside", (DIT, lambda folder: pickle_in(folder, "diffusion_pytorch_model.bin"))),
    held("attention from a hub", (DIT, config(attn_implementation="evil/kernel", _name_or_path="/etc"))),
    held("an index of the whole model that leaves it",
         (DIT, lambda f: edit_json("model_index.json", vae=["../../evil", "Evil"], _class_name=["a", "b"])(f.parent))),
    refused("pickles only", (DIT, only_pickles), "pickled"),
    refused("quantised", (DIT, config(quantization_config={"quant_method": "evil"})), "quantization_config"),
    refused("10^9 layers", (DIT, config(num_layers=10**9)), "num_layers="),
    refused("-1 layers", (DIT, config(num_layers=-1)), "num_layers=-1"),
    refused("10^9 heads", (DIT, config(num_attention_heads=10**9)), "num_attention_heads="),
    refused("heads 10^7 wide", (DIT, config(attention_head_dim=16 * 10**6)), "attention_head_dim="),
    refused("10^9 tokens", (DIT, config(max_text_seq_length=10**9)), "max_text_seq_length="),
    refused("patches of 0", (DIT, config(patch_size=0)), "patch_size=0"),
    refused("a scale of 0", (DIT, config(spatial_interpolation_scale=0.0)), "spatial_interpolation_scale=0.0"),
    refused("a scale of inf", (DIT, config(temporal_interpolation_scale=math.inf)), "Infinity"),
    refused("a base of 10^9 rows", (DIT, config(sample_height=10**9)), "sample_height="),
    refused("another class", (DIT, config(_class_name=["CogVideoXTransformer3DModel"])), "_class_name="),
    refused("config nested", (DIT, write("config.json", DEEP)), "config.json", "nested deeper"),
    refused("config a FIFO", (DIT, replace("config.json", os.mkfifo)), "config.json"),
]  # fmt: skip
tokens = lambda **fields: edit_json("tokenizer_config.json", **fields)  # noqa: E731
TOKENIZERS = [
    held("as it is", (TOKENIZER, lambda folder: None)),
    held("links into blobs", (TOKENIZER, links_into_blobs)),
    held("a vocabulary elsewhere", (TOKENIZER, tokens(vocab_file="/etc/passwd", tokenizer_file="/etc/passwd"))),
    held("a map elsewhere", (TOKENIZER, tokens(special_tokens_map_file="/etc/passwd", added_tokens_file="../x"))),
    held("other versions", (TOKENIZER, tokens(fast_tokenizer_files=["tokenizer.1.0.json", "../../x.json"]))),
    held("trust", (TOKENIZER, both(tokens(trust_remote_code=True), lambda f: code_in(f, "tokenization_t5.py")))),
    held("arguments", (TOKENIZER, tokens(init_inputs=[[["x", 0.0]]], gguf_file="../x", tokenizer_object="x"))),
    held("another vocabulary beside", (TOKENIZER, write("tiktoken.model", "eA== 0\n"))),
    held("a file that is named like an argument", (TOKENIZER, write("vocab_file", "eA== 0\n"))),
    held("a template that runs", (TOKENIZER, write("chat_template.jinja", "{{ cycler.__init__.__globals__.os }}"))),
    held("a map with files", (TOKENIZER, edit_json("special_tokens_map.json", vocab_file="/etc/passwd"))),
    refused("auto_map", (TOKENIZER, both(tokens(auto_map=CODE), lambda f: code_in(f, "evil.py"))), "auto_map"),
    refused("another class", (TOKENIZER, tokens(tokenizer_class="EvilTokenizer")), "tokenizer_class='EvilTokenizer'"),
    refused("10^9 sentinels", (TOKENIZER, tokens(extra_ids=10**9)), "extra_ids=1000000000"),
    refused("sentinels a text", (TOKENIZER, tokens(extra_ids="100")), "extra_ids='100'"),
    refused("config a list", (TOKENIZER, write("tokenizer_config.json", "[]")), "not an object"),
    refused("config nested", (TOKENIZER, write("tokenizer_config.json", DEEP)), "nested deeper"),
    refused("config missing", (TOKENIZER, replace("tokenizer_config.json", lambda path: None)), "does not exist"),
    refused("map a list", (TOKENIZER, write("special_tokens_map.json", "[]")), "special_tokens_map.json"),
    refused("added tokens a list", (TOKENIZER, write("added_tokens.json", "[]")), "added_tokens.json"),
    refused("decoder a list", (TOKENIZER, tokens(added_tokens_decoder=[1])), "cannot be loaded"),
    refused("decoder of numbers", (TOKENIZER, tokens(added_tokens_decoder={"1": 1})), "cannot be loaded"),
    refused("no pad", (TOKENIZER, both(tokens(pad_token=None), edit_json("special_tokens_map.json", pad_token=None))),
            "pad"),
    refused("a token that the encoder has not", (TOKENIZER, write("added_tokens.json", '{"evil":280}')), "280"),
    refused("no vocabulary", (TOKENIZER, replace("spiece.model", lambda path: None)), "spiece.model"),
    refused("an empty vocabulary", (TOKENIZER, write("spiece.model", b"")), "spiece.model", "empty"),
    refused("a broken vocabulary", (TOKENIZER, write("spiece.model", b"\x0a\xff\xff\xff\xff\x0f" * 100)), "tokenizer"),
    refused("a pickle as vocabulary", (TOKENIZER, lambda f: pickle_in(f, "spiece.model")), "tokenizer"),
    refused("a FIFO", (TOKENIZER, replace("spiece.model", os.mkfifo)), "spiece.model", "not a regular file"),
    refused("a device", (TOKENIZER, replace("spiece.model", lambda p: p.symlink_to("/dev/zero"))), "not a regular"),
    refused("a vocabulary of a terabyte", (TOKENIZER, replace("spiece.model", sparse(1 << 40))), str(1 << 40)),
    refused("tokenizer.json broken", (TOKENIZER, write("tokenizer.json", '{"model":3}')), "tokenizer"),
    refused("tokenizer.json nested", (TOKENIZER, write("tokenizer.json", DEEP)), "tokenizer"),
]  # fmt: skip
schedule = lambda **fields: edit_json("scheduler_config.json", **fields)  # noqa: E731
SCHEDULERS = [
    held("as it is", (SCHEDULER, lambda folder: None)),
    held("fields of others", (SCHEDULER, schedule(_name_or_path="/etc", auto_map=CODE, solver_type="evil"))),
    refused("10^12 steps", (SCHEDULER, schedule(num_train_timesteps=10**12)), "num_train_timesteps="),
    refused("-1 steps", (SCHEDULER, schedule(num_train_timesteps=-1)), "num_train_timesteps=-1"),
    refused("steps a text", (SCHEDULER, schedule(num_train_timesteps="1000")), "num_train_timesteps='1000'"),
    refused("beta NaN", (SCHEDULER, schedule(beta_start=math.nan)), "NaN"),
    refused("beta inf", (SCHEDULER, schedule(beta_end=math.inf)), "Infinity"),
    refused("beta negative", (SCHEDULER, schedule(beta_start=-0.1)), "beta_start=-0.1"),
    refused("beta 2", (SCHEDULER, schedule(beta_end=2)), "beta_end=2"),
    refused("betas of texts", (SCHEDULER, schedule(trained_betas=["x"])), "trained_betas='x'"),
    refused("betas 2", (SCHEDULER, schedule(trained_betas=[0.1, 2.0])), "trained_betas=2.0"),
    refused("betas of nothing", (SCHEDULER, schedule(trained_betas=[])), "trained_betas=[]"),
    refused("200,000 betas", (SCHEDULER, schedule(trained_betas=[0.1] * 200_000)), "trained_betas="),
    refused("shift 0", (SCHEDULER, schedule(snr_shift_scale=0)), "snr_shift_scale=0"),
    refused("shift 1e300", (SCHEDULER, schedule(snr_shift_scale=1e300)), "snr_shift_scale=1e+300"),
    refused("an unknown schedule", (SCHEDULER, schedule(beta_schedule="evil")), "beta_schedule='evil'"),
    refused("a prediction in a list", (SCHEDULER, schedule(prediction_type=["v_prediction"])), "prediction_type="),
    refused("one step", (SCHEDULER, schedule(num_train_timesteps=1)), "not finite"),
    refused("nested", (SCHEDULER, write("scheduler_config.json", DEEP)), "nested deeper"),
    refused("a FIFO", (SCHEDULER, replace("scheduler_config.json", os.mkfifo)), "not a regular file"),
]  # fmt: skip


def load(part: str, folder: Path) -> list[torch.Tensor]:
    """What a part of the model comes down to."""
    if part == SCHEDULER:
        alphas = noise_levels(folder.parent).signal_L
        sampler = load_scheduler(folder.parent, SamplerSettings("ddim", 2, 6.0))
        return [alphas, sampler.alphas_cumprod, sampler.timesteps]
    if part == TOKENIZER:
        tokenizer = load_tokenizer(folder, VOCABULARY)
        tokens = tokenizer(["a rabbit <extra_id_0> </s>", ""], padding="max_length", max_length=20)
        return [torch.tensor(tokens.input_ids)]
    if part == DIT:
        read_text_length(folder.parent)
        return list(load_backbone(folder.parent, torch.float32).state_dict().values())
    loader = load_text_encoder if part == T5 else load_vae
    return list(loader(folder, torch.float32).state_dict().values())


@pytest.fixture(scope="module")
def expected(tiny_model_5b: Path) -> dict[str, list[torch.Tensor]]:
    return {part: load(part, tiny_model_5b / part) for part in (DIT, T5, VAE, TOKENIZER, SCHEDULER)}


@pytest.fixture
def little_memory() -> Iterator[None]:
    """What a config claims must be refused before this much address space is taken for it."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + (2 << 30), limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, limits)


CASES = [*TEXT_ENCODERS, *INDEXES, *VAES, *TRANSFORMERS, *TOKENIZERS, *SCHEDULERS]


@pytest.mark.usefixtures("little_memory")
@attacks(CASES)
def test_model_folders(
    attack: Attack, tmp_path: Path, tiny_model_5b: Path, expected: dict[str, list[torch.Tensor]]
) -> None:
    part, edit = attack.content
    folder = tmp_path / "model" / part
    shutil.copytree(tiny_model_5b / part, folder)
    edit(folder)

    def run() -> dict[str, str]:
        found = load(part, folder)
        assert len(found) == len(expected[part])
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected[part], strict=True))
        return {}

    check_ending(attack, run)
    assert not marker_of(folder).exists(), "code of the folder ran"
    if attack.ending is Ending.HELD:
        assert not list(tmp_path.glob("**/__pycache__"))


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: path.symlink_to("/dev/zero")])
def test_a_fingerprint_is_of_files(make: Callable[[Path], object], tmp_path: Path) -> None:
    make(tmp_path / "config.json")
    with pytest.raises(ValueError, match=r"config\.json"):
        component_digest(tmp_path, write_cache=False)


def test_a_tokenizer_that_the_library_saved_is_read_as_by_it(tiny_model_5b: Path, tmp_path: Path) -> None:
    """With a tokenizer.json, added tokens and every field that the library writes."""
    from transformers import T5Tokenizer

    theirs = T5Tokenizer.from_pretrained(tiny_model_5b / TOKENIZER)
    theirs.add_tokens(["<new>"])
    theirs.save_pretrained(tmp_path)
    for file in ("spiece.model", "special_tokens_map.json"):
        shutil.copyfile(tiny_model_5b / TOKENIZER / file, tmp_path / file)
    theirs, ours = T5Tokenizer.from_pretrained(tmp_path), load_tokenizer(tmp_path, 2 * VOCABULARY)
    texts = ["a rabbit <extra_id_3> <new></s> wakes  up", "", "Ünïcödé — 兎\n\ttab"]
    assert ours(texts).input_ids == theirs(texts).input_ids
    assert ours.get_vocab() == theirs.get_vocab()
