"""CLIP, DINO's ViT and Dinov2 of random weights and a few channels, in the layout of the hub."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTokenizer,
    Dinov2Config,
    Dinov2Model,
    ViTConfig,
    ViTModel,
)

CLIP_SIDE, TEXT_LENGTH = 32, 12
_SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def write_clip(folder: Path) -> Path:
    letters = "abcdefghijklmnopqrstuvwxyz"
    pieces = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    tokenizer = CLIPTokenizer(vocab={piece: number for number, piece in enumerate(pieces)}, merges=[])
    tokenizer.save_pretrained(folder)
    text = {
        **_SMALL,
        "intermediate_size": 64,
        "vocab_size": len(pieces),
        "max_position_embeddings": TEXT_LENGTH,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
    }
    vision = {**_SMALL, "intermediate_size": 64, "image_size": CLIP_SIDE, "patch_size": 8}
    return _write(CLIPModel, CLIPConfig(text_config=text, vision_config=vision, projection_dim=16), folder)


def write_dino(folder: Path) -> Path:
    return _write(ViTModel, ViTConfig(**_SMALL, intermediate_size=64, image_size=224, patch_size=32), folder)


def write_dinov2(folder: Path) -> Path:
    return _write(Dinov2Model, Dinov2Config(**_SMALL, mlp_ratio=2, image_size=70, patch_size=14), folder)


def _write(kind: type, config: object, folder: Path) -> Path:
    torch.manual_seed(0)
    model = kind(config)
    for name, parameter in model.named_parameters():
        # Initial weights are so small, and biases so large beside them, that all pictures look alike.
        is_constant = name.endswith(("bias", "cls_token", "class_embedding"))
        torch.nn.init.normal_(parameter, std=0.01 if is_constant else 0.6)
    model.save_pretrained(folder)
    return folder
