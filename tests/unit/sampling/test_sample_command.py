"""``python -m exvideo_train.sample`` as a process, and how it reads its options."""

import hashlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from exvideo_train.config.commands import Sample
from exvideo_train.entry import compose_config, quote_overrides, to_dataclass
from exvideo_train.errors import UserError
from exvideo_train.extensions.adapter_file import write_adapter
from exvideo_train.extensions.lora import LoraExtension, apply_lora, lora_parameters, lora_state
from exvideo_train.extensions.provenance import make_provenance
from exvideo_train.geometry import Geometry
from exvideo_train.models.registry import load_backbone
from exvideo_train.sample import sample
from exvideo_train.sampling.output import _Watched
from exvideo_train.sampling.video import read_mp4

NASTY = [
    "a rabbit, wakes",
    'it\'s a "big" buck',
    '"Hello," she said, "world"',
    "'quoted' and 'more'",
    "a=b {c: d} [e] (f) ~g @h #i $HOME ${model.path} %j",
    "ends with a backslash \\",
    "back\\slash, \\' and \\\\'",
    "3",
    "true",
    "",
    "two\nlines",
    "兔子醒来，伸懒腰",
]


def write_tiny_adapter(path, model_path, num_frames=9, fill=0.3):
    model = apply_lora(load_backbone(model_path, torch.float32), LoraExtension(2, 4.0, ("attn1.to_v",)), seed=6)
    with torch.no_grad():
        for name, parameter in lora_parameters(model).items():
            if "lora_B" in name:
                parameter.fill_(fill)
    provenance = make_provenance("tiny", "cogvideox", Geometry(num_frames, 64, 96, 8), steps=7)
    write_adapter(path, "diffsynth", lora_state(model), 2, 4.0, ["attn1.to_v"], provenance)


def compose(*arguments):
    overrides = quote_overrides(["+exp=demo", "output=o", *arguments], Sample)
    return to_dataclass(compose_config("sample", overrides, Sample), Sample)


@pytest.mark.parametrize("prompt", NASTY)
def test_any_prompt_arrives_as_it_was_written(prompt):
    assert compose(f"prompt={prompt}").prompt == prompt


@pytest.mark.parametrize("quoted", ["'a, b'", '"a, b"'])
def test_hydra_quotes_stay_quotes(quoted):
    assert compose(f"prompt={quoted}").prompt == "a, b"


def test_null_unsets():
    assert compose("prompt=null").prompt is None


def run_sample(run_command, model_path, output, *options, **kwargs):
    """The command as a process, at a small size."""
    small = ["+exp=demo", f"model.path={model_path}", "num_frames=9", "num_inference_steps=2", f"output={output}"]
    return run_command(["-m", "exvideo_train.sample", *small, *options], **kwargs)


def files_below(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_compare_leaves_videos_records_and_comparisons(tmp_path, tiny_model_5b, run_command):
    adapter, output = tmp_path / "adapter, mine.safetensors", tmp_path / "videos (1)"
    write_tiny_adapter(adapter, tiny_model_5b, num_frames=129)
    options = [f"adapter={adapter}", "compare=true", "prompt=a rabbit, wakes"]
    result = run_sample(run_command, tiny_model_5b, output, *options)
    stem = next((output / "with_adapter").glob("*.mp4")).stem
    assert stem.startswith("a_rabbit_wakes-")
    assert stem.endswith("-seed6")
    made = {"with_adapter": (".json", ".mp4"), "without_adapter": (".json", ".mp4")}
    made |= {"side_by_side": (".mp4",), "contact_sheets": (".png",)}
    assert files_below(output) == sorted(f"{name}/{stem}{suffix}" for name in made for suffix in made[name])
    assert "trained at 129 frames" in result.stdout
    for name, width in {"with_adapter": 96, "without_adapter": 96, "side_by_side": 196}.items():
        with av.open(str(output / name / f"{stem}.mp4")) as video:
            assert (video.streams.video[0].frames, video.streams.video[0].width) == (9, width)
            assert float(video.streams.video[0].average_rate) == 25
            comment = video.metadata["comment"]
        if name != "side_by_side":
            record = json.loads((output / name / f"{stem}.json").read_text())
            assert json.loads(comment) == {key: value for key, value in record.items() if key != "fault"}
            assert (record["prompt"], record["seed"], record["variant"]) == ("a rabbit, wakes", 6, name)
            assert (record["num_frames"], record["scheduler"], record["fault"]) == (9, "ddim", "")
    record = json.loads((output / "with_adapter" / f"{stem}.json").read_text())
    (placed,) = record["adapters"]
    assert placed["sha256"] == hashlib.sha256(adapter.read_bytes()).hexdigest()
    assert (placed["strength"], placed["provenance"]["steps"]) == (1.0, 7)
    frames = [np.stack(list(read_mp4(output / name / f"{stem}.mp4"))) for name in ("with_adapter", "without_adapter")]
    assert np.abs(frames[0].astype(float) - frames[1]).max() > 10
    # Again: nothing is made again. With other settings: refused, and nothing is lost.
    before = {name: (output / name).stat().st_mtime_ns for name in files_below(output)}
    again = run_sample(run_command, tiny_model_5b, output, *options)
    assert "2 of 2 videos are there already" in again.stdout
    refused = run_sample(run_command, tiny_model_5b, output, *options, "guidance_scale=3", status=2)
    assert "guidance_scale was 7.0, now 3.0" in refused.stderr
    assert "overwrite=true" in refused.stderr
    assert before == {name: (output / name).stat().st_mtime_ns for name in files_below(output)}


def test_latents_are_kept_and_decoded_again_elsewhere(tmp_path, tiny_model_5b, run_command):
    output, again = tmp_path / "videos", tmp_path / "again"
    run_sample(run_command, tiny_model_5b, output, "prompt=fog", "keep_latents=true")
    (video,) = output.rglob("without_adapter/*.mp4")
    # A run that is killed while it decodes: what was drawn is not drawn again, even if it could no longer be.
    reference = np.stack(list(read_mp4(video)))
    video.unlink()
    video.with_suffix(".json").unlink()
    tensors = load_file(video.with_suffix(".safetensors"))
    assert tensors["latents_TCHW"].shape == (3, 16, 8, 12)
    elsewhere = tmp_path / "vae alone"
    shutil.copytree(tiny_model_5b / "vae", elsewhere / "vae")
    run_sample(run_command, elsewhere, again, f"latents={output}")
    (decoded,) = again.rglob("*.mp4")
    assert decoded.relative_to(again) == video.relative_to(output)
    # x264 has been seen to write other bits from equal frames.
    assert np.abs(np.stack(list(read_mp4(decoded))).astype(float) - reference).mean() < 0.5
    result = run_sample(run_command, tiny_model_5b, output, "prompt=fog", "keep_latents=true")
    assert "step" in result.stderr
    assert np.abs(np.stack(list(read_mp4(video))).astype(float) - reference).mean() < 0.5


def test_two_commands_share_a_list_and_a_third_finds_it_done(tmp_path, tiny_model_5b):
    """One of them with two processes; no video is made twice, and none is left out."""
    prompts, output = tmp_path / "prompts.txt", tmp_path / "videos"
    prompts.write_text("one\ntwo\nthree\nfour\n")
    command = [sys.executable, "-m", "exvideo_train.sample", "+exp=demo", f"model.path={tiny_model_5b}", "num_frames=9"]
    command += ["num_inference_steps=120", f"prompts_file={prompts}", "seeds=2", f"output={output}"]
    running = [
        subprocess.Popen([*command, f"device={device}"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for device in ("cpu,cpu", "cpu")
    ]
    told = [process.communicate(timeout=300) for process in running]
    assert [process.returncode for process in running] == [0, 0], told
    made = [[line for line in out.splitlines() if line.endswith(".mp4")] for out, _ in told]
    stems = [Path(line).stem for lines in made for line in lines]
    assert len(stems) == len(set(stems)) == 8, made
    assert all(made), "each took part"
    assert {path.stem for path in (output / "contact_sheets").iterdir()} == set(stems)
    assert not list(output.rglob("*.lock"))
    third = subprocess.run(command, capture_output=True, text=True, timeout=200, check=True)
    assert "8 of 8 videos are there already" in third.stdout


def test_kill_leaves_nothing_that_counts_as_done_and_the_list_goes_on(tmp_path, tiny_model_5b, run_command):
    prompts, output = tmp_path / "prompts.txt", tmp_path / "videos"
    prompts.write_text("one\ntwo\nthree\n")
    command = [sys.executable, "-m", "exvideo_train.sample", "+exp=demo", f"model.path={tiny_model_5b}", "num_frames=9"]
    command += ["num_inference_steps=2", f"prompts_file={prompts}", f"output={output}"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout is not None
    first = next(line for line in process.stdout if line.strip().endswith(".mp4")).strip()
    process.kill()
    process.communicate()
    finished = {path: path.stat().st_mtime_ns for path in output.rglob("*.json") if path.parent.suffix != ".lock"}
    assert Path(first).with_suffix(".json") in finished
    for path in finished:
        assert len(list(read_mp4(path.with_suffix(".mp4")))) == 9
    run_sample(run_command, tiny_model_5b, output, f"prompts_file={prompts}")
    assert len(list(output.glob("without_adapter/*.mp4"))) == 3
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    assert len(list(output.glob("contact_sheets/*.png"))) == 3
    assert not list(output.rglob("*.lock"))


def test_dry_run_names_every_video_and_makes_none(tmp_path, tiny_model_5b, capsys):
    output = tmp_path / "videos"
    sample(compose(f"model.path={tiny_model_5b}", "prompt=fog", "seeds=3", f"output={output}", "dry_run=true"))
    said = capsys.readouterr().out
    assert [f"fog-{digest}-seed{seed}.mp4" in said for digest in re.findall(r"fog-(\w{8})-seed6", said) for seed in
            (6, 7, 8)] == [True] * 3  # fmt: skip
    assert not output.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["num_frames=10"], "num_frames=10"),
        (["height=100"], "height=100"),
        (["compare=true"], "compare=true"),
        (["adapter=missing.safetensors"], "missing.safetensors does not exist"),
        (["adapter=missing.safetensors:0.5"], "missing.safetensors does not exist"),
        (["adapter=[]", "compare=true"], "compare=true"),
        (["adapter=a.safetensors+b.safetensors:0.5"], "a.safetensors does not exist"),
        (["num_inference_steps=0"], "num_inference_steps=0"),
        (["num_inference_steps=2000"], "num_inference_steps=2000"),
        (["seeds=0"], "seeds=0"),
        (["model.path=nowhere"], "nowhere"),
        (["image=a.png"], "image=a.png: has no use"),
        (["output=/proc/nowhere"], "output=/proc/nowhere"),
        (["latents=nowhere.safetensors"], "nowhere.safetensors"),
    ],
)
def test_mistakes_are_named_before_anything_is_written(tmp_path, tiny_model_5b, arguments, message):
    output = tmp_path / "videos"
    with pytest.raises(UserError) as error:
        sample(compose(f"model.path={tiny_model_5b}", "num_frames=9", "prompt=x", f"output={output}", *arguments))
    assert message in str(error.value)
    assert not output.exists() or not list(output.rglob("*.mp4"))


@pytest.mark.parametrize(("model", "kind"), [("tiny_model_2b", "riflex")])
def test_positions_that_a_model_cannot_have(tmp_path, request, model, kind):
    path = request.getfixturevalue(model)
    with pytest.raises(UserError, match=r"positions=riflex.*sin-cos"):
        sample(compose(f"model.path={path}", "num_frames=9", "prompt=x", f"output={tmp_path}", f"positions={kind}"))


def test_a_video_that_is_no_picture_is_said_to_be_none(tmp_path, tiny_model_5b, capsys):
    adapter, output = tmp_path / "adapter.safetensors", tmp_path / "videos"
    write_tiny_adapter(adapter, tiny_model_5b, fill=1e37)
    options = ["num_frames=9", "num_inference_steps=1", "compare=true", "prompt=x"]
    sample(
        compose(f"model.path={tiny_model_5b}", "model.dtype=fp32", f"adapter={adapter}", f"output={output}", *options)
    )
    (bad,) = output.glob("with_adapter/*.json")
    assert json.loads(bad.read_text())["fault"] == "100 % of its numbers were not finite (NaN or infinity)"
    (good,) = output.glob("without_adapter/*.json")
    assert json.loads(good.read_text())["fault"] == ""
    warnings = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert [line.split("warning: ")[1].split(": ")[0] for line in warnings] == [str(bad.with_suffix(".mp4"))]


@pytest.mark.parametrize(
    ("brightest", "share_finite", "fault"),
    [(0, 1.0, "all black"), (4, 1.0, "all black"), (5, 1.0, ""), (255, 0.99, "0.667 % of its numbers were not fini")],
)
def test_faults_of_a_video(brightest, share_finite, fault):
    frames_FHWC = torch.zeros((2, 16, 16, 3), dtype=torch.uint8)
    frames_FHWC[1, 3, 5, 2] = brightest
    watched = _Watched([(frames_FHWC, share_finite), (torch.zeros((1, 16, 16, 3), dtype=torch.uint8), 1.0)])
    assert len(list(watched)) == 3
    assert watched.fault().startswith(fault)
    assert bool(watched.fault()) == bool(fault)


def test_an_adapter_of_another_model_is_refused(tmp_path, tiny_model_5b, tiny_model_2b, run_command):
    adapter = tmp_path / "adapter.safetensors"
    write_tiny_adapter(adapter, tiny_model_5b)
    result = run_sample(run_command, tiny_model_2b, tmp_path / "videos", f"adapter={adapter}", "prompt=x", status=2)
    assert f"adapter={adapter} does not fit the model" in result.stderr
    assert "Traceback" not in result.stderr
