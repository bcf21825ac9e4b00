"""What the commands give must not move: part of `record.py` again, and the files in `made_before/` used again.

`expected.json` and `trained.json` hold what is compared. What does not depend on the processor (names, shapes, counts,
options, composed configs, fingerprints, manifests, the plan's figures, an adapter's bytes) is compared exactly. Losses,
latents and frames are not the same to the last bit on every processor: the tolerances below stand with what was seen
between instruction sets. After a change that is meant to move something, write both files anew and read their
differences before they are committed:

    EXVIDEO_GOLDEN_WRITE=1 python -m pytest tests/golden

`made_before/` is never written anew: it stands for what users have. Its README says how it was made.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.trained import Trained

from golden import contents
from golden.commands import run_commands
from golden.record import (
    BUILD,
    COMMANDS,
    ENCODE,
    EXPORT,
    FILTER,
    INSPECT,
    PLAN,
    SAMPLE,
    TRAIN,
    WITH_EXPERIMENT,
    of_options,
    of_plan,
)

HERE = Path(__file__).resolve().parent
EXPERIMENT = ["+exp=demo", "model.path=model", "num_frames=9", "height=32", "width=48", "fps=8"]
RUN = ["latents=latents", "run_dir=run", "lora.rank=1", "lora.alpha=0.5", "optim.lr=0.01", "optim.ema_decay=0.9"]
RUN += ["data.held_out_clips=2", "validation.every_steps=2", "checkpoint.every_steps=2"]
FORMATS = ("diffusers", "diffsynth", "comfyui")
SAMPLERS = ("ddim", "dpm")


def expected(name: str, now: Any, file: str = "expected.json") -> Any:
    """The recorded value; with EXVIDEO_GOLDEN_WRITE=1, the present one, recorded."""
    path = HERE / file
    now = json.loads(json.dumps(now))
    if os.environ.get("EXVIDEO_GOLDEN_WRITE") != "1":
        return json.loads(path.read_text())[name]
    recorded = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(recorded | {name: now}, indent=1, sort_keys=True) + "\n")
    return now


def check_equal(name: str, now: Any) -> None:
    found = contents.differences(expected(name, now), json.loads(json.dumps(now)), name)
    assert not found, "recorded | now:\n" + "\n".join(found)


def check_close(recorded: Any, now: Any, relative: float, absolute: float, where: str) -> None:
    """Floats within the tolerance, everything else equal."""
    if isinstance(recorded, float) and isinstance(now, float):
        assert now == pytest.approx(recorded, rel=relative, abs=absolute), where
    elif isinstance(recorded, dict) and isinstance(now, dict):
        assert list(recorded) == list(now) or sorted(recorded) == sorted(now), where
        for key, value in recorded.items():
            check_close(value, now[key], relative, absolute, f"{where}/{key}")
    elif isinstance(recorded, list) and isinstance(now, list):
        assert len(recorded) == len(now), where
        for index, (one, other) in enumerate(zip(recorded, now, strict=True)):
            check_close(one, other, relative, absolute, f"{where}/{index}")
    else:
        assert recorded == now, where


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what the earlier version has made."""
    return shutil.copytree(HERE / "made_before", tmp_path_factory.mktemp("golden") / "before")


@pytest.fixture(scope="module")
def results(before: Path) -> dict[str, Any]:
    """All commands that need no process of their own, on the earlier version's files."""
    jobs = {}
    for name, command in COMMANDS.items():
        jobs[f"{name} --help"] = [*command, *(["+exp=129f"] if name in WITH_EXPERIMENT else []), "--help"]
    jobs["train --cfg job"] = [TRAIN, "+exp=demo", "--cfg", "job"]
    jobs["plan"] = [*PLAN, "+exp=49f_2b", "memory=keep_attention", "json=plan.json"]
    for name in FORMATS:
        jobs[name] = [*EXPORT, "run_dir=run", f"format={name}", f"adapter=again.{name}.safetensors"]
    jobs["ema"] = [*EXPORT, "run_dir=run", "weights=ema", "step=2", "adapter=again.ema.safetensors"]
    jobs["verify"] = [*INSPECT, "verify", "latents=latents", "repair=false"]
    for sampler, adapter in zip(SAMPLERS, ("diffusers", "diffsynth"), strict=True):
        jobs[sampler] = [*SAMPLE, *EXPERIMENT, "model.dtype=fp32", "num_inference_steps=2", f"scheduler={sampler}"]
        jobs[sampler] += [f"adapter={adapter}.safetensors", "compare=true", "prompt=A rabbit", f"output={sampler}"]
    return dict(zip(jobs, run_commands(list(jobs.values()), before), strict=True))


def test_options_and_composed_configs(results: dict[str, Any]) -> None:
    """Every option's name, type and value as composed with an experiment."""
    names = [name for name in results if name.endswith(("--help", "--cfg job"))]
    check_equal("options", {name: of_options(results[name]) for name in names})


def test_figures_of_the_plan(results: dict[str, Any], before: Path) -> None:
    """Computed from shapes, so exact everywhere; one kernel more or less in a version of torch may move them."""
    check_equal("plan", of_plan(before, results["plan"])["figures"])


def test_manifest_and_filter(run_command: Any, clip_path: Path, before: Path) -> None:
    folder = before / "manifest"
    folder.mkdir()
    build = ["source=internvid", f"metadata={before / 'internvid.jsonl'}", f"videos={clip_path.parent}"]
    run_command([BUILD, *build, "manifest=clips.jsonl"], cwd=folder)
    run_command([FILTER, *EXPERIMENT, "manifest=clips.jsonl", "output=kept.jsonl", "num_workers=1"], cwd=folder)
    names = ("clips.jsonl", "clips.dropped.jsonl", "kept.jsonl")
    text = {name: (folder / name).read_text().replace(str(clip_path.parent), "VIDEOS") for name in names}
    check_equal("manifest", text)
    dropped = [{**entry, "video": ""} for entry in contents.lines(folder / "kept.dropped.jsonl")]
    assert dropped
    # Measured on pictures that a decoder gives, and rounded to four places.
    check_close(expected("dropped", dropped), dropped, 0.01, 0.01, "dropped")


def test_a_store_made_before_is_whole(results: dict[str, Any]) -> None:
    assert results["verify"]["status"] == 0, results["verify"]
    assert "the store is whole" in results["verify"]["stdout"]


def test_a_store_made_before_is_gone_on_with(run_command: Any, clip_path: Path, tmp_path: Path) -> None:
    """A clip that it lacks is encoded to the same, the others are taken as they are."""
    folder = shutil.copytree(HERE / "made_before", tmp_path / "before")
    latents = folder / "latents"
    lacking, *others = sorted((latents / "clips" / "9x32x48_8fps").rglob("*.safetensors"))
    kept = {path: path.read_bytes() for path in others}
    old, old_header = load_file(lacking), contents.safetensors(lacking)
    lacking.unlink()
    build = ["source=internvid", "metadata=internvid.jsonl", f"videos={clip_path.parent}", "manifest=clips.jsonl"]
    run_command([BUILD, *build, "probe=false"], cwd=folder)
    result = run_command([ENCODE, *EXPERIMENT, "manifest=clips.jsonl", "latents=latents", "device=cpu"], cwd=folder)
    assert {path: path.read_bytes() for path in others} == kept
    assert "encoded      1\n" in result.stdout
    new, new_header = load_file(lacking), contents.safetensors(lacking)
    for header in (old_header, new_header):
        header["metadata"]["exvideo_train"].pop("sha256")
    assert new_header["metadata"] == old_header["metadata"]
    assert new_header["order"] == old_header["order"]
    for name, tensor in old.items():
        assert new[name].dtype == tensor.dtype
        # 0.02 apart between AVX-512 and SSE4.1: bf16 has 8 bits.
        torch.testing.assert_close(new[name].float(), tensor.float(), rtol=0.03, atol=0.03)
    made = HERE / "made_before" / "latents"
    assert (latents / "store.json").read_bytes() == (made / "store.json").read_bytes()
    entries = [[{**entry, "sha256": ""} for entry in contents.lines(path / "index.jsonl")] for path in (latents, made)]
    assert entries[0] == entries[1]


def test_a_run_made_before_goes_on(run_command: Any, tmp_path: Path) -> None:
    """Two more steps on two ranks, from the earlier version's checkpoint and store."""
    folder = shutil.copytree(HERE / "made_before", tmp_path / "before")
    train = ["deepspeed", "--num_gpus", "2", TRAIN, *EXPERIMENT, *RUN, "max_steps=4"]
    result = run_command(train, cwd=folder)
    assert "from step 2 (run/checkpoints/step_00000002) to 4" in result.stdout, result
    records = contents.run(folder / "run")["metrics"]
    made = contents.metrics(HERE / "made_before" / "run")
    assert records[: len(made)] == made, "records of earlier steps stay"
    # Between AVX-512 and SSE4.1 this bf16 network's losses were 6e-5 apart, validations 3e-4, gradient norms 9e-4.
    check_close(expected("continued", records), records, 3e-3, 0.0, "continued")
    adapter = load_file(folder / "run" / "adapter.safetensors")
    old = load_file(HERE / "made_before" / "run" / "adapter.safetensors")
    assert adapter.keys() == old.keys()
    assert all(not torch.equal(adapter[name], tensor) for name, tensor in old.items()), "two steps move every tensor"


@pytest.mark.parametrize("name", [*FORMATS, "ema"])
def test_an_adapter_is_exported_to_the_same_bytes(name: str, results: dict[str, Any], before: Path) -> None:
    """The run was made before; what is computed, alpha / rank = 1/2 folded into B, is exact on every processor."""
    assert results[name]["status"] == 0, results[name]
    old = contents.safetensors(before / ("run/adapter_ema.safetensors" if name == "ema" else f"{name}.safetensors"))
    new = contents.safetensors(before / f"again.{name}.safetensors")
    assert not contents.differences(old, new)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_videos_of_an_adapter_made_before(sampler: str, results: dict[str, Any], before: Path) -> None:
    """With and without the adapter, in fp32."""
    assert results[sampler]["status"] == 0, results[sampler]
    decoded = results[sampler]["decoded"]
    assert len(decoded) == 2
    assert decoded[0]["latents"]["sha256"] != decoded[1]["latents"]["sha256"], "the adapter does something"
    left = contents.folder_of_videos(before / sampler)
    now = {
        "decoded": [
            {part: {key: of[part][key] for key in of[part] if key != "sha256"} for part in of} for of in decoded
        ],
        "names": left["names"],
        "videos": {
            name: {key: video[key] for key in ("num_frames", "size", "rate", "codec")}
            for name, video in left.items()
            if name.endswith(".mp4")
        },
        "prompts": [record["prompt"] for record in left["records"].values()],
    }
    # 2e-5 apart between AVX-512 and SSE4.1; single values may lie near zero.
    check_close(expected(sampler, now), json.loads(json.dumps(now)), 1e-3, 1e-3, sampler)


def test_trainings_follow_their_recorded_course(trained: Trained) -> None:
    """Losses, norms, rates, positions, clips and validations of the runs on two ranks that others use too, all fp32."""
    now = {}
    for name, result in sorted(trained.two.items()):
        # A run that goes on in another's folder is recorded with that one.
        if (trained.run_dir(name) / "metrics.jsonl").exists():
            taken = hashlib.sha256(json.dumps(result["by_rank"]).encode()).hexdigest()
            now[name] = {"metrics": contents.metrics(trained.run_dir(name)), "clips_sha256": taken}
    recorded = expected("trainings", now, "trained.json")
    assert not set(recorded) - set(now), "runs are no longer made; new ones are recorded when the file is written anew"
    now = json.loads(json.dumps({name: now[name] for name in recorded}))
    # Between AVX-512 and SSE4.1 losses and validations were 3e-6 apart, gradient norms 3e-5.
    check_close(recorded, now, 1e-4, 0.0, "trained")
