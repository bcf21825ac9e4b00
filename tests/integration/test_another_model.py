"""A family of the tests' own down the whole road, by the ordinary commands: nothing outside its file knows it."""

from __future__ import annotations

import json
import subprocess
import sys
from io import BytesIO
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from support import with_flipbook
from support.flipbook import Flipbook
from support.ranks import Ranks, environment, finished

from exvideo_train.training.loggers import read_metrics

WITH_FLIPBOOK = Path(with_flipbook.__file__)
# No number of frames that CogVideoX takes.
FRAMES, STEPS = 11, 6


@pytest.fixture(scope="module")
def road(tmp_path_factory: pytest.TempPathFactory, clip_path: Path) -> Path:
    """Everything up to a trained extension."""
    folder = tmp_path_factory.mktemp("another_model")
    write_model(folder / "model")
    (folder / "videos").mkdir()
    for number in range(8):
        (folder / "videos" / f"{number}.mp4").write_bytes(clip_path.read_bytes())
        (folder / "videos" / f"{number}.txt").write_text(f"take {number}")
    run(folder, "build_manifest", "source=folder", f"videos={folder / 'videos'}", f"manifest={folder / 'clips.jsonl'}")
    manifest, latents = f"manifest={folder / 'clips.jsonl'}", f"latents={folder / 'latents'}"
    run(folder, "encode_latents", *experiment(folder), manifest, latents)
    train = [*experiment(folder), latents, f"run_dir={folder / 'run'}", f"max_steps={STEPS}", "optim.lr=0.01"]
    train += ["validation.every_steps=3", "data.held_out_clips=2", "checkpoint.every_steps=3", "optim.ema_decay=0.5"]
    with Ranks([WITH_FLIPBOOK, "exvideo_train.train", *train], 2, folder / "train.log") as ranks:
        finished(ranks)
    return folder


def write_model(folder: Path) -> None:
    """A published folder."""
    torch.manual_seed(0)
    for part, config in {"network": {"_class_name": "Flipbook", "width": 8}, "vae": {"_class_name": "Means"}}.items():
        (folder / part).mkdir(parents=True)
        (folder / part / "config.json").write_text(json.dumps(config))
    save_file(Flipbook(8).state_dict(), folder / "network" / "weights.safetensors")


def experiment(folder: Path) -> list[str]:
    size = [f"num_frames={FRAMES}", "height=64", "width=96", "fps=8"]
    return ["+exp=demo", f"model.path={folder / 'model'}", *size]


def run(folder: Path, command: str, *options: str) -> str:
    """A command of the project, in a process that has one family more."""
    arguments = [sys.executable, str(WITH_FLIPBOOK), f"exvideo_train.{command}", *options]
    done = subprocess.run(arguments, cwd=folder, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_its_store(road: Path) -> None:
    content = json.loads((road / "latents" / "store.json").read_text())
    assert content["normalisation"]["sample"] is False
    (fingerprint,) = content["geometries"].values()
    assert fingerprint["family"] == "flipbook"
    assert "text_encoder_sha256" not in fingerprint
    (clip, *others) = sorted((road / "latents" / "clips").rglob("*.safetensors"))
    assert len(others) == 7
    tensors = load_file(clip)
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        "latents": (3, FRAMES, 8, 12),
        "image": (3, 8, 12),
        "rate": (1,),
    }
    assert torch.equal(tensors["latents"][:, 0], tensors["image"])
    assert not (road / "latents" / "empty_prompt.safetensors").exists()
    assert "8 whole, 0 damaged" in run(road, "latents.__main__", "verify", f"latents={road / 'latents'}")
    # The pictures are those of the first clip's frames.
    preview = run(road, "latents.__main__", "preview", f"latents={road / 'latents'}", f"model_path={road / 'model'}")
    assert Image.open(preview.split()[-1]).size[0] == 8 * 240


def test_its_training(road: Path) -> None:
    records = read_metrics(road / "run")
    assert [record["step"] for record in records if "loss" in record] == list(range(1, STEPS + 1))
    validations = [record["validation"] for record in records if "validation" in record]
    assert len(validations) == 3
    assert len(validations[0]["by_position"]) == FRAMES
    assert validations[-1]["loss"] < validations[0]["loss"]
    checkpoint = road / "run" / "checkpoints" / f"step_{STEPS:08d}"
    assert json.loads((checkpoint / "state.json").read_text())["state"]["family"] == "flipbook"
    trained, base = load_file(checkpoint / "time.safetensors"), load_file(road / "model/network/weights.safetensors")
    assert trained.keys() == {"in_time.weight", "in_time.bias"}
    assert all(not torch.equal(trained[name], base[name]) for name in trained)
    assert load_file(road / "run" / "adapter.safetensors")["in_time.weight"].equal(trained["in_time.weight"])


def test_its_export(road: Path) -> None:
    for step, weights in ((3, "raw"), (STEPS, "ema")):
        target = road / f"{step}.safetensors"
        said = run(road, "export", f"run_dir={road / 'run'}", f"step={step}", f"weights={weights}", f"adapter={target}")
        assert "the convolution in time" in said
        assert load_file(target).keys() == {"in_time.weight", "in_time.bias"}


def test_its_videos(road: Path) -> None:
    Image.fromarray(np.full((50, 70, 3), (200, 100, 50), np.uint8)).save(road / "first.png")
    options = [*experiment(road), f"adapter={road / 'run' / 'adapter.safetensors'}", f"image={road / 'first.png'}"]
    run(road, "sample", *options, "compare=true", "num_inference_steps=4", f"output={road / 'out'}", "model.dtype=fp32")
    frames = {}
    for variant in ("with_adapter", "without_adapter"):
        (path,) = (road / "out" / variant).glob("*.mp4")
        with av.open(str(path)) as video:
            frames[variant] = [frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)]
    assert [len(some) for some in frames.values()] == [FRAMES, FRAMES]
    assert frames["with_adapter"][0].shape == (64, 96, 3)
    assert any((a != b).any() for a, b in zip(*frames.values(), strict=True))


def test_its_plan(road: Path) -> None:
    plan = road / "plan.json"
    said = run(road, "plan", *experiment(road), f"json={plan}", "gpus=2")
    assert f"{sum(parameter.numel() for parameter in Flipbook(8).in_time.parameters()):,}" in said
    # Two for each multiply-add: three convolutions at every latent, one Linear a sample.
    forward = 2 * FRAMES * 8 * 12 * (6 * 8 * 9 + 8 * 8 * 3 + 8 * 3 * 9) + 2 * 2 * 8
    assert json.loads(plan.read_text())["devices"]["h100"]["trace"]["forward_flops"] == forward


def refusal(road: Path, command: str, *options: str) -> str:
    """What a command says that ends for a mistake of its user."""
    arguments = [sys.executable, str(WITH_FLIPBOOK), f"exvideo_train.{command}", *experiment(road), *options]
    done = subprocess.run(arguments, cwd=road, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 2, done.stdout + done.stderr
    return done.stderr


@pytest.mark.parametrize(
    ("option", "words"),
    [("num_frames=1", "2 frames or more"), ("height=60", "height=60"), ("parallel.sequence=2", "no attention")],
)
def test_what_it_cannot_take_is_named(road: Path, option: str, words: str) -> None:
    assert words in refusal(road, "plan", "gpus=2", option)


@pytest.mark.parametrize("end", [0, -40], ids=["empty", "cut off"])
def test_a_broken_picture_is_named(road: Path, end: int) -> None:
    whole = BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 70, 3), np.uint8)).save(whole, "PNG")
    path, output = road / "broken.png", road / "of_broken"
    path.write_bytes(whole.getvalue()[:end])
    said = refusal(road, "sample", f"image={path}", f"output={output}", "num_inference_steps=1")
    assert f"image={path}: cannot be read as a picture" in said
    assert "name a PNG or JPEG file" in said
    assert not output.exists()
