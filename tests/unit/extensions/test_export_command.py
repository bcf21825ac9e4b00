"""``python -m exvideo_train.export``: which adapter of a run is taken, and in which format."""

import dataclasses
import json
from unittest.mock import create_autospec

import huggingface_hub
import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file

from exvideo_train.adapter import convert
from exvideo_train.config.adapter import AdapterConvert
from exvideo_train.config.commands import AdapterFormat, Export, Train, Weights
from exvideo_train.errors import UserError
from exvideo_train.export import export, find_trained
from exvideo_train.extensions.adapter_file import read_adapter, write_adapter
from exvideo_train.extensions.model_card import write_card
from exvideo_train.extensions.provenance import make_provenance
from exvideo_train.geometry import Geometry
from exvideo_train.training.checkpoint import TrainingState, step_folder, write_checkpoint

NAME = "transformer_blocks.0.attn1.to_q"
TARGETS = ["attn1.to_q"]


def tensors_of(value):
    return {f"{NAME}.lora_A.weight": torch.full((2, 4), value), f"{NAME}.lora_B.weight": torch.ones(4, 2)}


def value_of(adapter):
    return adapter.tensors[f"{NAME}.lora_A.weight"][0, 0].item()


def write_final(run_dir, step, value, name="adapter.safetensors"):
    provenance = make_provenance("base/model", "cogvideox", Geometry(129, 64, 96, 8), steps=step)
    write_adapter(run_dir / name, "diffusers", tensors_of(value), 2, 3.0, TARGETS, provenance)


def write_step(run_dir, step, value, ema=None):
    config = OmegaConf.to_container(OmegaConf.structured(Train(latents="l", run_dir="r")), enum_to_str=True)
    config["lora"] |= {"rank": 2, "alpha": 3.0, "targets": TARGETS}
    files = {"lora": tensors_of(value)} | ({} if ema is None else {"ema": tensors_of(ema)})
    write_checkpoint(step_folder(run_dir, step), TrainingState(step, step, step, 0, config), files)


@pytest.fixture
def run_dir(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    return folder


def test_the_finished_run_before_its_checkpoints(run_dir):
    write_step(run_dir, 10, 1.0)
    write_final(run_dir, 10, 2.0)
    adapter, source = find_trained(run_dir, Weights.raw, None)
    assert (value_of(adapter), source.name) == (2.0, "adapter.safetensors")


def test_a_run_that_went_on_before_its_old_adapter(run_dir):
    write_final(run_dir, 10, 2.0)
    write_step(run_dir, 15, 3.0)
    adapter, source = find_trained(run_dir, Weights.raw, None)
    assert (value_of(adapter), source.name) == (3.0, "step_00000015")
    assert adapter.extension.alpha == 3.0
    assert adapter.provenance["steps"] == 15
    assert adapter.provenance["num_frames"] == 129


def test_a_named_step(run_dir):
    write_step(run_dir, 5, 1.0)
    write_step(run_dir, 10, 2.0)
    write_final(run_dir, 12, 3.0)
    assert value_of(find_trained(run_dir, Weights.raw, 5)[0]) == 1.0
    assert value_of(find_trained(run_dir, Weights.raw, 12)[0]) == 3.0
    with pytest.raises(UserError, match=r"step=7: .* 5, 10, 12"):
        find_trained(run_dir, Weights.raw, 7)


def test_moving_average(run_dir):
    write_step(run_dir, 5, 1.0, ema=4.0)
    adapter, _ = find_trained(run_dir, Weights.ema, None)
    assert value_of(adapter) == 4.0
    assert adapter.provenance["weights"] == "ema"
    write_final(run_dir, 5, 5.0, "adapter_ema.safetensors")
    assert value_of(find_trained(run_dir, Weights.ema, None)[0]) == 5.0
    write_step(run_dir, 6, 1.0)
    with pytest.raises(UserError, match="ema"):
        find_trained(run_dir, Weights.ema, None)


def test_a_damaged_newest_checkpoint_is_passed_over(run_dir, capsys):
    write_step(run_dir, 5, 1.0)
    write_step(run_dir, 10, 2.0)
    (step_folder(run_dir, 10) / "lora.safetensors").write_bytes(b"x")
    assert value_of(find_trained(run_dir, Weights.raw, None)[0]) == 1.0
    assert "step_00000010" in capsys.readouterr().out


def test_nothing_to_export(run_dir, tmp_path):
    with pytest.raises(UserError, match="no checkpoint"):
        find_trained(run_dir, Weights.raw, None)
    with pytest.raises(UserError, match=r"run_dir=.*nowhere"):
        find_trained(tmp_path / "nowhere", Weights.raw, None)


@pytest.mark.parametrize("format", ["diffusers", "diffsynth"])
def test_formats_as_a_command(run_dir, tmp_path, run_command, format):
    write_final(run_dir, 10, 2.0)
    target = tmp_path / "out" / "a.safetensors"
    result = run_command(["-m", "exvideo_train.export", f"run_dir={run_dir}", f"format={format}", f"adapter={target}"])
    assert str(target) in result.stdout
    adapter = read_adapter(target)
    assert adapter.provenance["adapter_format"] == format
    assert (adapter.provenance["alpha"], adapter.provenance["steps"]) == (3.0, 10)
    up = load_file(target)[
        "blocks.0.attn1.to_q.lora_B.default.weight" if format == "diffsynth" else f"transformer.{NAME}.lora_B.weight"
    ]
    assert up[0, 0] == (1.0 if format == "diffusers" else 1.5)


def test_exporting_twice_is_equal_bytes(run_dir, tmp_path):
    write_step(run_dir, 10, 2.0)
    config = Export(run_dir=str(run_dir), adapter=str(tmp_path / "a.safetensors"))
    export(config)
    export(dataclasses.replace(config, adapter=str(tmp_path / "b.safetensors")))
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("argument", "message"),
    [("format=tomorrow", "format=tomorrow"), ("adapter=a.pt", ".safetensors"), ("weights=both", "weights=both")],
)
def test_mistakes_end_in_one_line(run_dir, run_command, argument, message):
    write_final(run_dir, 10, 2.0)
    command = ["-m", "exvideo_train.export", f"run_dir={run_dir}", "adapter=a.safetensors"]
    result = run_command(
        [word for word in command if word.split("=")[0] != argument.split("=")[0]] + [argument], status=2
    )
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_provenance_is_readable_json(run_dir):
    write_step(run_dir, 10, 2.0)
    assert json.loads(json.dumps(find_trained(run_dir, Weights.raw, None)[0].provenance))["base_model"]


@pytest.fixture
def hub(monkeypatch):
    """Calls of the hub's client, checked against its own signatures; none leaves the machine."""
    api = create_autospec(huggingface_hub.HfApi, instance=True)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: api)
    return api


def test_a_card_says_what_the_run_knows_and_goes_to_the_hub(run_dir, tmp_path, hub):
    write_step(run_dir, 10, 1.0)
    records = [{"step": 1, "loss": 0.5, "validation": {"loss": 0.9, "by_position": [], "num_clips": 3}}]
    records += [{"step": 10, "loss": 0.25, "epoch": 0.5}, {"step": 11, "loss": 0.125}]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (run_dir / "curves.png").write_bytes(b"a picture")
    target = tmp_path / "out" / "a.safetensors"
    found = {"measure": "sharpness", "num_pairs": 40, "mean": 2.0, "baseline_mean": 1.0, "difference": 1.0}
    found |= {"low": 0.5, "high": 1.5, "p_value": 1e-6, "verdict": "better", "num_needed": 9}
    results = {"measures": {"sharpness": {"title": "Sharpness | end", "unit": ""}}, "comparisons": {"with": [found]}}
    (tmp_path / "results.json").write_text(json.dumps(results))
    export(Export(run_dir=str(run_dir), adapter=str(target), push="me/mine", evaluation=str(tmp_path)))
    card = target.with_name("README.md").read_text()
    for words in (
        "| steps | `10` |",
        "| samples seen | `10` |",
        "| epochs | `0.5` |",
        "| held-out clips | `3` |",
        "| training loss, last | `0.25` |",
        "LoRA rank 2, alpha 3",
        'load_lora_weights("me/mine", weight_name="a.safetensors")',
        "format=diffsynth",
        "![Curves of the training](<a_curves.png>)",
        "| Sharpness end | with: 2 | 1 | +1 (0.5 to 1.5) | 40 | better |",
    ):
        assert words in card
    hub.create_repo.assert_called_once_with("me/mine", repo_type="model", private=True, exist_ok=True)
    upload = hub.upload_folder.call_args.kwargs
    assert (upload["repo_id"], upload["repo_type"], upload["folder_path"]) == ("me/mine", "model", target.parent)
    assert upload["allow_patterns"] == ["a.safetensors", "README.md", "a_curves.png"]
    # Its own card may be written again, another README may not.
    export(Export(run_dir=str(run_dir), adapter=str(target), card=True))
    target.with_name("README.md").write_text("mine")
    with pytest.raises(UserError, match=r"card=true would write over .*README\.md"):
        export(Export(run_dir=str(run_dir), adapter=str(target), card=True))
    assert target.with_name("README.md").read_text() == "mine"


def test_a_push_that_fails_leaves_the_files(run_dir, tmp_path, hub):
    write_step(run_dir, 10, 1.0)
    target = tmp_path / "out" / "a.safetensors"
    with pytest.raises(UserError, match=r"push=mine: must be owner/name"):
        export(Export(run_dir=str(run_dir), adapter=str(target), push="mine"))
    assert not target.exists()
    hub.upload_folder.side_effect = OSError("no network")
    with pytest.raises(UserError, match=r"push=me/mine: not uploaded \(no network\); the files stay in"):
        export(Export(run_dir=str(run_dir), adapter=str(target), push="me/mine"))
    assert target.exists()


def test_a_card_holds_nothing_that_a_name_could_make_of_it(tmp_path):
    about = {"base_model": "a`\n# <script>|[x](y)", "num_frames": 9, "height": 64, "width": 96, "fps": 8.0}
    write_card(tmp_path / "a.safetensors", "kohya", about, {})
    text = (tmp_path / "README.md").read_text()
    assert "<script>" not in text.replace(json.dumps(about["base_model"]), "")
    assert "| base model | `a # script x (y)` |" in text


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "not what evaluate writes"),
        ("[]", "not what evaluate writes"),
        ('{"measures": {}, "comparisons": {"a": [{"measure": "b"}]}}', "not what evaluate writes"),
        (None, "does not exist"),
    ],
)
def test_an_evaluation_that_is_none_is_refused_before_anything_is_written(run_dir, tmp_path, text, says):
    write_step(run_dir, 10, 1.0)
    target, results = tmp_path / "out" / "a.safetensors", tmp_path / "results.json"
    if text is not None:
        results.write_text(text)
    with pytest.raises(UserError, match=rf"{results}.*{says}"):
        export(Export(run_dir=str(run_dir), adapter=str(target), card=True, evaluation=str(results)))
    assert not target.exists()
    with pytest.raises(UserError, match="set card=true"):
        Export(run_dir="r", adapter="a", evaluation="e")


@pytest.mark.parametrize(("base", "licence"), [("zai-org/CogVideoX-2b", "apache-2.0"), ("/my/model", "")])
def test_a_converted_file_has_a_card_with_the_licence_of_its_base(run_dir, tmp_path, base, licence, hub):
    write_step(run_dir, 10, 1.0)
    trained, _ = find_trained(run_dir, Weights.raw, None)
    source, target = tmp_path / "a.safetensors", tmp_path / "out" / "b.safetensors"
    provenance = {**trained.provenance, "base_model": base}
    trained.extension.write(source, "diffusers", trained.tensors, provenance)
    convert(AdapterConvert(adapter=str(source), output=str(target), format=AdapterFormat.kohya, push="me/mine"))
    card = target.with_name("README.md").read_text()
    assert (f'license: "{licence}"' in card) == bool(licence)
    assert f"| licence of the base model | `{licence or 'not known here'}` |" in card
    assert hub.upload_folder.call_args.kwargs["allow_patterns"] == ["b.safetensors", "README.md"]
