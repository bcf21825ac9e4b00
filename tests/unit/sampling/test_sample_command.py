"""``python -m exvideo_train.sample`` as a process, and how it reads its options."""

import json

import av
import numpy as np
import pytest
import torch

from exvideo_train.config.commands import Sample
from exvideo_train.entry import compose_config, quote_overrides, to_dataclass
from exvideo_train.errors import UserError
from exvideo_train.extensions.adapter_file import write_adapter
from exvideo_train.extensions.lora import LoraExtension, apply_lora, lora_parameters, lora_state
from exvideo_train.extensions.provenance import make_provenance
from exvideo_train.geometry import Geometry
from exvideo_train.models.registry import load_backbone
from exvideo_train.sample import choose_device, read_prompts, sample
from exvideo_train.sampling.pipeline import find_fault

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


def write_tiny_adapter(path, model_path, num_frames=9):
    model = apply_lora(load_backbone(model_path, torch.float32), LoraExtension(2, 4.0, ("attn1.to_v",)), seed=6)
    with torch.no_grad():
        for name, parameter in lora_parameters(model).items():
            if "lora_B" in name:
                parameter.fill_(0.3)
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


def test_prompts_file(tmp_path):
    path = tmp_path / "prompts, mine.txt"
    path.write_text("one\n\n  two, three \n")
    assert read_prompts(compose(f"prompts_file={path}")) == ["one", "two, three"]
    path.write_text("\n")
    with pytest.raises(UserError, match="holds no prompt"):
        read_prompts(compose(f"prompts_file={path}"))
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="UTF-8"):
        read_prompts(compose(f"prompts_file={path}"))
    with pytest.raises(UserError, match=r"nowhere\.txt"):
        read_prompts(compose("prompts_file=nowhere.txt"))
    with pytest.raises(UserError, match="neither"):
        read_prompts(compose())
    with pytest.raises(UserError, match="both"):
        read_prompts(compose("prompt=x", "prompts_file=y"))


@pytest.mark.parametrize("name", ["nonsense", "cuda:99"])
def test_a_device_that_is_not_there(name):
    with pytest.raises(UserError, match=f"device={name}"):
        choose_device(name)


def test_compare_leaves_three_videos_a_sheet_and_an_index(tmp_path, tiny_model_5b, run_command):
    adapter, output = tmp_path / "adapter, mine.safetensors", tmp_path / "videos (1)"
    write_tiny_adapter(adapter, tiny_model_5b, num_frames=129)
    result = run_command(
        [
            *("-m", "exvideo_train.sample", "+exp=demo", f"model.path={tiny_model_5b}", f"adapter={adapter}"),
            *("num_frames=9", "num_inference_steps=2", "compare=true", "prompt=a rabbit, wakes", f"output={output}"),
        ]
    )
    names = ["with_adapter.mp4", "without_adapter.mp4", "side_by_side.mp4", "frames.png"]
    assert {path.name for path in output.iterdir()} == {*(f"000_{name}" for name in names), "samples.json"}
    assert "trained at 129 frames" in result.stdout
    for name, width in zip(names, (96, 96, 196), strict=False):
        with av.open(str(output / f"000_{name}")) as video:
            assert (video.streams.video[0].frames, video.streams.video[0].width) == (9, width)
            assert float(video.streams.video[0].average_rate) == 25
    assert (output / "000_with_adapter.mp4").read_bytes() != (output / "000_without_adapter.mp4").read_bytes()
    index = json.loads((output / "samples.json").read_text())
    assert index["samples"][0]["prompt"] == "a rabbit, wakes"
    assert index["adapter_provenance"]["steps"] == 7
    assert index["settings"]["seed"] == 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["num_frames=10"], "num_frames=10"),
        (["height=100"], "height=100"),
        (["compare=true"], "compare=true"),
        (["adapter=missing.safetensors"], "missing.safetensors does not exist"),
        (["num_inference_steps=0"], "num_inference_steps=0"),
        (["num_inference_steps=2000"], "num_inference_steps=2000"),
        (["model.path=nowhere"], "nowhere"),
        (["output=/proc/nowhere"], "output=/proc/nowhere"),
    ],
)
def test_mistakes_are_named_before_anything_is_written(tmp_path, tiny_model_5b, arguments, message):
    output = tmp_path / "videos"
    with pytest.raises(UserError) as error:
        sample(compose(f"model.path={tiny_model_5b}", "num_frames=9", "prompt=x", f"output={output}", *arguments))
    assert message in str(error.value)
    assert not output.exists() or not list(output.iterdir())


def test_a_video_that_is_no_picture_is_said_to_be_none(tmp_path, tiny_model_5b, capsys):
    adapter, output = tmp_path / "adapter.safetensors", tmp_path / "videos"
    write_tiny_adapter(adapter, tiny_model_5b)
    options = ["num_frames=9", "num_inference_steps=1", "compare=true", "prompt=x", "adapter_scale=1e36"]
    sample(
        compose(f"model.path={tiny_model_5b}", "model.dtype=fp32", f"adapter={adapter}", f"output={output}", *options)
    )
    (made,) = json.loads((output / "samples.json").read_text())["samples"]
    assert made["faults"] == {"with_adapter": "100 % of its numbers were not finite (NaN or infinity)"}
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert [line.split(": ")[1] for line in warnings] == [str(output / "000_with_adapter.mp4")]


@pytest.mark.parametrize(
    ("brightest", "share_finite", "fault"),
    [(0, 1.0, "all black"), (4, 1.0, "all black"), (5, 1.0, ""), (255, 0.99, "1 % of its numbers were not finite")],
)
def test_faults_of_a_video(brightest, share_finite, fault):
    frames_FHWC = np.zeros((2, 16, 16, 3), np.uint8)
    frames_FHWC[1, 3, 5, 2] = brightest
    assert find_fault(frames_FHWC, share_finite).startswith(fault)
    assert bool(find_fault(frames_FHWC, share_finite)) == bool(fault)


def test_an_adapter_of_another_model_is_refused(tmp_path, tiny_model_5b, tiny_model_2b, run_command):
    adapter = tmp_path / "adapter.safetensors"
    write_tiny_adapter(adapter, tiny_model_5b)
    result = run_command(
        [
            *("-m", "exvideo_train.sample", "+exp=demo", f"model.path={tiny_model_2b}", f"adapter={adapter}"),
            *("num_frames=9", "prompt=x", f"output={tmp_path / 'videos'}"),
        ],
        status=2,
    )
    assert f"adapter={adapter} does not fit the model" in result.stderr
    assert "Traceback" not in result.stderr
