"""The command line as users meet it: real processes, their output, status and what they leave behind."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from exvideo_train.config.commands import Sample
from exvideo_train.entry import compose_config, quote_overrides, to_dataclass
from exvideo_train.errors import UserError

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPTS = sorted(
    path.relative_to(REPOSITORY).as_posix()
    for folder in ("data_prep", "launch")
    for path in (REPOSITORY / folder).glob("*.py")
)
# A command whose function only says what it was given.
PROBE = """
import json, os
from exvideo_train.config.commands import Sample
from exvideo_train.entry import run_command
from exvideo_train.errors import UserError

def main(config):
    if config.prompt == "fail":
        raise UserError("prompt='fail': say something else")
    print(json.dumps([os.getcwd(), os.environ.get("LOCAL_RANK"), config.prompt, config.num_frames]))

run_command(Sample, main, "sample", "Probe.")
"""


@pytest.fixture
def probe(tmp_path, run_command):
    script = tmp_path / "probe.py"
    script.write_text(PROBE)
    return lambda *arguments, **options: run_command([script, *arguments], timeout_seconds=60, **options)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_of_every_script(run_command, script):
    result = run_command([script, "--help"], timeout_seconds=60)
    first_line = result.stdout.splitlines()[0]
    assert first_line.endswith((".", ":"))
    assert f"{Path(script).name}" in result.stdout
    assert "Options (name=value)" in result.stdout
    assert result.stderr == ""


def test_help_shows_what_the_command_line_composes(probe):
    text = probe("--help", "+exp=demo", "seed=77").stdout
    assert "  num_frames = 129  (int)" in text
    assert "  seed = 77  (int)" in text
    assert "  output = required  (str)" in text
    assert "  scheduler = ddim  (ddim | dpm)" in text
    assert "  exp: 129f" in text


def test_nothing_is_left_behind_and_the_folder_is_the_users(probe, tmp_path):
    result = probe("output=x")
    folder = tmp_path / "cwd"
    assert f'["{folder}"' in result.stdout
    assert os.listdir(folder) == []


@pytest.mark.parametrize("flag", [["--local_rank=3"], ["--local_rank", "3"], ["--local-rank=3"]])
def test_the_launchers_local_rank_goes_to_the_environment(probe, flag):
    assert '"3"' in probe(*flag, "output=x").stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["output=x", "num_frame=49"], ["unknown option num_frame", "did you mean num_frames?"]),
        (["output=x", "+num_frame=49"], ["unknown option num_frame", "did you mean num_frames?"]),
        (["output=x", "lora.rnk=8"], ["unknown option lora.rnk", "lora.rank"]),
        (["output=x", "modle=tiny"], ["unknown option modle", "did you mean model"]),
        (["output=x", "zzz=1"], ["unknown option zzz", "--help"]),
        (["output=x", "--num_frames=49"], ["unknown option '--num_frames=49'", "write num_frames=49"]),
        (["output=x", "--verbose"], ["unknown option '--verbose'", "name=value"]),
        (["output=x", "compare"], ["'compare'", "name=value"]),
        (["output=x", "~lora"], ["'~lora'", "cannot be taken away"]),
        (["output=x", "exp=demo"], ["write +exp=demo"]),
        (["output=x", "+exp=dem"], ["+exp=dem", "no such choice", "129f, ", "demo"]),
        (["output=x", "model=tini"], ["model=tini", "no such choice", "cogvideox_5b", "tiny"]),
        (["output=x", "num_frames=many"], ["num_frames=many", "Integer"]),
        (["output=x", "lora.rank=1.5"], ["lora.rank=1.5", "Integer"]),
        (["output=x", "scheduler=euler"], ["scheduler=euler", "ddim", "dpm"]),
        (["output=x", "compare=perhaps"], ["compare=perhaps"]),
        (["output=x", "seed=null"], ["seed=null"]),
        (["output=x", "optim.betas=[a]"], ["optim.betas=[a]"]),
        (["prompt=a"], ["these options are required", "output=...", "Folder for the videos"]),
        (["output=x", "prompt=fail"], ["prompt='fail': say something else"]),
        (["output=x", "--config-dir", "nowhere"], ["nowhere", "no such folder"]),
    ],
    ids=" ".join,
)
def test_mistakes_are_named_without_a_traceback(probe, arguments, words):
    result = probe(*arguments, status=2)
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert "Traceback" not in result.stderr
    assert len(result.stderr.splitlines()) <= 3
    for word in words:
        assert word in result.stderr


def test_a_bug_keeps_its_traceback(tmp_path, run_command):
    script = tmp_path / "buggy.py"
    script.write_text(PROBE.replace('"fail"', "undefined_name"))
    result = run_command([script, "output=x"], status=1)
    assert "NameError" in result.stderr
    assert "buggy.py" in result.stderr


def test_no_name_or_header_reaches_the_terminal_as_it_is(tmp_path, run_command):
    script = tmp_path / "showing.py"
    script.write_text(
        PROBE.replace("import json", "import json, sys")
        .replace('"fail"', '"\\x1b[2J"')
        .replace("prompt='fail'", "{config.prompt}")
        .replace('UserError("', 'UserError(f"')
        .replace("print(", "print(config.prompt); sys.stdout.writelines(['\\udcff\\u202e']); print(")
    )
    for prompt, status in (("\x1b]52;c;AAAA\x07\x9b", 0), ("\x1b[2J", 2)):
        result = run_command([script, "output=x", f"prompt={prompt}"], status=status, timeout_seconds=60)
        text = result.stdout + result.stderr
        assert not set(text) & set("\x1b\x07\x9b\u202e\udcff")
        assert "\\x1b" in text
        assert "\\udcff\\u202e" in result.stdout or status == 2


def test_choices_of_the_users_own(probe, tmp_path):
    (tmp_path / "mine" / "exp").mkdir(parents=True)
    (tmp_path / "mine" / "exp" / "short.yaml").write_text("# @package _global_\nnum_frames: 57\n")
    for flag in (["--config-dir", "../mine"], ["--config-dir=../mine"]):
        assert "57]" in probe(*flag, "+exp=short", "output=x").stdout
    assert "num_frames = 57" in probe("--config-dir", "../mine", "+exp=short", "--help").stdout


def test_the_whole_config_is_printed_on_request(probe):
    text = probe("+exp=demo", "output=x", "--cfg", "job").stdout
    assert "num_frames: 129" in text
    assert "rank: 8" in text


TEXTS = [
    "plain words",
    "a dog, two cats: 50% (left) [right] {up} = down",
    "it's",
    'he says "no"',
    "'quoted' and 'more'",
    "both ' and \"",
    "back\\slash",
    "ends in a backslash\\",
    "costs $5 or ${five}",
    "null and void",
    "true",
    "12",
    "~tilde, #hash; *star* & ?",
    "多语言，逗号",
    "",
]


@pytest.mark.parametrize("text", TEXTS)
def test_text_options_take_any_text(text):
    overrides = quote_overrides([f"prompt={text}", f"model.path={text}x", "output=o"], Sample)
    config = to_dataclass(compose_config("sample", overrides, Sample), Sample)
    assert config.prompt == text
    assert config.model.path == f"{text}x"


@pytest.mark.parametrize("text", ["'a, b'", '"a, b"'])
def test_hydras_own_quotes_are_kept(text):
    overrides = quote_overrides([f"prompt={text}", "output=o"], Sample)
    assert to_dataclass(compose_config("sample", overrides, Sample), Sample).prompt == "a, b"


def test_other_values_are_left_to_hydra():
    overrides = ["seed=1", "optim.betas=[0.9,0.99]", "prompt=null", "+exp=demo", "model=tiny", "image=null"]
    assert quote_overrides(overrides, Sample) == overrides
    config = to_dataclass(compose_config("sample", [*overrides, "output=o"], Sample), Sample)
    assert (config.prompt, config.image, config.optim.betas) == (None, None, [0.9, 0.99])


def test_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    assert quote_overrides(["output=~/videos"], Sample) == ["output='/home/somebody/videos'"]


def test_entries_in_options_with_names_of_the_users_own():
    from exvideo_train.config.clips import FilterClips

    overrides = ["manifest=m", "output=o", "filter.min_scores.aesthetic=5", "+filter.min_scores.taste=0.5"]
    config = to_dataclass(compose_config("filter_clips", overrides, FilterClips), FilterClips)
    assert config.filter.min_scores["aesthetic"] == 5
    assert config.filter.min_scores["taste"] == 0.5


def test_composing_raises_user_errors():
    with pytest.raises(UserError, match="unknown option num_frame in"):
        compose_config("sample", ["num_frame=49"], Sample)


def test_hydra_is_imported_without_torch(run_command):
    # A mistake in the command line must be answered at once, not after seconds of imports.
    code = "import sys, exvideo_train.entry, exvideo_train.config.commands; sys.exit('torch' in sys.modules)"
    assert run_command(["-c", code]).status == 0
