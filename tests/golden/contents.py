"""What the commands' files hold, read with libraries alone, so that a recording outlives changes inside the package."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import av
import torch

# Figures of a training record that are times or memory of this machine.
MEASURED = ("speed",)
OPTION = re.compile(r"  (?P<name>[a-z][\w.]*) = (?P<value>.*)")
CHOICES = re.compile(r"  (?P<name>[a-z_]+): (?P<choices>.*)")


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def tensor(value: torch.Tensor) -> dict[str, Any]:
    """Type, shape, digest, and figures that tell how far two differ whose digests do."""
    value = value.detach().cpu().contiguous()
    number = value.double().reshape(-1)
    return {
        "dtype": str(value.dtype).removeprefix("torch."),
        "shape": list(value.shape),
        "sha256": sha256(value.reshape(-1).view(torch.uint8).numpy().tobytes()),
        "mean": number.mean().item(),
        "norm": number.norm().item(),
        "values": number[:: max(1, number.numel() // 8)][:8].tolist(),
    }


def safetensors(path: Path) -> dict[str, Any]:
    """Tensors in the file's order, metadata without its order, which is random, and the commit, which moves."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header: dict[str, Any] = json.loads(content[8 : 8 + length])
    metadata = {name: _json_or_text(text) for name, text in header.pop("__metadata__", {}).items()}
    if isinstance(about := metadata.get("exvideo_train"), dict):
        about.pop("commit", None)
    data = content[8 + length :]
    tensors = {}
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        first, last = entry["data_offsets"]
        tensors[name] = {"dtype": entry["dtype"], "shape": entry["shape"], "sha256": sha256(data[first:last])}
    return {"order": list(tensors), "tensors": tensors, "metadata": metadata, "data_sha256": sha256(data)}


def _json_or_text(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def store(folder: Path) -> dict[str, Any]:
    """Every file of a latent store outside its reports, whole."""
    files = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}
    kept = {name: path for name, path in files.items() if not name.startswith("reports/")}
    return {
        "files": {name: sha256(path.read_bytes()) for name, path in kept.items()},
        "store.json": json.loads((folder / "store.json").read_text()),
        "index": [json.loads(line) for line in (folder / "index.jsonl").read_text().splitlines()],
        "headers": {name: safetensors(path)["metadata"] for name, path in kept.items() if path.suffix != ".json"
                    and path.suffix != ".jsonl"},
    }  # fmt: skip


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """A run's records without times."""
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in record.items() if name not in MEASURED} for record in records]


def run(run_dir: Path) -> dict[str, Any]:
    """A run folder: records, config, every checkpoint, the adapters at its end."""
    checkpoints = {}
    for folder in sorted((run_dir / "checkpoints").iterdir()):
        state = json.loads((folder / "state.json").read_text())
        # Its records hold times.
        state["sha256"].pop("metrics.jsonl")
        files = {path.name: safetensors(path) for path in sorted(folder.glob("*.safetensors"))}
        checkpoints[folder.name] = {"names": sorted(path.name for path in folder.iterdir()), "state": state, **files}
    return {
        "names": sorted(path.name for path in run_dir.iterdir()),
        "metrics": metrics(run_dir),
        "config.yaml": (run_dir / "config.yaml").read_text(),
        "checkpoints": checkpoints,
        "adapters": {path.name: safetensors(path) for path in sorted(run_dir.glob("*.safetensors"))},
    }


def video(path: Path) -> dict[str, Any]:
    """What a video is and says of itself, without its pictures: x264 has been seen to write others from equal ones.

    They are known before they are written: from the VAE.
    """
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        return {
            "num_frames": sum(1 for _ in container.decode(stream)),
            "size": [stream.height, stream.width],
            "rate": str(stream.average_rate),
            "codec": stream.codec_context.name,
        }


def folder_of_videos(folder: Path) -> dict[str, Any]:
    """What a sampling run leaves."""
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    records = {name: json.loads((folder / name).read_text()) for name in names if name.endswith(".json")}
    for record in records.values():
        # Versions and paths of this machine, and the commit, which moves.
        del record["made_by"], record["model"]
        for adapter in record["adapters"]:
            del adapter["sha256"]
            adapter["provenance"].pop("commit", None)
    return {"names": names, "records": records, **{n: video(folder / n) for n in names if n.endswith(".mp4")}}


def lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def report_text(path: Path) -> list[str]:
    """The words of an HTML page, without pictures, charts and style."""
    page = re.sub(r"<(style|svg|script|head)\b.*?</\1>", "", path.read_text(), flags=re.DOTALL)
    return [text for part in re.sub(r"<[^>]*>", "\n", page).split("\n") if (text := part.strip())]


def options(help_text: str) -> dict[str, Any]:
    """Choices and options of a ``--help``, with defaults and types, in order and without the words below them."""
    choices = dict(m.group("name", "choices") for line in help_text.splitlines() if (m := CHOICES.fullmatch(line)))
    found = [m.group("name", "value") for line in help_text.splitlines() if (m := OPTION.fullmatch(line))]
    return {"choices": choices, "order": [name for name, _ in found], "options": dict(found)}


def differences(one: Any, other: Any, where: str = "") -> list[str]:
    """Every place in which two recordings differ, a line each."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        found = []
        for name in dict.fromkeys([*one, *other]):
            at = f"{where}/{name}"
            if name not in one or name not in other:
                found.append(f"{at}: only in the {'second' if name in other else 'first'}")
            else:
                found += differences(one[name], other[name], at)
        return found
    if isinstance(one, list) and isinstance(other, list):
        if all(isinstance(entry, str) for entry in [*one, *other]) and set(one) != set(other):
            gone, come = ([entry for entry in a if entry not in b] for a, b in ((one, other), (other, one)))
            return [f"{where}: only in the first {gone} | only in the second {come}"]
        found = [] if len(one) == len(other) else [f"{where}: {len(one)} entries | {len(other)} entries"]
        for index, (first, second) in enumerate(zip(one, other, strict=False)):
            found += differences(first, second, f"{where}/{index}")
        return found
    # NaN equals NaN here, and 1 is not 1.0: the text is what counts.
    return [] if json.dumps(one) == json.dumps(other) else [f"{where}: {one!r} | {other!r}"]
