"""Target: the JSON files of a model folder from elsewhere, and the headers of its weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch

from exvideo_train.errors import UserError
from exvideo_train.models.cogvideox.encoder_weights import load_text_encoder, load_tokenizer, load_vae
from exvideo_train.models.cogvideox.encoding import read_text_length
from exvideo_train.models.cogvideox.objective import noise_levels
from exvideo_train.models.cogvideox.sampler import load_scheduler
from exvideo_train.models.cogvideox.tiny import write_tiny_model
from exvideo_train.models.registry import load_backbone
from exvideo_train.models.stages import SamplerSettings
from fuzz.mutations import Mutator
from fuzz.running import Case, Rows, Target
from fuzz.weights import TensorFile


def model_folder(folder: Path) -> Case:
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = write_tiny_model(folder / "model", "5b")
    vocabulary = json.loads((model / "text_encoder" / "config.json").read_text())["vocab_size"]
    sampler = SamplerSettings("ddim", 2, 6.0)
    loaders: dict[str, Callable[[], object]] = {
        "transformer": lambda: (read_text_length(model), load_backbone(model, torch.float32)),
        "text_encoder": lambda: load_text_encoder(model / "text_encoder", torch.float32),
        "vae": lambda: load_vae(model / "vae", torch.float32),
        "tokenizer": lambda: load_tokenizer(model / "tokenizer", vocabulary),
        "scheduler": lambda: (
            noise_levels(model),
            load_scheduler(model, sampler),
        ),
    }
    files = [path for part in loaders for path in sorted((model / part).iterdir()) if path.suffix != ".model"]
    whole = {path: path.read_bytes() for path in files}

    def case(mutator: Mutator) -> Rows:
        _, path = mutator.among(files)
        is_json = path.suffix == ".json"
        path.write_bytes(mutator.json(json.loads(whole[path])) if is_json else TensorFile(path).mutated(mutator))
        try:
            loaders[path.parent.name]()
        finally:
            path.write_bytes(whole[path])
        return Rows(1)

    return case


TARGETS = [Target("model_folder", (UserError,), model_folder, 3_000)]
