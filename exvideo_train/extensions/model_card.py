"""README.md beside an exported adapter: what it was made of, and how to load it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from exvideo_train.errors import UserError
from exvideo_train.files import atomic_write_text
from exvideo_train.models.hub import is_hub_id
from exvideo_train.terminal import escaped

CARD = "README.md"
# By which a card that may be written again is known.
MARK = "<!-- written by exvideo_train.export -->"
_OTHERS = "python -m exvideo_train.adapter convert adapter={file} format={format} output=FILE.safetensors"
_LOADING = {
    "diffusers": (
        "diffusers",
        "```python\nimport torch\nfrom diffusers import DiffusionPipeline\n\n"
        "pipeline = DiffusionPipeline.from_pretrained({base}, torch_dtype=torch.bfloat16)\n"
        "pipeline.load_lora_weights({folder_or_repo}, weight_name={name})\n```",
    ),
    "diffsynth": (
        "DiffSynth-Studio (1.1.9 and older)",
        "```python\nmodel_manager.load_lora({name}, lora_alpha=1.0)  # after the base model's weights\n```",
    ),
    "comfyui": (
        "ComfyUI",
        "Put {code} into ComfyUI's folder of LoRA files and choose it in the model's LoRA node, strength 1.",
    ),
    "kohya": (
        "programs that read Kohya's names",
        "Put {code} among the program's LoRA files; alpha stands in the file, strength 1 is as trained.",
    ),
    "peft": (
        "PEFT",
        "```python\nfrom peft import PeftModel\n\n"
        "network = PeftModel.from_pretrained(network, {folder_or_repo})  # the base model's network\n```",
    ),
}


def card_of(adapter: Path) -> Path:
    """The card's place, before the adapter is written.

    Raises:
        UserError: a README.md of somebody else's is there.
    """
    path = adapter.with_name(CARD)
    try:
        if path.exists() and MARK not in path.read_text(encoding="utf-8", errors="replace"):
            raise UserError(f"card=true would write over {path}; export into another folder")
    except OSError as error:
        raise UserError(f"card=true: {path} cannot be read ({error.strerror}); export into another folder") from error
    return path


def write_card(
    adapter: Path, format: str, about: Mapping[str, Any], facts: Mapping[str, Any], repo: str, curves: str
) -> None:
    """Write the card.

    Args:
        adapter: the file that it is about, which is there already.
        about: its provenance.
        facts: lines of the table besides those.
        repo: where it will be pushed, ``owner/name``; may be empty.
        curves: a picture's name beside it; may be empty.
    """
    base = str(about.get("base_model", "not stated"))
    size = f"{about.get('num_frames')} frames of {about.get('height')}x{about.get('width')} at {about.get('fps')} fps"
    table = {
        "base model": base,
        "trained at": size,
        "steps": about.get("steps", "not stated"),
        "weights": about.get("weights", "raw"),
        **facts,
        "made with": f"exvideo-train {about.get('version')}, commit {about.get('commit')}",
    }
    # YAML reads JSON's texts; a folder is no base model that a hub could link.
    head = {"tags": ["lora", "video", "exvideo"], **({"base_model": base} if is_hub_id(base) else {})}
    lines = ["---", *(f"{name}: {json.dumps(value)}" for name, value in head.items()), "---", MARK, ""]
    lines += [f"# {_plain(adapter.stem)}", "", f"An adapter that makes {_code(base)} produce {_plain(size)}.", ""]
    lines += ["| | |", "|---|---|", *(f"| {name} | {_code(value)} |" for name, value in table.items()), ""]
    if curves:
        lines += [f"![Curves of the training](<{curves}>)", ""]
    lines += ["The base model's licence holds for its weights; read it before you publish what is made with them.", ""]
    names = {"base": base, "name": adapter.name, "folder_or_repo": repo or str(adapter.parent)}
    values = {name: json.dumps(value) for name, value in names.items()} | {"code": _code(adapter.name)}
    for kind in dict.fromkeys((format, "diffusers", "diffsynth", "comfyui")):
        title, text = _LOADING[kind]
        lines += [f"## In {title}", ""]
        if kind != format:
            command = _OTHERS.format(file=_plain(adapter.name), format=kind)
            lines += [f"This file is for {_LOADING[format][0]}. Convert it first:", "", "```", command, "```", ""]
        lines += [text.format_map(values), ""]
    atomic_write_text(adapter.with_name(CARD), "\n".join(lines))


def _plain(text: Any) -> str:
    """On one line and without marks that end or begin anything in Markdown."""
    return re.sub(r"[`<>\[\]|\\\s]+", " ", escaped(str(text))).strip()


def _code(text: Any) -> str:
    return f"`{_plain(text)}`"
