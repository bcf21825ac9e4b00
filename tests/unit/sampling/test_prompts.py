"""Which videos options and files of prompts ask for, and what is said about prompts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from exvideo_train.config.commands import Sample
from exvideo_train.entry import compose_config, quote_overrides, to_dataclass
from exvideo_train.errors import UserError
from exvideo_train.geometry import Geometry
from exvideo_train.models.stages import SamplerSettings
from exvideo_train.sampling.pictures import read_picture
from exvideo_train.sampling.pipeline import Sampler, Sampling
from exvideo_train.sampling.requests import VideoRequest, read_requests
from exvideo_train.sampling.variants import make_variants

GEOMETRY = Geometry(9, 64, 96, 8)


def compose(*arguments):
    overrides = quote_overrides(["+exp=demo", "output=o", *arguments], Sample)
    return to_dataclass(compose_config("sample", overrides, Sample), Sample)


def prompts_of(*arguments):
    return [request.prompt for request in read_requests(compose(*arguments))]


def test_a_file_of_text(tmp_path, capsys):
    path = tmp_path / "prompts, mine.txt"
    path.write_text("\ufeffone\n\n  two, three \none\n", encoding="utf-8")
    assert prompts_of(f"prompts_file={path}") == ["one", "two, three"]
    assert "1 of 3 videos are asked for twice" in capsys.readouterr().out


def test_a_file_of_objects(tmp_path):
    path = tmp_path / "prompts.jsonl"
    rows = [{"prompt": "a"}, {"prompt": "b", "seed": 40, "num_frames": 17, "width": 64, "height": 32, "fps": 12}]
    rows += [{"prompt": "c", "negative_prompt": "d", "image": "first.png"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    requests = read_requests(compose(f"prompts_file={path}", "seeds=2", "num_frames=9", "negative_prompt=e"))
    assert [(request.prompt, request.seed, request.negative_prompt) for request in requests] == [
        *[("a", 6, "e"), ("a", 7, "e"), ("b", 40, "e"), ("b", 41, "e"), ("c", 6, "d"), ("c", 7, "d")]
    ]
    assert requests[2].geometry == Geometry(17, 32, 64, 12)
    assert requests[0].geometry.num_frames == 9
    assert requests[4].image == tmp_path / "first.png"


@pytest.mark.parametrize("language", ["english", "chinese"])
def test_the_projects_own_prompts(language):
    prompts = prompts_of(f"prompt_set={language}")
    assert len(prompts) == len(set(prompts)) == 28
    assert any("shake hands" in prompt or "握手" in prompt for prompt in prompts)


BAD_LINES = {
    "{": "no JSON",
    "[1]": "must be an object with a prompt",
    '{"seed": 3}': "must be an object with a prompt",
    '{"prompt": 3}': "prompt=3 must be text",
    '{"prompt": "a", "seed": 1.5}': "seed=1.5 must be a whole number",
    '{"prompt": "a", "seed": true}': "seed=True must be a whole number",
    '{"prompt": "a", "seed": -1}': "seed=-1: must be between",
    '{"prompt": "a", "num_frames": 0}': "num_frames=0",
    '{"prompt": "a", "frames": 9}': "'frames', which means nothing here",
    '{"prompt": "a", "prompt": "b"}': "no JSON",
}


@pytest.mark.parametrize("line", BAD_LINES)
def test_a_line_that_is_no_prompt_is_named(tmp_path, line):
    path = tmp_path / "p.jsonl"
    path.write_text(f'{{"prompt": "fine"}}\n\n{line}\n')
    with pytest.raises(UserError) as refusal:
        prompts_of(f"prompts_file={path}")
    assert str(refusal.value).startswith(f"prompts_file={path}: line 3: ")
    assert BAD_LINES[line] in str(refusal.value)


def test_files_that_hold_no_prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\n")
    with pytest.raises(UserError, match="holds no prompt"):
        prompts_of(f"prompts_file={path}")
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="UTF-8"):
        prompts_of(f"prompts_file={path}")
    with pytest.raises(UserError, match=r"nowhere\.txt"):
        prompts_of("prompts_file=nowhere.txt")
    with pytest.raises(UserError, match="none is given"):
        prompts_of()
    with pytest.raises(UserError, match="prompt and prompts_file are given"):
        prompts_of("prompt=x", "prompts_file=y")


def test_names_are_plain_short_and_tell_videos_apart():
    base = VideoRequest("A  fox/../cat: \x1b[2J!", "", 6, GEOMETRY)
    others = [VideoRequest("a fox", "", 6, GEOMETRY), VideoRequest(base.prompt, "blur", 6, GEOMETRY)]
    others += [VideoRequest(base.prompt, "", 7, GEOMETRY), VideoRequest(base.prompt, "", 6, Geometry(17, 64, 96, 8))]
    others += [VideoRequest("兔子" * 200, "", 6, GEOMETRY), VideoRequest("", "", 6, GEOMETRY)]
    stems = [request.stem for request in (base, *others)]
    assert len(set(stems)) == len(stems)
    assert stems[0].startswith("a_fox_cat_2j-")
    assert all(len(stem.encode()) < 130 and Path(stem).name == stem for stem in stems)


def test_variants_are_named_after_their_files():
    def names(adapter, compare=False):
        return [variant.name for variant in make_variants(adapter, compare)]

    assert names([]) == ["without_adapter"]
    assert names(["a.safetensors:0.5"], compare=True) == ["with_adapter", "without_adapter"]
    assert names(["a.safetensors", "b.safetensors:0.7"], compare=True) == ["a", "b_x0.7", "without_adapter"]
    assert names(["x/a.safetensors+b.safetensors:0.5", "x/a.safetensors"]) == ["a+b_x0.5", "a"]
    assert names(["1/adapter.safetensors", "2/adapter.safetensors"]) == ["1_adapter", "2_adapter"]
    with pytest.raises(UserError, match="twice"):
        names(["a.safetensors", "a.safetensors"])
    with pytest.raises(UserError, match="strength must be"):
        names(["a.safetensors:1e9"])


def test_prompts_that_are_cut_or_unknown_are_named(tiny_model_5b):
    said: list[str] = []
    long, foreign = "a rabbit wakes up and stretches " * 20, "兔子"
    requests = [VideoRequest(prompt, "", seed, GEOMETRY) for prompt in ("a rabbit", long, foreign) for seed in (1, 2)]
    sampling = Sampling(tiny_model_5b, SamplerSettings("ddim", 2, 6.0), torch.float32, make_variants([], False))
    sampler = Sampler(sampling, torch.device("cpu"), requests, said.append)
    wanted, unwanted = sampler.conditions(requests[0])
    assert not torch.equal(wanted["text_BLC"], unwanted["text_BLC"])
    (cut,) = [line for line in said if "the model reads 16" in line]
    assert cut.endswith(long)
    (unknown,) = [line for line in said if "unknown" in line]
    assert unknown.endswith(foreign)


def test_a_picture_is_cut_to_the_frames(tmp_path):
    path = tmp_path / "first.png"
    Image.new("RGB", (200, 50), (10, 20, 30)).save(path)
    assert read_picture(path, GEOMETRY).shape == (64, 96, 3)
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(UserError, match=rf"image={path}: cannot be read as a picture .* name a PNG or JPEG file"):
        read_picture(path, GEOMETRY)
