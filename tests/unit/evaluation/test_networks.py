"""CLIP, DINO and VBench in the evaluation: tiny networks against a direct computation, a stand-in for VBench."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from support.videos import make_video
from support.vision_models import CLIP_SIDE, write_clip, write_dino, write_dinov2
from transformers import AutoModel, CLIPModel, CLIPTokenizer

from exvideo_train.errors import UserError
from exvideo_train.evaluation.embedding import Networks
from exvideo_train.evaluation.reading import Reading, read_frames
from exvideo_train.evaluation.vbench import DIMENSIONS, check_vbench, read_results

NUM_FRAMES, NUM_PAIRS = 5, 2
PROMPTS = ["a red fox", "two old ships in a very long sentence that nobody reads to its end"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vision_models")
    return {
        "clip": write_clip(folder / "clip"),
        "dino": write_dino(folder / "dino"),
        "dinov2": write_dinov2(folder / "dinov2"),
    }


# Options of vbench 0.1.5's launch/evaluate.py, and what it writes.
STAND_IN = """
import argparse, json, os, sys
parser = argparse.ArgumentParser()
for name in ("output_path", "full_json_dir", "videos_path", "prompt_file", "category"):
    parser.add_argument(f"--{name}")
parser.add_argument("--prompt", default="None")
parser.add_argument("--dimension", nargs="+", required=True)
parser.add_argument("--mode", choices=["custom_input", "vbench_standard", "vbench_category"])
options = parser.parse_args()
assert options.mode == "custom_input"
names = sorted(os.listdir(options.videos_path))
prompts = json.load(open(options.prompt_file))
assert all(prompts[name] for name in names)
(dimension,) = options.dimension
if dimension == "imaging_quality":
    sys.exit("CUDA out of memory")
values = [os.path.getsize(os.path.join(options.videos_path, name)) for name in names]
if dimension == "dynamic_degree":
    values = [value > 0 for value in values]
videos = [
    {"video_path": os.path.join(options.videos_path, name), "video_results": value}
    for name, value in zip(names, values)
]
os.makedirs(options.output_path)
with open(os.path.join(options.output_path, "results_2026-01-01-00:00:00_eval_results.json"), "w") as file:
    json.dump({dimension: [sum(values) / len(values), videos]}, file)
"""


@pytest.fixture(scope="module")
def vbench_python(tmp_path_factory):
    """A Python that has a package vbench."""
    folder = tmp_path_factory.mktemp("vbench")
    (folder / "vbench" / "launch").mkdir(parents=True)
    for name in ("vbench/__init__.py", "vbench/launch/__init__.py"):
        (folder / name).touch()
    (folder / "vbench" / "launch" / "evaluate.py").write_text(STAND_IN)
    python = folder / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH="{folder}" exec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    return python


def pictures(seed):
    """Noise in which blocks move, 64 x 112: wider than CLIP's square."""
    random = np.random.default_rng(seed)
    wide = np.repeat(np.repeat(random.integers(0, 255, (8, 24, 3), np.uint8), 8, axis=0), 8, axis=1)
    return [wide[:, 12 * index : 12 * index + 112] for index in range(NUM_FRAMES)]


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory, models, vbench_python):
    """Folder of the variants and ``results.json`` of a run with everything."""
    root = tmp_path_factory.mktemp("evaluated")
    for number, variant in enumerate(("with", "without")):
        (root / variant).mkdir()
        for pair, prompt in enumerate(PROMPTS):
            make_video(root / variant / f"{pair}.mp4", pictures(10 * number + pair), fps=8)
            record = {"prompt": prompt, "seed": 6, "variant": variant}
            (root / variant / f"{pair}.json").write_text(json.dumps(record))
    options = [f"{name}={root / name}" for name in ("with", "without")]
    options += [f"clip={models['clip']}", f"dino={models['dino']}", f"vbench_python={vbench_python}"]
    result = subprocess.run(
        [sys.executable, "-m", "exvideo_train.evaluate", *options, f"output={root / 'out'}", "num_workers=1"],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=root,
    )
    assert result.returncode == 0, result.stderr
    return root, json.loads((root / "out" / "results.json").read_text())


def frames_of(path):
    """float BCHW in 0..255."""
    frames = [frame for _, frame in read_frames(str(path), Reading(0.0, None, 99))]
    return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2).float()


def normalised(frames_BCHW, mean, deviation):
    return (frames_BCHW / 255 - torch.tensor(mean)[:, None, None]) / torch.tensor(deviation)[:, None, None]


def resized(frames_BCHW, size, mode):
    return F.interpolate(frames_BCHW, size=size, mode=mode, align_corners=False).round().clamp(0, 255)


def consistency(features):
    """As VBench's loop has it."""
    total = 0.0
    for index in range(1, len(features)):
        before = max(0.0, F.cosine_similarity(features[index - 1], features[index], dim=0).item())
        first = max(0.0, F.cosine_similarity(features[0], features[index], dim=0).item())
        total += (before + first) / 2
    return total / (len(features) - 1)


@torch.no_grad()
def test_clip_equals_a_direct_computation(models, evaluated):
    root, results = evaluated
    model, tokenizer = CLIPModel.from_pretrained(models["clip"]), CLIPTokenizer.from_pretrained(models["clip"])
    found = []
    for variant in ("with", "without"):
        for pair, prompt in enumerate(PROMPTS):
            wide = resized(frames_of(root / variant / f"{pair}.mp4"), (CLIP_SIDE, 56), "bicubic")
            square = wide[..., 12 : 12 + CLIP_SIDE]
            mean, deviation = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
            images = model.get_image_features(normalised(square, mean, deviation)).pooler_output
            tokens = tokenizer([prompt], truncation=True, max_length=12, return_tensors="pt")
            text = model.get_text_features(**tokens).pooler_output
            expected = (consistency(images), F.cosine_similarity(images, text).mean().item())
            measures = results["pairs"][f"{pair}"][variant]["measures"]
            assert (measures["background_consistency"], measures["text_agreement"]) == pytest.approx(expected, abs=1e-4)
            found.append(expected)
    # The random network tells these videos apart by much more than the tolerance.
    assert np.ptp(np.asarray(found), axis=0).min() > 0.02


@torch.no_grad()
def test_dino_equals_a_direct_computation(models, evaluated):
    root, results = evaluated
    model = AutoModel.from_pretrained(models["dino"])
    found = []
    for variant in ("with", "without"):
        images = resized(frames_of(root / variant / "0.mp4"), (224, 392), "bilinear")
        images = normalised(images, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        found.append(consistency(model(images, interpolate_pos_encoding=True).last_hidden_state[:, 0]))
        measured = results["pairs"]["0"][variant]["measures"]["subject_consistency"]
        # One number in a hundred lies between two levels and is rounded up by one library, down by the other.
        assert measured == pytest.approx(found[-1], abs=5e-3)
    assert abs(found[0] - found[1]) > 0.02


def test_vbench_measures_with_its_own_code(evaluated):
    root, results = evaluated
    for pair in ("0", "1"):
        for variant in ("with", "without"):
            measures = results["pairs"][pair][variant]["measures"]
            assert measures["vbench_subject_consistency"] == os.path.getsize(root / variant / f"{pair}.mp4")
            assert measures["vbench_dynamic_degree"] == 1.0
            assert measures["vbench_imaging_quality"] is None
    assert results["measures"]["vbench_dynamic_degree"]["better"] == "neither"
    failures = [line for line in results["left_out"] if "imaging_quality" in line]
    assert len(failures) == 2
    assert "CUDA out of memory" in failures[0]
    assert "VBench: imaging quality" in (root / "out" / "report.html").read_text()


def test_dinov2_is_taken_too(models):
    networks = Networks(None, str(models["dinov2"]), "cpu")
    frames = torch.zeros(2, 3, 224, 238)
    assert networks._dino_features(frames).shape == (2, 32)


def without_a_tensor(folder):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    del tensors["layernorm.weight"]
    save_file(tensors, path, {"format": "pt"})


def pickled(folder):
    path = folder / "model.safetensors"
    torch.save(load_file(path), folder / "pytorch_model.bin")
    path.unlink()


def with_code(folder):
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Mine", "AutoModel": "mine.Mine"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "mine.py").write_text("open('taken', 'w')")


REFUSED = {
    "a tensor is missing": (without_a_tensor, "its weights lack"),
    "a pickle": (pickled, "cannot be loaded"),
    "code of its own": (with_code, "cannot be loaded"),
    "half a file": (lambda folder: os.truncate(folder / "model.safetensors", 5000), "cannot be loaded"),
    "no JSON": (lambda folder: (folder / "config.json").write_text("{"), "cannot be loaded"),
    "nothing": (lambda folder: [path.unlink() for path in folder.iterdir()], "cannot be loaded"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_weights_that_are_not_whole_are_refused(tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    spoil, says = REFUSED[case]
    folder = write_dino(tmp_path / "dino")
    spoil(folder)
    with pytest.raises(UserError, match=f"dino={folder}: {says}"):
        Networks(None, str(folder), "cpu")
    assert not Path("taken").exists()


def test_a_name_that_the_hub_cannot_give_is_refused():
    with pytest.raises(UserError, match="clip=nobody/nothing: cannot be loaded"):
        Networks("nobody/nothing", None, "cpu")


def test_a_network_of_another_kind_is_refused(models):
    with pytest.raises(UserError, match=r"clip=.*: a model of kind vit; name one of clip"):
        Networks(str(models["dino"]), None, "cpu")


def test_vbench_is_looked_for_before_anything_is_measured(vbench_python):
    check_vbench(str(vbench_python), list(DIMENSIONS))
    with pytest.raises(UserError, match="VBench gives subject_consistency, "):
        check_vbench(str(vbench_python), ["human_action"])
    with pytest.raises(UserError, match="has no package vbench"):
        check_vbench(sys.executable, [])
    with pytest.raises(UserError, match="cannot be run"):
        check_vbench("/no/python", [])


@pytest.mark.parametrize("content", ["[]", "{}", '{"x": 3}', '{"x": [1, [{"video_path": "a"}]]}', '{"x": [1, [7]]}'])
def test_results_that_are_none_are_refused(tmp_path, content):
    (tmp_path / "r.json").write_text(content)
    with pytest.raises(UserError, match="is not its results"):
        read_results(tmp_path / "r.json", "x")
