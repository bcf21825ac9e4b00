"""A complete CogVideoX of one megabyte: the published classes and folder layout, random weights.

For the demo and the tests: every program that reads a published CogVideoX reads this one, on a CPU, fast.

    python -m exvideo_train.models.cogvideox.tiny FOLDER --variant 5b --seed 0
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from exvideo_train.errors import UserError
from exvideo_train.files import atomic_write_json
from exvideo_train.models.cogvideox import published
from exvideo_train.models.cogvideox.tiny_tokenizer import write_tokenizer

if TYPE_CHECKING:
    from torch import nn

Variant = Literal["5b", "2b"]

# Goes up when the same variant and seed give other files: an older folder is not taken for a new one.
LAYOUT_VERSION = 1
MARKER_NAME = "tiny_model.json"

# Latents of 8x12 are 64x96 pixels. With 16 text tokens, 49 and 129 frames give 328 and 808 tokens: both, and
# the 4 heads, divide by the 2 and 4 ranks that sequence parallelism is tested on.
_TRANSFORMER_SIZE: dict[str, Any] = {
    "attention_head_dim": 16,
    "max_text_seq_length": 16,
    "num_attention_heads": 4,
    "sample_height": 8,
    "sample_width": 12,
    "text_embed_dim": 32,
    "time_embed_dim": 32,
}
_NUM_LAYERS = {"5b": 3, "2b": 2}
# Four levels, as published: 8x8 pixels and 4 frames a latent. The widths let a CPU encode 129 frames in a second.
_VAE_SIZE: dict[str, Any] = {
    "block_out_channels": [4, 4, 8, 8],
    "layers_per_block": 1,
    "norm_num_groups": 2,
    "sample_height": 64,
    "sample_width": 96,
}


def write_tiny_model(folder: Path | str, variant: Variant = "5b", seed: int = 0) -> Path:
    """Write a tiny CogVideoX in the published layout and return its folder.

    ``transformer/`` and ``text_encoder/`` are sharded safetensors with an index. As published, the 5b variant is
    rotary, bf16 and scales latents by 0.7; the 2b variant has sin-cos positions, is fp16 and scales by 1.15258426.
    The whole folder appears at once; one that already holds the same tiny model is left as it is.

    Args:
        folder: where to write; new, empty, or holding the same tiny model.
        variant: which published model to be like.
        seed: of the random weights.

    Raises:
        UserError: an unknown variant, or a folder that holds something else.
    """
    folder = Path(folder)
    if variant not in _NUM_LAYERS:
        raise UserError(f"variant={variant!r}: unknown; use variant=5b or variant=2b")
    marker = {"layout_version": LAYOUT_VERSION, "variant": variant, "seed": seed}
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        path = folder / MARKER_NAME
        if path.is_file() and json.loads(path.read_text()) == marker:
            return folder
        raise UserError(f"folder={folder}: holds something else; remove it or name another folder")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    except OSError as error:
        raise UserError(f"folder={folder}: cannot be written ({error.strerror}); choose a writable folder") from error
    try:
        _write_parts(staging, variant, seed)
        atomic_write_json(staging / MARKER_NAME, marker)
        # Temporary folders, and safetensors that the libraries write, are closed to other users.
        staging.chmod(0o755)
        for path in staging.rglob("*.safetensors"):
            path.chmod(0o644)
        if folder.exists():
            folder.rmdir()
        staging.rename(folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return folder


def _write_parts(folder: Path, variant: Variant, seed: int) -> None:
    import torch

    # The caller must not draw other random numbers because a model was written.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vocabulary_size = write_tokenizer(folder / "tokenizer")
        _write_text_encoder(folder / "text_encoder", variant, vocabulary_size)
        _write_vae(folder / "vae", variant)
        _write_transformer(folder / "transformer", variant)
    scheduler = published.SCHEDULER_5B if variant == "5b" else published.SCHEDULER_2B
    atomic_write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    atomic_write_json(
        folder / "model_index.json",
        {
            "_class_name": "CogVideoXPipeline",
            "_diffusers_version": "0.31.0",
            "scheduler": ["diffusers", scheduler["_class_name"]],
            "text_encoder": ["transformers", "T5EncoderModel"],
            "tokenizer": ["transformers", "T5Tokenizer"],
            "transformer": ["diffusers", "CogVideoXTransformer3DModel"],
            "vae": ["diffusers", "AutoencoderKLCogVideoX"],
        },
    )


def _write_transformer(folder: Path, variant: Variant) -> None:
    from diffusers import CogVideoXTransformer3DModel

    config = published.TRANSFORMER_5B if variant == "5b" else published.TRANSFORMER_2B
    sizes = {**_TRANSFORMER_SIZE, "num_layers": _NUM_LAYERS[variant]}
    model = CogVideoXTransformer3DModel(**_arguments(config | sizes))
    randomize(model)
    _saved_dtype(model, variant).save_pretrained(folder, max_shard_size="200KB")


def _write_vae(folder: Path, variant: Variant) -> None:
    from diffusers import AutoencoderKLCogVideoX

    config = published.VAE_5B if variant == "5b" else published.VAE_2B
    model = AutoencoderKLCogVideoX(**_arguments(config | _VAE_SIZE))
    randomize(model)
    _saved_dtype(model, variant).save_pretrained(folder)


def _write_text_encoder(folder: Path, variant: Variant, vocabulary_size: int) -> None:
    from transformers import T5Config, T5EncoderModel

    # t5-v1_1-xxl's shape at a small size: gated GELU, 2 blocks for 24.
    config = T5Config(  # type: ignore[call-arg]
        vocab_size=vocabulary_size,
        d_model=_TRANSFORMER_SIZE["text_embed_dim"],
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        use_cache=False,
    )
    model = T5EncoderModel(config)
    randomize(model)
    _saved_dtype(model, variant).save_pretrained(folder, max_shard_size="40KB")


def _arguments(config: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if not name.startswith("_")}


def _saved_dtype(model: Any, variant: Variant) -> Any:
    import torch

    # The libraries' own `to` warns about parts kept in fp32, of which these models have none.
    return torch.nn.Module.to(model, torch.bfloat16 if variant == "5b" else torch.float16)


def randomize(model: nn.Module | Any) -> None:
    """Draw every parameter anew so that none is zero or one; matrices keep their input's scale.

    Libraries initialise biases with zeros and norms with ones: a wrong use of those would go unseen.
    """
    import torch

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape)
            if parameter.dim() >= 2:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
            elif name.endswith("bias"):
                parameter.copy_(0.1 * noise)
            else:
                parameter.copy_(1 + 0.1 * noise)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry of ``python -m exvideo_train.models.cogvideox.tiny``."""
    parser = argparse.ArgumentParser(
        description="Write a tiny CogVideoX with random weights, in the published folder layout."
    )
    parser.add_argument("folder", type=Path, help="where to write it; must be new or empty")
    parser.add_argument("--variant", choices=sorted(_NUM_LAYERS), default="5b", help="which model to be like")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random weights")
    options = parser.parse_args(arguments)
    try:
        print(write_tiny_model(options.folder, options.variant, options.seed))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
