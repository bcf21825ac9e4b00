"""T5, its tokenizer and the 3D VAE from their published folders, with the libraries' networks but not their loaders.

The loaders of transformers and diffusers let a folder choose: adapters beside the weights, an attention from a hub,
pickled weights, other tokenizer files. Here a config gives sizes, weights are the safetensors beside it, and a
tokenizer is the files of its list.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from exvideo_train.errors import UserError
from exvideo_train.files import read_regular, short
from exvideo_train.models import component, config_file
from exvideo_train.models.config_file import FETCH

# Bounds are an order of magnitude around T5-XXL and the published VAE.
_T5_BOUNDS: dict[str, tuple[float, float]] = {
    "vocab_size": (1, 1 << 20),
    "d_model": (1, 1 << 16),
    "d_kv": (1, 1 << 12),
    "d_ff": (1, 1 << 18),
    "num_layers": (1, 256),
    "num_heads": (1, 1024),
    "relative_attention_num_buckets": (4, 4096),
    "relative_attention_max_distance": (4, 1 << 20),
    "layer_norm_epsilon": (1e-12, 1.0),
}
_VAE_BOUNDS: dict[str, tuple[float, float]] = {
    "in_channels": (3, 3),
    "out_channels": (3, 3),
    "latent_channels": (1, 1024),
    "layers_per_block": (1, 64),
    "norm_num_groups": (1, 1024),
    "norm_eps": (1e-12, 1.0),
    "temporal_compression_ratio": (1.0, 64.0),
    "sample_height": (16, 1 << 14),
    "sample_width": (16, 1 << 14),
    "scaling_factor": config_file.SCALING_FACTOR_BOUNDS,
}
_VAE_BLOCKS = {"down_block_types": "CogVideoXDownBlock3D", "up_block_types": "CogVideoXUpBlock3D"}
# Fields that the network takes as they are: names and switches, and what only pipelines use.
_VAE_OTHER = (
    *("act_fn", "use_quant_conv", "use_post_quant_conv", "force_upcast", "invert_scale_latents"),
    *("shift_factor", "latents_mean", "latents_std"),
)
# mT5's sentencepiece model of 250,000 pieces has 4 MB, its tokenizer.json 16 MB.
_VOCABULARY_BYTES = {"spiece.model": 64 << 20, "tokenizer.json": 64 << 20}
# What T5's tokenizer may be told. The library takes every other field as an argument too, such as names of files.
_TOKENIZER_FIELDS = {
    *("add_prefix_space", "added_tokens_decoder", "additional_special_tokens", "bos_token", "cls_token"),
    *("clean_up_tokenization_spaces", "eos_token", "extra_ids", "extra_special_tokens", "legacy", "mask_token"),
    *("model_max_length", "pad_token", "padding_side", "sep_token", "split_special_tokens", "truncation_side"),
    "unk_token",
}


def load_text_encoder(folder: Path, dtype: torch.dtype, device: torch.device | str = "cpu") -> Any:
    """T5's encoder from a ``text_encoder/`` folder, each tensor straight onto the device: 9.5 GB for XXL in bf16.

    Raises:
        UserError: anything missing, unexpected, misshaped or truncated, before any memory is taken.
    """
    from transformers import T5Config, T5EncoderModel

    path = _folder(folder) / "config.json"
    fields = config_file.read_config(path)
    config_file.check_class(fields, "model_type", ("t5",), path)
    config_file.check_bounds(fields, _T5_BOUNDS, path)
    shape = {name: fields[name] for name in (*_T5_BOUNDS, "feed_forward_proj", "tie_word_embeddings") if name in fields}
    with _refused(path):
        # Of the class alone, whatever the file says of attention: it could name code on a hub.
        config = T5Config(**shape)
        if config.relative_attention_max_distance <= config.relative_attention_num_buckets:
            raise ValueError("relative_attention_max_distance is not above relative_attention_num_buckets")
        with torch.device("meta"):
            model = T5EncoderModel(config)
    files = component.locate_tensors(folder, "model")
    # One matrix under two names, of which files have either or both; a whole T5 has a decoder, which is not used.
    shared, tied = "shared.weight", "encoder.embed_tokens.weight"
    embedding, other = (shared, tied) if shared in files else (tied, shared)
    files = {name: file for name, file in files.items() if name != other and not name.startswith("decoder.")}
    parameters = dict(model.named_parameters())
    parameters[embedding] = parameters.pop(shared)
    component.check_tensors(folder, parameters, files)
    tensors = dict(component.read_tensors(files))
    tensors[shared] = tensors.pop(embedding)
    with _refused(folder):
        # The library's own way from tensors to a network knows which of them stay in float32.
        return T5EncoderModel.from_pretrained(
            None, config=config, state_dict=tensors, dtype=dtype, device_map={"": torch.device(device)}
        )


def load_tokenizer(folder: Path, vocabulary_size: int) -> Any:
    """T5's tokenizer from a ``tokenizer/`` folder.

    Args:
        vocabulary_size: rows of the text encoder's embedding.

    Raises:
        UserError: a file is missing, too large or broken, or gives tokens that the text encoder has no row for.
    """
    from transformers import T5Tokenizer

    path = _folder(folder) / "tokenizer_config.json"
    fields = config_file.read_config(path)
    config_file.check_class(fields, "tokenizer_class", ("T5Tokenizer", "T5TokenizerFast", None), path)
    config_file.check_bounds(fields, {"extra_ids": (0, 10_000)}, path)
    # A folder of checked files: of the real one the library would also take files of names that it or a config knows.
    with tempfile.TemporaryDirectory(prefix="exvideo_tokenizer_") as name, _refused(folder):
        view = Path(name)
        for file in ("tokenizer_config.json", "special_tokens_map.json"):
            if (folder / file).exists():
                fields = {k: v for k, v in config_file.read_config(folder / file).items() if k in _TOKENIZER_FIELDS}
                (view / file).write_text(json.dumps(fields))
        if (folder / "added_tokens.json").exists():
            (view / "added_tokens.json").write_text(json.dumps(config_file.read_config(folder / "added_tokens.json")))
        for file, max_bytes in _VOCABULARY_BYTES.items():
            if (folder / file).exists():
                if not read_regular(folder / file, max_bytes):
                    raise UserError(f"{folder / file} is empty; {FETCH}")
                # A link, as a copy of megabytes could meet a full disk.
                (view / file).symlink_to((folder / file).resolve())
        if not any((view / file).exists() for file in _VOCABULARY_BYTES):
            raise UserError(f"{folder}: has neither {' nor '.join(_VOCABULARY_BYTES)}; {FETCH}")
        tokenizer = T5Tokenizer.from_pretrained(view, local_files_only=True)
        if tokenizer.pad_token_id is None:
            raise UserError(f"{folder}: has no pad_token; {FETCH}")
        highest = max(tokenizer.get_vocab().values(), default=0)
    if highest >= vocabulary_size:
        raise UserError(f"{folder}: has token {highest}, but the text encoder knows {vocabulary_size}; {FETCH}")
    return tokenizer


def load_vae(folder: Path, dtype: torch.dtype) -> Any:
    """The causal 3D VAE from a ``vae/`` folder, on the CPU.

    Raises:
        UserError: anything missing, unexpected, misshaped or truncated, before any memory is taken.
    """
    from diffusers import AutoencoderKLCogVideoX

    path = _folder(folder) / "config.json"
    fields = config_file.read_config(path)
    config_file.check_class(fields, "_class_name", ("AutoencoderKLCogVideoX",), path)
    config_file.check_bounds(fields, _VAE_BOUNDS, path)
    _check_vae_blocks(fields, path)
    names = (*_VAE_BOUNDS, *_VAE_BLOCKS, "block_out_channels", *_VAE_OTHER)
    with _refused(path), torch.device("meta"):
        vae: Any = AutoencoderKLCogVideoX(**{name: fields[name] for name in names if name in fields})
    component.fill(vae, folder, "diffusion_pytorch_model", dtype, "cpu")
    return vae.eval()


def _check_vae_blocks(fields: Mapping[str, Any], path: Path) -> None:
    channels = fields.get("block_out_channels", [1])
    if not isinstance(channels, list) or not 1 <= len(channels) <= 8:
        raise UserError(f"{path}: block_out_channels={short(channels)} must be a list of 1 to 8 widths; {FETCH}")
    for width in channels:
        config_file.check_bounds({"block_out_channels": width}, {"block_out_channels": (1, 8192)}, path)
    for name, block in _VAE_BLOCKS.items():
        if name in fields and fields[name] != [block] * len(fields[name] if isinstance(fields[name], list) else [0]):
            raise UserError(f"{path}: {name}={short(fields[name])} must be a list of {block}; {FETCH}")


def _folder(folder: Path) -> Path:
    if not folder.is_dir():
        raise UserError(f"model.path: {folder} does not exist; point model.path to a folder in the published layout")
    return folder


@contextlib.contextmanager
def _refused(source: Path) -> Iterator[None]:
    """Turn whatever a library makes of a broken file into a message; memory that runs out is another matter."""
    try:
        yield
    except (UserError, MemoryError, torch.OutOfMemoryError):
        raise
    except OSError as error:
        raise UserError(
            f"model.path: {source} cannot be loaded ({error.strerror or error}); free space in "
            f"{tempfile.gettempdir()}, or fetch the model again"
        ) from error
    except Exception as error:  # (tokenizers raises Exception itself)
        first_line = (str(error).strip() or type(error).__name__).split("\n")[0]
        raise UserError(f"model.path: {source} cannot be loaded ({first_line[:300]}); fetch the model again") from error
