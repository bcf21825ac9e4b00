"""The whole road as a user walks it: each command a process, from a clip of the example video to the two videos."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from exvideo_train.training.loggers import read_metrics

EXAMPLE = "bigbuckbunny"


def write_internvid(path: Path) -> None:
    """Two spans of the example, cut out of it by their times."""
    spans = [("00:00:00.000", "00:00:05.200"), ("00:00:00.080", "00:00:05.280")]
    rows = [
        {
            "YoutubeID": EXAMPLE,
            "Start_timestamp": start,
            "End_timestamp": end,
            "Caption": f"A rabbit on a meadow, take {number}.",
            "Aesthetic_Score": 5.1,
            "UMT_Score": 0.4,
        }
        for number, (start, end) in enumerate(spans)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_panda70m(path: Path) -> None:
    """The same spans in one row, lists as strings."""
    with open(path, "w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["videoID", "url", "timestamp", "caption", "matching_score"])
        spans = "[['0:00:00.000', '0:00:05.200'], ['0:00:00.080', '0:00:05.280']]"
        writer.writerow([EXAMPLE, "", spans, "['A rabbit, take 0.', 'A rabbit, take 1.']", "[0.45, 0.46]"])


@pytest.mark.parametrize(
    ("source", "write_metadata", "metadata", "num_frames", "fps"),
    [
        pytest.param("internvid", write_internvid, "meta.jsonl", 129, 25, id="internvid-129f"),
        pytest.param("panda70m", write_panda70m, "meta.csv", 33, 8, id="panda70m-33f"),
    ],
)
def test_five_commands(
    source: str,
    write_metadata: Callable[[Path], None],
    metadata: str,
    num_frames: int,
    fps: int,
    run_command: Callable[..., Any],
    tiny_model_5b: Path,
    clip_path: Path,
    tmp_path: Path,
) -> None:
    write_metadata(tmp_path / metadata)
    experiment = ["+exp=demo", f"model.path={tiny_model_5b}", f"num_frames={num_frames}", f"fps={fps}"]
    manifest, latents, run_dir, videos = (tmp_path / name for name in ("clips.jsonl", "latents", "run", "videos"))
    adapters = {name: tmp_path / f"{name}.safetensors" for name in ("diffusers", "diffsynth")}

    build = ["data_prep/build_manifest.py", f"source={source}", f"metadata={tmp_path / metadata}"]
    run_command([*build, f"videos={clip_path.parent}", f"manifest={manifest}"])
    clips = [json.loads(line) for line in manifest.read_text().splitlines()]
    assert len({clip["clip_id"] for clip in clips}) == 2

    run_command(["data_prep/encode_latents.py", *experiment, f"manifest={manifest}", f"latents={latents}"])
    indexed = [json.loads(line)["clip_id"] for line in (latents / "index.jsonl").read_text().splitlines()]
    assert indexed == sorted(clip["clip_id"] for clip in clips)

    train = ["deepspeed", "--num_gpus", "2", "launch/train.py", *experiment]
    run_command([*train, f"latents={latents}", f"run_dir={run_dir}", "max_steps=3"])
    assert [record["step"] for record in read_metrics(run_dir) if "loss" in record] == [1, 2, 3]

    for name, path in adapters.items():
        run_command(["-m", "exvideo_train.export", f"run_dir={run_dir}", f"format={name}", f"adapter={path}"])
    trained = load_file(adapters["diffusers"])
    assert max(tensor.abs().max() for name, tensor in trained.items() if "lora_B" in name) > 0
    for name, tensor in load_file(run_dir / "adapter.safetensors").items():
        assert torch.equal(trained[name], tensor)
    with safe_open(adapters["diffsynth"], framework="pt") as file:
        assert all(name.startswith("blocks.") for name in file.keys())  # noqa: SIM118
        provenance = json.loads(file.metadata()["exvideo_train"])
    assert (provenance["num_frames"], provenance["steps"], provenance["rank"]) == (num_frames, 3, 8)

    sample = ["-m", "exvideo_train.sample", *experiment, f"adapter={adapters['diffusers']}", "num_inference_steps=2"]
    run_command([*sample, "prompt=A rabbit, yawning: slowly", "compare=true", f"output={videos}"])
    for variant in ("with_adapter", "without_adapter"):
        (path,) = (videos / variant).glob("*.mp4")
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            assert (stream.height, stream.width, stream.average_rate) == (64, 96, fps)
            assert sum(1 for _ in container.decode(stream)) == num_frames
