"""Every YAML composes for every command that takes it, and the public override names work everywhere."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
import re
from enum import Enum
from pathlib import Path
from typing import Any, get_args, get_origin

import pytest
import yaml
from omegaconf import OmegaConf

import exvideo_train.config
from exvideo_train.config.experiment import Experiment
from exvideo_train.config.options import Options
from exvideo_train.entry import compose_config, config_folder, help_text, to_dataclass, walk_options
from exvideo_train.errors import UserError

CONF = config_folder()
# Users' scripts rely on these names, for every experiment (README, "Options").
PUBLIC_OVERRIDES: dict[str, Any] = {
    "model.path": "/models/mine",
    "num_frames": 57,
    "height": 96,
    "width": 160,
    "fps": 12.5,
    "seed": 123,
    "max_steps": 77,
    "guidance_scale": 3.5,
    "num_inference_steps": 7,
    "scheduler": "dpm",
}


def config_classes() -> list[type]:
    modules = pkgutil.iter_modules(exvideo_train.config.__path__, "exvideo_train.config.")
    found = {
        value
        for module in modules
        for value in vars(importlib.import_module(module.name)).values()
        if isinstance(value, type) and issubclass(value, Options) and value is not Options
    }
    return sorted(found, key=lambda found_class: found_class.__name__)


def snake_case(name: str) -> str:
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()


COMMANDS = {
    snake_case(config_class.__name__): config_class
    for config_class in config_classes()
    if (CONF / f"{snake_case(config_class.__name__)}.yaml").is_file() and config_class is not Experiment
}
EXPERIMENT_COMMANDS = [name for name, config_class in COMMANDS.items() if issubclass(config_class, Experiment)]
EXPERIMENTS = sorted(path.stem for path in (CONF / "exp").glob("*.yaml"))
CHOICES = sorted(f"{path.parent.name}={path.stem}" for path in CONF.glob("*/*.yaml") if path.parent.name != "exp")


def required(command: str) -> dict[str, str]:
    """The options that the command cannot run without, with a value each."""
    kinds = {path: kind for path, kind, _ in walk_options(COMMANDS[command])}
    names = OmegaConf.missing_keys(compose_config(command, [], COMMANDS[command]))
    is_choice = {name: isinstance(kinds[name], type) and issubclass(kinds[name], Enum) for name in names}
    values = {name: next(iter(kinds[name])).name if is_choice[name] else "given" for name in sorted(names)}
    return values | {name: "1" for name in values if kinds[name] is int}


def composed(command: str, *overrides: str) -> Any:
    given = [f"{name}={value}" for name, value in required(command).items()]
    return to_dataclass(compose_config(command, [*given, *overrides], COMMANDS[command]), COMMANDS[command])


def test_every_yaml_belongs_to_a_command():
    names = {path.stem for path in CONF.glob("*.yaml")} - {"experiment"}
    assert names == set(COMMANDS), "conf/NAME.yaml goes with a dataclass Name in exvideo_train/config/"
    assert {"129f", "49f", "demo"} <= set(EXPERIMENTS)


@pytest.mark.parametrize("command", COMMANDS)
def test_command_composes(command):
    assert isinstance(composed(command), COMMANDS[command])


@pytest.mark.parametrize("exp", EXPERIMENTS)
@pytest.mark.parametrize("command", EXPERIMENT_COMMANDS)
def test_public_overrides_work_for_every_experiment(command, exp):
    overrides = [f"{name}={value}" for name, value in PUBLIC_OVERRIDES.items()]
    config = composed(command, f"+exp={exp}", *overrides)
    for name, expected in PUBLIC_OVERRIDES.items():
        value = config
        for part in name.split("."):
            value = getattr(value, part)
        assert (value.value if isinstance(value, Enum) else value) == expected, name


@pytest.mark.parametrize("exp", EXPERIMENTS)
@pytest.mark.parametrize("command", EXPERIMENT_COMMANDS)
def test_an_experiment_is_the_same_for_every_command(command, exp):
    names = [field.name for field in dataclasses.fields(Experiment)]
    reference = composed("train", f"+exp={exp}")
    config = composed(command, f"+exp={exp}")
    assert {name: getattr(config, name) for name in names} == {name: getattr(reference, name) for name in names}
    assert config.geometry == reference.geometry


@pytest.mark.parametrize("choice", CHOICES)
def test_every_choice_composes_and_says_what_it_says(choice):
    group, name = choice.split("=")
    config = getattr(composed("train", choice), group)
    written = yaml.safe_load((CONF / group / f"{name}.yaml").read_text())
    for option, expected in written.items():
        value = getattr(config, option)
        # YAML 1.1 reads 1e-4 as text; the dataclass has the number.
        expected = float(expected) if isinstance(value, float) else expected
        assert (value.value if isinstance(value, Enum) else value) == expected, option


def test_what_commands_require():
    assert list(required("build_manifest")) == ["manifest", "source"]
    assert list(required("encode_latents")) == ["latents", "manifest"]
    assert list(required("train")) == ["latents", "run_dir"]
    assert list(required("export")) == ["adapter", "run_dir"]
    assert list(required("sample")) == ["output"]
    assert list(required("evaluate")) == ["output"]


def test_published_experiment():
    config = composed("train", "+exp=129f")
    assert config.geometry.name == "129x480x720_8fps"
    assert config.model.path.lower().endswith("cogvideox-5b")
    assert (config.lora.rank, config.lora.alpha, len(config.lora.targets)) == (64, 64.0, 8)
    assert (config.memory.zero_stage, config.data.batch_size) == (2, 1)
    assert (config.guidance_scale, config.num_inference_steps, config.seed) == (7.0, 100, 6)
    assert composed("train", "+exp=49f").num_frames == 49
    assert composed("sample", "+exp=49f_2b", "compare=true").compare


@pytest.mark.parametrize("config_class", config_classes(), ids=lambda config_class: config_class.__name__)
def test_every_option_is_documented(config_class):
    undocumented = [path for path, _, doc in walk_options(config_class) if not doc]
    assert undocumented == []


@pytest.mark.parametrize(
    ("command", "override", "words"),
    [
        ("train", "lora.rank=0", "lora.rank=0: must be from 1 to 8192; 64 is the default of exp=129f"),
        ("sample", "optim.lr=0", "optim.lr=0.0: must be above 0 and at most 1; 1e-4 is the default"),
        ("plan", "gpus=0", "gpus=0: must be at least 1"),
        ("plan", "optim.betas=[0.9,1]", "optim.betas=[0.9, 1.0]: must be at least 0 and below 1"),
        ("filter_clips", "timeout_seconds=0", "timeout_seconds=0.0: must be above 0"),
    ],
)
def test_a_number_outside_its_range_is_named_with_it(command, override, words):
    with pytest.raises(UserError) as caught:
        composed(command, override)
    assert str(caught.value) == words


@pytest.mark.parametrize("config_class", config_classes(), ids=lambda config_class: config_class.__name__)
def test_every_option_is_typed(config_class):
    loose = [
        path
        for path, kind, _ in walk_options(config_class)
        if kind is Any or (get_origin(kind) and Any in get_args(kind))
    ]
    assert loose == []


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_every_option(command):
    config_class = COMMANDS[command]
    text = help_text(config_class, compose_config(command, [], config_class), "Usage.")
    for path, _, doc in walk_options(config_class):
        assert f"\n  {path} = " in text
        assert doc.split()[0] in text
    assert max(len(line) for line in text.splitlines()) < 300
    assert "Traceback" not in text
    for name in required(command):
        assert f"\n  {name} = required" in text


@pytest.mark.parametrize("command", COMMANDS)
def test_no_config_folder_hides_an_option(command):
    # Hydra takes name=value for a choice when conf/name/ exists.
    groups = {path.name for path in CONF.iterdir() if path.is_dir()}
    top = {path for path, _, _ in walk_options(COMMANDS[command]) if "." not in path}
    assert not groups & top


def test_config_folder_is_the_checkouts():
    assert config_folder() == Path(__file__).resolve().parents[2] / "conf"
