"""``python -m exvideo_train.adapter``: what it makes of adapters, against whole matrices."""

import math
import sys
import weakref

import pytest
import torch
from diffusers import CogVideoXTransformer3DModel
from omegaconf import OmegaConf
from peft import PeftModel, get_peft_model_state_dict

from exvideo_train import adapter as command
from exvideo_train.config.commands import Train
from exvideo_train.errors import UserError
from exvideo_train.extensions import merge
from exvideo_train.extensions.adapter_file import FORMATS, read_adapter, write_adapter
from exvideo_train.extensions.adapter_names import STATES_ALPHA
from exvideo_train.extensions.lora import LoraExtension
from exvideo_train.training.checkpoint import TrainingState, step_folder, write_checkpoint

MODULES = [f"transformer_blocks.{n}.{name}" for n in (0, 1) for name in ("attn1.to_q", "ff.net.0.proj")]
SIZES = {"attn1.to_q": (64, 64), "ff.net.0.proj": (256, 64)}  # of the tiny model
PROVENANCE = {"base_model": "owner/base", "steps": 7}


def tensors_of(seed=0, rank=2):
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for module in MODULES:
        num_out, num_in = next(size for name, size in SIZES.items() if module.endswith(name))
        tensors[f"{module}.lora_A.weight"] = torch.randn(rank, num_in, generator=generator)
        tensors[f"{module}.lora_B.weight"] = torch.randn(num_out, rank, generator=generator)
    return tensors


def written(path, seed=0, rank=2, alpha=4.0, format="diffusers", tensors=None):
    tensors = tensors_of(seed, rank) if tensors is None else tensors
    write_adapter(path, format, tensors, rank, alpha, ["attn1.to_q", "ff.net.0.proj"], PROVENANCE)
    return path


def whole(path):
    """The updates as matrices."""
    adapter = read_adapter(path)
    pairs = {m: [adapter.tensors[f"{m}.{half}.weight"].double() for half in ("lora_B", "lora_A")] for m in MODULES}
    return {module: adapter.alpha / adapter.rank * up @ down for module, (up, down) in pairs.items()}


def run(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["adapter", *map(str, words)])
    command.main()


def refusal(monkeypatch, capsys, *words):
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, *words)
    assert ended.value.code == 2
    return capsys.readouterr().err


def test_any_format_becomes_any_other_and_comes_back_exactly(tmp_path, monkeypatch):
    places = {format: tmp_path / format / "adapter_model.safetensors" for format in FORMATS}
    start = whole(written(places["diffusers"]))  # alpha / rank = 2 is exact
    for format in FORMATS[1:]:
        run(monkeypatch, "convert", f"adapter={places['diffusers']}", f"format={format}", f"output={places[format]}")
    for source in FORMATS:
        for target in FORMATS:
            again = tmp_path / f"{source}_{target}" / "adapter_model.safetensors"
            run(monkeypatch, "convert", f"adapter={places[source]}", f"format={target}", f"output={again}")
            assert all(torch.equal(update, start[module]) for module, update in whole(again).items()), (source, target)
            assert read_adapter(again).provenance["base_model"] == "owner/base"
            if source == target and source in STATES_ALPHA:
                assert again.read_bytes() == places[source].read_bytes()


def test_inspect_draws_the_norm_of_each_block(tmp_path, monkeypatch, capsys):
    tensors = tensors_of()
    tensors |= {name: 0.5 * tensor for name, tensor in tensors.items() if "blocks.1" in name and "lora_B" in name}
    path = written(tmp_path / "a.safetensors", tensors=tensors)
    run(monkeypatch, "inspect", f"adapter={path}")
    lines = capsys.readouterr().out.splitlines()
    assert "LoRA rank 2, alpha 4" in lines[0]
    assert "targets, 4 Linears: attn1.to_q, ff.net.0.proj" in lines[1]
    assert "  steps: 7" in lines
    for number in (0, 1):
        (line,) = [line for line in lines if line.startswith(f"block {number} ")]
        expected = torch.cat([u.flatten() for m, u in whole(path).items() if f"blocks.{number}." in m]).norm()
        assert float(line.split()[2]) == pytest.approx(float(expected), rel=1e-3)
        assert "█" * 20 in line


def test_diff_of_two_adapters(tmp_path, monkeypatch, capsys):
    one, other = written(tmp_path / "a.safetensors"), written(tmp_path / "b.safetensors", seed=1, rank=3)
    run(monkeypatch, "diff", f"adapter={one}", f"other={other}")
    lines = capsys.readouterr().out.splitlines()
    ours, theirs = whole(one), whole(other)
    for module, line in zip(MODULES, lines[1:], strict=False):
        expected = (ours[module] - theirs[module]).norm() / ours[module].norm()
        assert line.split() == [f"{expected:.3e}", module]
    run(monkeypatch, "diff", f"adapter={one}", f"other={one}")
    assert float(capsys.readouterr().out.splitlines()[-1].split()[0]) < 1e-12


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_resize_is_the_nearest_of_that_rank_and_says_how_near(tmp_path, monkeypatch, capsys, rank):
    path, output = written(tmp_path / "a.safetensors"), tmp_path / "out.safetensors"
    run(monkeypatch, "resize", f"adapter={path}", f"rank={rank}", f"output={output}")
    before, after = whole(path), whole(output)
    assert read_adapter(output).rank == rank
    stated = {line.split()[1]: float(line.split()[0]) for line in capsys.readouterr().out.splitlines()[2:-1]}
    for module, update in before.items():
        values = torch.linalg.svdvals(update)
        nearest = float(values[rank:].norm() / values.norm())
        error = float((after[module] - update).norm() / update.norm())
        assert error == pytest.approx(nearest, abs=1e-6)
        assert stated[module] == pytest.approx(error, abs=1e-3 * nearest + 1e-6)
    if rank > 2:
        # Room that training can fill: a zero A and B would have no gradient.
        assert read_adapter(output).tensors[f"{MODULES[0]}.lora_A.weight"][2].abs().min() > 0


def test_average_of_updates_and_of_factors(tmp_path, monkeypatch, capsys):
    one, other, output = written(tmp_path / "a.safetensors"), written(tmp_path / "b.safetensors", 1), tmp_path / "m"
    output = output.with_suffix(".safetensors")
    words = (f"adapters=[{one},{other}]", f"output={output}", "shares=[0.25,0.75]")
    run(monkeypatch, "average", *words, "rank=4")
    mean = {module: 0.25 * update + 0.75 * whole(other)[module] for module, update in whole(one).items()}
    for module, update in whole(output).items():
        torch.testing.assert_close(update, mean[module], rtol=1e-5, atol=1e-5)
    assert "factors" in refusal(monkeypatch, capsys, "average", *words, "of=factors")
    near = written(tmp_path / "c.safetensors", tensors={n: t + 1e-3 for n, t in tensors_of().items()})
    run(monkeypatch, "average", f"adapters=[{one},{near}]", f"output={output}", "of=factors")
    expected = tensors_of()[f"{MODULES[0]}.lora_A.weight"] + 5e-4
    torch.testing.assert_close(read_adapter(output).tensors[f"{MODULES[0]}.lora_A.weight"], expected)
    assert "add up to 1" in refusal(monkeypatch, capsys, "average", *words[:2], "shares=[1,1]")
    assert "two or more" in refusal(monkeypatch, capsys, "average", f"adapters=[{one}]", words[1])


def test_merge_holds_one_tensor_at_a_time(tmp_path, monkeypatch, tiny_model_5b):
    made, added = [], merge._added

    def watched(*arguments):
        for tensor in added(*arguments):
            made.append(weakref.ref(tensor))
            yield tensor
            del tensor
            # The one that was just written may not be gone yet.
            assert sum(reference() is not None for reference in made) <= 2

    monkeypatch.setattr(merge, "_added", watched)
    path = written(tmp_path / "a.safetensors")
    run(monkeypatch, "merge", f"adapter={path}", f"model_path={tiny_model_5b}", f"output={tmp_path / 'merged'}")
    assert len(made) > 50


def test_checkpoints_and_their_moving_averages_are_averaged(tmp_path, monkeypatch):
    config = OmegaConf.to_container(OmegaConf.structured(Train(latents="l", run_dir="r")), enum_to_str=True)
    config["lora"] |= {"rank": 2, "alpha": 4.0, "targets": ["attn1.to_q", "ff.net.0.proj"]}
    for step, seed in ((1, 0), (2, 1)):
        files = {"lora": tensors_of(seed=5), "ema": tensors_of(seed)}
        write_checkpoint(step_folder(tmp_path, step), TrainingState(step, step, step, 0, config), files)
    folders, output = f"[{step_folder(tmp_path, 1)},{tmp_path}]", tmp_path / "mean.safetensors"
    run(monkeypatch, "average", f"adapters={folders}", "weights=ema", f"output={output}", "rank=4")
    one, other = (whole(written(tmp_path / f"{seed}.safetensors", seed)) for seed in (0, 1))
    for module, update in whole(output).items():
        torch.testing.assert_close(update, (one[module] + other[module]) / 2, rtol=1e-5, atol=1e-5)
    assert read_adapter(output).provenance["steps"] == 2


def test_an_average_after_the_run_is_that_of_a_course_in_jumps(tmp_path, monkeypatch, capsys):
    """Against the moving average itself, step by step, of weights that jump at each checkpoint."""
    files = {}
    for step, seed in ((30, 0), (10, 1), (60, 2)):
        files[step] = tmp_path / f"{step}.safetensors"
        about = {"base_model": "owner/base", "steps": step}
        write_adapter(files[step], "diffusers", tensors_of(seed), 2, 4.0, ["attn1.to_q", "ff.net.0.proj"], about)
    output, decay = tmp_path / "mean.safetensors", math.exp(-1 / 20)
    words = ("average", f"adapters=[{','.join(map(str, files.values()))}]", f"output={output}", "rank=6")
    run(monkeypatch, *words, "ema_steps=20")
    mean = dict.fromkeys(MODULES, 0.0)
    whole_at = {step: whole(file) for step, file in files.items()}
    # The first point for all of the past, so that nothing is left of a beginning.
    for step in range(-1000, 61):
        at = whole_at[next(point for point in sorted(files) if step <= point)]
        mean = {module: decay * mean[module] + (1 - decay) * at[module] for module in MODULES}
    for module, update in whole(output).items():
        torch.testing.assert_close(update, mean[module], rtol=1e-4, atol=1e-5)
    assert "leave shares" in refusal(monkeypatch, capsys, *words, "ema_steps=20", "shares=[0.2,0.3,0.5]")
    twice = f"adapters=[{files[10]},{files[10]}]"
    assert "points of one run" in refusal(monkeypatch, capsys, "average", twice, f"output={output}", "ema_steps=20")


def test_merge_is_that_of_peft_in_the_published_shards(tmp_path, monkeypatch, capsys, tiny_model_5b):
    path, output = written(tmp_path / "a.safetensors"), tmp_path / "merged"
    words = ("merge", f"adapter={path}", f"model_path={tiny_model_5b}", f"output={output}")
    run(monkeypatch, *words)
    source, folder = tiny_model_5b / "transformer", output / "transformer"
    assert {file.name for file in folder.iterdir()} == {file.name for file in source.iterdir()}
    index = "diffusion_pytorch_model.safetensors.index.json"
    assert (folder / index).read_text().split() == (source / index).read_text().split()
    theirs = CogVideoXTransformer3DModel.from_pretrained(source, torch_dtype=torch.bfloat16)
    written(tmp_path / "peft" / "adapter_model.safetensors", format="peft")
    theirs = PeftModel.from_pretrained(theirs, tmp_path / "peft")
    expected = theirs.merge_and_unload().state_dict()
    merged = CogVideoXTransformer3DModel.from_pretrained(folder, torch_dtype=torch.bfloat16).state_dict()
    base = CogVideoXTransformer3DModel.from_pretrained(source, torch_dtype=torch.bfloat16).state_dict()
    assert merged.keys() == expected.keys()
    changed = [name for name in merged if not torch.equal(merged[name], base[name])]
    assert sorted(changed) == sorted(f"{module}.weight" for module in MODULES)
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, expected[name], rtol=2**-7, atol=1e-6)
    assert "has a transformer/ already" in refusal(monkeypatch, capsys, *words)
    odd = written(tmp_path / "odd.safetensors", tensors={n.replace("s.1.", "s.9."): t for n, t in tensors_of().items()})
    words = ("merge", f"adapter={odd}", f"model_path={tiny_model_5b}", f"output={tmp_path / 'odd'}")
    assert "blocks.9.attn1.to_q" in refusal(monkeypatch, capsys, *words)
    assert not (tmp_path / "odd").exists()


def test_peft_loads_its_folder_and_we_load_what_peft_saves(tmp_path, tiny_model_5b):
    written(tmp_path / "ours" / "adapter_model.safetensors", format="peft")
    network = CogVideoXTransformer3DModel.from_pretrained(tiny_model_5b / "transformer")
    theirs = PeftModel.from_pretrained(network, tmp_path / "ours")
    loaded = {name.removeprefix("base_model.model."): t for name, t in get_peft_model_state_dict(theirs).items()}
    # The tiny model has three blocks, the adapter two: PEFT fills the third with zeros in B.
    for name, tensor in tensors_of().items():
        assert torch.equal(loaded[name].float(), tensor)
    assert theirs.peft_config["default"].lora_alpha == 4.0
    theirs.save_pretrained(tmp_path / "theirs")
    read = read_adapter(tmp_path / "theirs")
    assert (read.rank, read.alpha) == (2, 4.0)
    assert torch.equal(read.tensors[f"{MODULES[0]}.lora_A.weight"], tensors_of()[f"{MODULES[0]}.lora_A.weight"])


def test_an_unknown_action_is_told(monkeypatch, capsys):
    assert "'shrink' is none of inspect, convert" in refusal(monkeypatch, capsys, "shrink")


def test_training_begins_from_a_file_that_fits(tmp_path):
    path = written(tmp_path / "a.safetensors", format="kohya")
    options = {"rank": 2, "alpha": 4.0, "targets": ["attn1.to_q", "ff.net.0.proj"], "init": str(path)}
    initial = LoraExtension.from_options({"lora": options}).initial("cogvideox")
    assert torch.equal(initial.tensors[f"{MODULES[0]}.lora_B.weight"], tensors_of()[f"{MODULES[0]}.lora_B.weight"])
    assert LoraExtension.from_options({"lora": options | {"init": None}}).initial("cogvideox") is None
    for change, message in (
        ({"rank": 8}, r"rank 2, the run has lora\.rank=8"),
        ({"alpha": 2.0}, r"alpha 4, the run has lora\.alpha=2"),
        ({"targets": ["attn1.to_q"]}, r"updates attn1\.to_q, ff\.net\.0\.proj; the run has lora\.targets=attn1\.to_q:"),
        ({"targets": ["attn1.to_q", "ff.net.0.proj", "ff.net.2"]}, r"lora\.targets=.*ff\.net\.2: they must"),
        ({"init": str(tmp_path / "none")}, "does not exist"),
    ):
        with pytest.raises(UserError, match=message):
            LoraExtension.from_options({"lora": options | change}).initial("cogvideox")
