"""README.md beside an exported adapter: what it was made of, and how to load it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exvideo_train.config.commands import AdapterFormat, CardOptions
from exvideo_train.errors import UserError
from exvideo_train.extensions.adapter_file import PEFT_CONFIG
from exvideo_train.extensions.extension import Trained
from exvideo_train.extensions.publish import check_push, push
from exvideo_train.files import atomic_write_text, parse_json, read_regular
from exvideo_train.models.hub import is_hub_id
from exvideo_train.models.registry import known_licence
from exvideo_train.terminal import escaped

CARD = "README.md"
RESULTS = "results.json"
_MAX_RESULTS_BYTES = 64 << 20
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
    adapter: Path,
    format: str,
    about: Mapping[str, Any],
    facts: Mapping[str, Any],
    licence: str = "",
    repo: str = "",
    curves: str = "",
    verdicts: Sequence[Verdict] = (),
) -> None:
    """Write the card.

    Args:
        adapter: the file that it is about, which is there already.
        about: its provenance.
        facts: lines of the table besides those.
        licence: of the base model, as the hub names it; empty where it is not known.
        repo: where it will be pushed, ``owner/name``; may be empty.
        curves: a picture's name beside it; may be empty.
        verdicts: of an evaluation.
    """
    base = str(about.get("base_model", "not stated"))
    size = f"{about.get('num_frames')} frames of {about.get('height')}x{about.get('width')} at {about.get('fps')} fps"
    table = {
        "base model": base,
        "licence of the base model": licence or "not known here",
        "trained at": size,
        "steps": about.get("steps", "not stated"),
        "weights": about.get("weights", "raw"),
        **facts,
        "made with": f"exvideo-train {about.get('version')}, commit {about.get('commit')}",
    }
    # YAML reads JSON's texts; a folder is no base model that a hub could link.
    head = {"tags": ["lora", "video", "exvideo"], **({"base_model": base} if is_hub_id(base) else {})}
    head |= {"license": licence} if licence else {}
    lines = ["---", *(f"{name}: {json.dumps(value)}" for name, value in head.items()), "---", MARK, ""]
    lines += [f"# {_plain(adapter.stem)}", "", f"An adapter that makes {_code(base)} produce {_plain(size)}.", ""]
    lines += ["| | |", "|---|---|", *(f"| {name} | {_code(value)} |" for name, value in table.items()), ""]
    if curves:
        lines += [f"![Curves of the training](<{curves}>)", ""]
    if verdicts:
        lines += ["## Evaluation", "", "| measure | variant | baseline | difference (95 %) | pairs | verdict |"]
        lines += ["|---|---:|---:|---|---:|---|", *(verdict.as_row() for verdict in verdicts), ""]
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


@dataclass(frozen=True)
class Verdict:
    """One measure of one variant against the baseline, as ``results.json`` has it.

    Attributes:
        title: of the measure, with its unit.
        interval: of the difference; None where there is none.
    """

    title: str
    variant: str
    mean: float
    baseline_mean: float
    difference: float
    interval: tuple[float, float] | None
    num_pairs: int
    verdict: str

    def as_row(self) -> str:
        low_high = f" ({self.interval[0]:.3g} to {self.interval[1]:.3g})" if self.interval else ""
        return (
            f"| {_plain(self.title)} | {_plain(self.variant)}: {self.mean:.4g} | {self.baseline_mean:.4g} | "
            f"{self.difference:+.3g}{low_high} | {self.num_pairs} | {_plain(self.verdict)} |"
        )


def read_verdicts(source: Path) -> list[Verdict]:
    """What ``python -m exvideo_train.evaluate`` found.

    Args:
        source: its ``results.json``, or the folder that holds it.

    Raises:
        UserError: there is none, or it is not what evaluation writes.
    """
    path = source / RESULTS if source.is_dir() else source
    text = read_regular(path, _MAX_RESULTS_BYTES)
    try:
        content = parse_json(text)
        return [
            _verdict(variant, content["measures"][found["measure"]], found)
            for variant, comparisons in content["comparisons"].items()
            for found in comparisons
        ]
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"evaluation={path}: not what evaluate writes ({error}); name its {RESULTS}") from error


def _verdict(variant: str, measure: Mapping[str, Any], found: Mapping[str, Any]) -> Verdict:
    interval = None if found["low"] is None else (float(found["low"]), float(found["high"]))
    title = f"{measure['title']}, {measure['unit']}" if measure["unit"] else str(measure["title"])
    means = (float(found["mean"]), float(found["baseline_mean"]), float(found["difference"]))
    return Verdict(title, variant, *means, interval, int(found["num_pairs"]), str(found["verdict"]))


def finish_card(
    adapter: Path, format: AdapterFormat, options: CardOptions, trained: Trained, facts: Mapping[str, Any], curves: str
) -> None:
    """Write the card of an adapter that is there, and push both if that is asked for; says what it does.

    Args:
        facts: what is known besides its provenance.
        curves: see :func:`write_card`.

    Raises:
        UserError: the evaluation cannot be read, or the hub not be reached.
    """
    about = trained.provenance
    licence = known_licence(str(about.get("base_model", "")))
    verdicts = read_verdicts(Path(options.evaluation)) if options.evaluation else ()
    write_card(adapter, format.value, about, facts, licence, options.push or "", curves, verdicts)
    files = [adapter, adapter.with_name(CARD), *([adapter.with_name(curves)] if curves else [])]
    files += [adapter.with_name(PEFT_CONFIG)] if format is AdapterFormat.peft else []
    print(files[1])
    if options.push:
        print(f"pushed to {push(files, options.push, options.private)}: {', '.join(path.name for path in files)}")


def check_card(adapter: Path, options: CardOptions) -> None:
    """Before the adapter is written.

    Raises:
        UserError: a README.md of somebody else's is there, an evaluation that is none, or no ``owner/name``.
    """
    if options.push is not None:
        check_push(options.push)
    if options.evaluation is not None:
        read_verdicts(Path(options.evaluation))
    if options.card or options.push:
        card_of(adapter)


def _plain(text: Any) -> str:
    """On one line and without marks that end or begin anything in Markdown."""
    return re.sub(r"[`<>\[\]|\\\s]+", " ", escaped(str(text))).strip()


def _code(text: Any) -> str:
    return f"`{_plain(text)}`"
