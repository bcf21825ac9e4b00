"""Puts a tiny model together in the published folder layout, of what the repository keeps or a training has written.

    python examples/tiny/assemble.py sincos MODEL
    python examples/tiny/assemble.py sincos tiny_training --keep

In examples/tiny/weights/ the VAE lies once and each DiT in a folder of its own; text encoder and tokenizer are
functions of a seed and are made anew.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from exvideo_train.errors import UserError
from exvideo_train.files import atomic_write, atomic_write_json
from exvideo_train.models.cogvideox import published

WEIGHTS = Path(__file__).resolve().parent / "weights"
NETWORK_FILE = "diffusion_pytorch_model.safetensors"
SCHEDULER = published.SCHEDULER_5B
MODEL_INDEX = {
    "_class_name": "CogVideoXPipeline",
    "_diffusers_version": "0.31.0",
    "scheduler": ["diffusers", SCHEDULER["_class_name"]],
    "text_encoder": ["transformers", "T5EncoderModel"],
    "tokenizer": ["transformers", "T5Tokenizer"],
    "transformer": ["diffusers", "CogVideoXTransformer3DModel"],
    "vae": ["diffusers", "AutoencoderKLCogVideoX"],
}


def write_model(parts: Path, target: Path, network: object, config: Mapping[str, object]) -> None:
    """Write a whole model of a trained DiT, in bf16, and of the other parts in a folder.

    Args:
        parts: folder with vae/, text_encoder/ and tokenizer/.
        network: the DiT.
        config: its ``transformer/config.json``.
    """
    import torch
    from safetensors.torch import save_file

    assert isinstance(network, torch.nn.Module)
    state = {name: tensor.detach().to(torch.bfloat16).contiguous() for name, tensor in network.state_dict().items()}
    file = target / "transformer" / NETWORK_FILE
    atomic_write(file, lambda temporary: save_file(state, temporary, {"format": "pt"}))
    atomic_write_json(target / "transformer" / "config.json", config)
    for part in ("vae", "tokenizer", "text_encoder"):
        shutil.copytree(parts / part, target / part, dirs_exist_ok=True)
    _write_tables(target)


def assemble(name: str, target: Path, weights: Path = WEIGHTS) -> Path:
    """Write the model ``name`` of the kept weights to a folder, which must not be there yet, and return it.

    Raises:
        UserError: no weights of that name, or the folder is there.
    """
    from captions import write_text_encoder

    if not (weights / name / "config.json").is_file():
        known = sorted({path.parent.name for path in weights.glob("*/config.json")} - {"vae"})
        raise UserError(f"name={name}: there are no such weights in {weights}; known are {known}")
    if target.exists():
        raise UserError(f"folder={target}: is there already; remove it or name another folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        for kept, part in ((name, "transformer"), ("vae", "vae")):
            (staging / part).mkdir()
            for file in ("config.json", NETWORK_FILE):
                shutil.copyfile(weights / kept / file, staging / part / file)
        write_text_encoder(staging)
        _write_tables(staging)
        staging.chmod(0o755)
        staging.rename(target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return target


def keep(folder: Path, name: str, weights: Path = WEIGHTS) -> None:
    """Take what was trained in a folder over into the kept weights, with its curves: what `assemble` is made for."""
    from curves import write_curve

    model = folder / f"{name}_49"
    for part, training, target in (("vae", "vae", weights / "vae"), ("transformer", model.name, weights / name)):
        target.mkdir(parents=True, exist_ok=True)
        for file in ("config.json", NETWORK_FILE):
            shutil.copyfile(model / part / file, target / file)
        write_curve(folder / f"{training}_training", target)


def _write_tables(target: Path) -> None:
    atomic_write_json(target / "scheduler" / "scheduler_config.json", SCHEDULER)
    atomic_write_json(target / "model_index.json", MODEL_INDEX)


def main() -> int:
    """Entry of ``python examples/tiny/assemble.py``."""
    parser = argparse.ArgumentParser(description="Write a trained tiny model in the published folder layout.")
    parser.add_argument("name", help="sincos or rotary: a folder of examples/tiny/weights")
    parser.add_argument("folder", type=Path, help="where to write the model; with --keep, where it was trained")
    parser.add_argument("--keep", action="store_true", help="take what was trained, and its curves, over into weights/")
    options = parser.parse_args()
    try:
        if options.keep:
            keep(options.folder, options.name)
        else:
            print(assemble(options.name, options.folder))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
