"""Record what the commands give at small size, to prove that a change moves nothing.

    export PYTHONPATH=tests
    python -m golden.record record before.json        # about ten minutes on two idle cores
    python -m golden.record record after.json
    python -m golden.record compare before.json after.json

Equal means equal bits, on one machine: latents, losses, checkpoints, adapters, sampled latents and frames, the plan's
figures, manifests, options and composed configs. Everything comes from commands as users run them and from the files
they leave, so that the package may change inside. The only name of the package's inside is TINY_MODEL.
"""

from __future__ import annotations

import argparse
import csv
import fcntl
import json
import platform
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from importlib.metadata import version
from pathlib import Path
from typing import Any

import av
import numpy as np

from golden import contents
from golden.commands import REPOSITORY, environment, run_commands

# The module that writes a tiny model: the one name of the package's inside.
TINY_MODEL = "exvideo_train.models.cogvideox.tiny"
# One folder for all recordings: clip ids of source=folder are made of absolute paths.
FOLDER = Path("/tmp/exvideo_train_golden")
EXAMPLE = REPOSITORY / "examples" / "clips" / "bigbuckbunny.mp4"
MODELS = {"5b": "model_5b", "2b": "model_2b"}

BUILD, FILTER = "data_prep/build_manifest.py", "data_prep/filter_clips.py"
ENCODE, TRAIN = "data_prep/encode_latents.py", "launch/train.py"
EXPORT, SAMPLE = ["-m", "exvideo_train.export"], ["-m", "exvideo_train.sample"]
PLAN, INSPECT = ["-m", "exvideo_train.plan"], ["-m", "exvideo_train.latents"]

COMMANDS: dict[str, list[str]] = {
    "build_manifest": [BUILD],
    "filter_clips": [FILTER],
    "encode_latents": [ENCODE],
    "train": [TRAIN],
    "export": EXPORT,
    "sample": SAMPLE,
    "plan": PLAN,
    "inspect_latents": INSPECT,
}
WITH_EXPERIMENT = ("filter_clips", "encode_latents", "train", "sample", "plan")
EXPERIMENTS = [f"+exp={path.stem}" for path in sorted((REPOSITORY / "conf" / "exp").glob("*.yaml"))]
CHOICES = [
    f"{group}={path.stem}"
    for group in ("model", "lora", "optim", "data", "memory", "parallel", "logger")
    for path in sorted((REPOSITORY / "conf" / group).glob("*.yaml"))
]
PLANS = [[f"+exp={name}", f"gpus={gpus}"] for name in ("129f", "49f", "129f_2b", "257f") for gpus in (1, 8)] + [
    ["+exp=129f", "measures=true"],
    ["+exp=257f", "gpus=16", "device=h100", "memory=zero3", "price=2.5"],
    ["+exp=129f", "device=rtx4090", "optim.ema_decay=0.9"],
]

SHORT = ["num_frames=17", "fps=8"]
BASE = ["num_frames=49", "fps=25"]
LONG = ["num_frames=57", "fps=25"]
VALIDATED = ["data.held_out_clips=2", "validation.every_steps=4", "checkpoint.every_steps=4", "checkpoint.keep_last=9"]
RUN_5B = [*LONG, *VALIDATED, "max_steps=12", "lora.alpha=4", "optim.ema_decay=0.9", "optim.lr=0.01"]
RUN_5B += ["data.caption_dropout=0.3"]
# One training a way of computing: {name: (kind of model, options)}.
TRAININGS: dict[str, tuple[str, list[str]]] = {
    "run_5b": ("5b", [*RUN_5B, "data.num_workers=1"]),
    "run_2b": (
        "2b",
        [
            *[*BASE, *VALIDATED, "max_steps=12"],
            *["data.geometries=[17x64x96_8fps,49x64x96_25fps]", "data.token_budget=312", "parallel.sequence=2"],
            *["lora.dropout=0.1", "memory.recompute=keep_attention", "memory.zero_stage=1"],
            *["optim.accumulation_steps=2", "optim.schedule=cosine", "optim.warmup_steps=3"],
            "optim.gradient_clip=0.02",
        ],
    ),
    "zero3": (
        "5b",
        [
            *[*SHORT, *VALIDATED, "max_steps=6"],
            *["memory.zero_stage=3", "memory.recompute=none", "memory.attention=math", "model.dtype=fp32"],
            *["data.batch_size=2", "optim.ema_decay=0.5", "lora.targets=[attn1.to_q,ff.net.2]"],
        ],
    ),
    "offloaded": ("2b", [*SHORT, "max_steps=4", "memory.offload_optimizer=true", "model.dtype=fp32"]),
    "resumed": ("5b", [*RUN_5B, "resume=run_5b/checkpoints/step_00000008"]),
}
SAMPLES: dict[str, list[str]] = {
    "ddim": ["model.path=model_5b", "scheduler=ddim", "adapter=run_5b.diffusers.raw.safetensors", "compare=true"],
    "dpm": ["model.path=model_5b", "scheduler=dpm", "adapter=run_5b.diffsynth.ema.safetensors", "compare=true"],
    "scaled": [
        *["model.path=model_5b", "scheduler=dpm", "adapter=run_5b.comfyui.raw.safetensors:0.5"],
        *["batched_guidance=false", "vae_tiling=true", "model.dtype=fp32"],
    ],
    "plain": ["model.path=model_5b", "scheduler=ddim", "guidance_scale=1", "seed=7"],
    "ddim_2b": ["model.path=model_2b", "scheduler=ddim", "adapter=run_2b.diffusers.raw.safetensors", "compare=true"],
    "dpm_2b": ["model.path=model_2b", "scheduler=dpm", "adapter=run_2b.diffsynth.raw.safetensors", "compare=true"],
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    actions = parser.add_subparsers(dest="action", required=True)
    recording = actions.add_parser("record", help="run everything and write a recording")
    recording.add_argument("file", type=Path)
    recording.add_argument("parts", nargs="*", help=f"only these, from files that are there: {', '.join(PARTS)}")
    comparing = actions.add_parser("compare", help="print every difference of two recordings")
    comparing.add_argument("files", type=Path, nargs=2)
    options = parser.parse_args()
    if options.action == "record":
        # Recordings of two checkouts take turns: they share the folder.
        with open(FOLDER.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            record(FOLDER, options.parts, options.file)
        return 0
    return compare(*options.files)


def compare(one: Path, other: Path) -> int:
    """Print what differs; returns 1 if anything does."""
    differs = False
    first, second = (json.loads(path.read_text()) for path in (one, other))
    for line in contents.differences(first.pop("about"), second.pop("about")):
        print(f"note: about{line}")
    both = [part for part in first if part in second]
    for part in both:
        found = contents.differences(first[part], second[part], part)
        print("\n".join(found) if found else f"{part}: equal")
        differs |= bool(found)
    if left := sorted(set(first) ^ set(second)):
        print(f"note: only in one of the two: {', '.join(left)}")
    return int(differs)


def record(folder: Path, parts: Sequence[str], file: Path) -> None:
    """Everything, in a folder that is emptied first; or some parts, with what the folder holds of those before them.

    The file is written after each part, so that a command that fails costs only what comes after it.
    """
    if not parts:
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(exist_ok=True)
    content: dict[str, Any] = {"about": about()}
    for part in parts or PARTS:
        started = time.monotonic()
        for path in (path for pattern in FILES.get(part, ()) for path in folder.glob(pattern)):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        # Stores, runs and videos name the folders in which they were made.
        content[part] = json.loads(json.dumps(PARTS[part](folder)).replace(str(folder), "FOLDER"))
        file.write_text(json.dumps(content, indent=1) + "\n")
        print(f"{part}: {time.monotonic() - started:.0f} s", flush=True)


def about() -> dict[str, Any]:
    """Where and of what a recording was made; compared for the reader's eyes alone."""
    git = ["git", "-C", str(REPOSITORY), "describe", "--always", "--dirty"]
    libraries = ("torch", "diffusers", "transformers", "deepspeed", "safetensors", "peft", "av", "decord2", "numpy")
    processor = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "commit": subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip(),
        "python": platform.python_version(),
        "processor": processor[0].partition(":")[2].strip() if processor else platform.processor(),
        **{name: version(name) for name in libraries},
    }


def run(command: Sequence[str], folder: Path) -> str:
    """Run a command as a process of its own; returns its stdout."""
    words = [str(REPOSITORY / word) if word.endswith(".py") else word for word in command]
    started = [sys.executable, "-m", "deepspeed.launcher.runner", *words[1:]] if words[0] == "deepspeed" else None
    process = subprocess.run(
        started or [sys.executable, *words], cwd=folder, env=environment(), capture_output=True, text=True, timeout=1200
    )
    if process.returncode:
        sys.exit(
            f"status {process.returncode}: {' '.join(command)}\n{process.stdout[-3000:]}\n{process.stderr[-5000:]}"
        )
    return process.stdout


def options(folder: Path) -> dict[str, Any]:
    """Names, types and defaults of every command's options, and the configs that they compose."""
    jobs = {f"{name} --help": [*command, "--help"] for name, command in COMMANDS.items()}
    for name, command in COMMANDS.items():
        jobs[f"{name} --cfg job"] = [*command, "--cfg", "job"]
        for choice in EXPERIMENTS if name in WITH_EXPERIMENT else []:
            jobs[f"{name} {choice} --cfg job"] = [*command, choice, "--cfg", "job"]
    jobs |= {f"train {choice} --cfg job": [TRAIN, choice, "--cfg", "job"] for choice in CHOICES}
    return dict(zip(jobs, map(of_options, run_commands(list(jobs.values()), folder)), strict=True))


def of_options(result: Mapping[str, Any]) -> dict[str, Any]:
    """What ``--help`` or ``--cfg job`` has printed."""
    is_help = "--help" in result["command"]
    found = contents.options(result["stdout"]) if is_help else {"config": result["stdout"]}
    return {"status": result["status"], **found}


def plans(folder: Path) -> dict[str, Any]:
    """The plan's figures, or why it has none."""
    jobs = {" ".join(case): [*PLAN, *case, f"json=plan_{number}.json"] for number, case in enumerate(PLANS)}
    results = dict(zip(jobs, run_commands(list(jobs.values()), folder), strict=True))
    return {case: of_plan(folder, result) for case, result in results.items()}


def of_plan(folder: Path, result: Mapping[str, Any]) -> dict[str, Any]:
    """What plan has printed and written to its file; one that it refuses has none."""
    path = folder / str(result["command"][-1]).removeprefix("json=")
    figures = json.loads(path.read_text()) if path.exists() else None
    return {name: result[name] for name in ("status", "stdout", "stderr")} | {"figures": figures}


def models(folder: Path) -> dict[str, Any]:
    """Tiny models of both kinds, every file."""
    found = {}
    for variant, name in MODELS.items():
        run(["-m", TINY_MODEL, name, "--variant", variant], folder)
        files = sorted(path for path in (folder / name).rglob("*") if path.is_file())
        found[variant] = {str(path.relative_to(folder / name)): contents.sha256(path.read_bytes()) for path in files}
    return found


def timestamp(seconds: float) -> str:
    return f"00:00:{seconds:06.3f}"


def write_sources(folder: Path) -> None:
    """Videos, and metadata of every kind of data set, with rows that no clip can be made of."""
    videos = folder / "videos"
    videos.mkdir()
    shutil.copy(EXAMPLE, videos / "rabbit.mp4")
    for name in ("moving", "still", "black", "cut", "tall", "uneven"):
        write_video(videos / f"{name}.mp4", name)
    (videos / "broken.mp4").write_text("this is not a video")
    scores = {"Aesthetic_Score": 5.5, "UMT_Score": 0.4}
    spans = [("rabbit", 0.35 * n, 0.35 * n + 2.4, f"A rabbit on a meadow, take {n // 2}.") for n in range(8)]
    spans += [(name, 0.0, 2.4, f"A synthetic video, {name}.") for name in ("moving", "still", "black", "cut", "tall")]
    spans += [
        (
            "uneven",
            0.1,
            2.5,
            "A synthetic video with uneven times, of which the caption is longer than the model reads.",
        ),
        ("rabbit", 0.0, 2.4, "The same span again."),
        ("rabbit", 3.0, 2.0, "An end before its start."),
        ("rabbit", 2.9, 5.29, "x"),
        ("absent", 0.0, 2.4, "A video that is not there."),
        ("broken", 0.0, 2.4, "A file that is no video."),
    ]
    rows = [
        {"YoutubeID": video, "Start_timestamp": timestamp(start), "End_timestamp": timestamp(end), "Caption": caption}
        for video, start, end, caption in spans
    ]
    (folder / "internvid.jsonl").write_text("".join(json.dumps({**row, **scores}) + "\n" for row in rows))
    with open(folder / "panda70m.csv", "w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["videoID", "url", "timestamp", "caption", "matching_score"])
        times = "[['0:00:00.000', '0:00:02.400'], ['0:00:02.500', '0:00:05.000']]"
        writer.writerow(["rabbit", "", times, "['A rabbit, take 0.', 'A rabbit, take 1.']", "[0.45, 0.25]"])
    with tarfile.open(folder / "00000.tar", "w") as shard:
        (folder / "caption.txt").write_text("A rabbit in a shard.")
        shard.add(EXAMPLE, "0000000_00000.mp4")
        shard.add(folder / "caption.txt", "0000000_00000.txt")
    with open(folder / "table.csv", "w", newline="") as stream:
        csv.writer(stream).writerows([["path", "caption"], ["videos/moving.mp4", "A table's row."], ["none.mp4", "x"]])


def write_video(path: Path, name: str, num_frames: int = 80) -> None:
    """Stripes that move, stand still, are black, are cut off, stand upright, or come at uneven times."""
    height, width = (192, 128) if name == "tall" else (128, 192)
    y, x = np.mgrid[:height, :width]
    with av.open(str(path), "w") as container:
        # x264 has been seen to write other bytes from equal frames: without loss, the frames are equal all the same.
        stream = container.add_stream("libx264", rate=30, options={"qp": "0", "preset": "ultrafast", "g": "25"})
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        for number in range(num_frames):
            moved = 0 if name == "still" else 3 * number
            picture = np.stack([(x + moved) % 256, (2 * y + moved) % 256, (x + y) % 256], axis=-1).astype(np.uint8)
            if name == "black":
                picture[:] = 0
            if name == "cut" and number >= 40:
                picture = 255 - picture[::-1]
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24").reformat(format="yuv420p")
            frame.pts = number * 1000 // 30 + (number % 3 * 5 if name == "uneven" else 0)
            frame.time_base = Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def manifests(folder: Path) -> dict[str, Any]:
    """Kept and dropped clips of every source, of the filter, and the filter's page in words."""
    write_sources(folder)
    sources = {
        "internvid": ["metadata=internvid.jsonl", "videos=videos"],
        "panda70m": ["metadata=panda70m.csv", "videos=videos"],
        "webdataset": ["videos=00000.tar"],
        "folder": ["metadata=table.csv"],
    }
    found: dict[str, Any] = {}
    for source, options in sources.items():
        text = run([BUILD, f"source={source}", *options, f"manifest={source}.clips.jsonl"], folder)
        found[source] = {"stdout": text, **manifest(folder, f"{source}.clips")}
    run([BUILD, "source=internvid", *sources["internvid"], "manifest=unprobed.jsonl", "probe=false"], folder)
    found["unprobed"] = manifest(folder, "unprobed")
    small = ["+exp=demo", *SHORT, "manifest=internvid.clips.jsonl"]
    for name, options in {
        "filtered": [],
        "lenient": ["filter.min_aspect=0", "filter.max_cuts=9", "filter.near_duplicate_distance=-1"],
        "slow": ["num_frames=33", "filter.max_fps=16"],
    }.items():
        text = run([FILTER, *small, *options, f"output={name}.jsonl"], folder)
        page = contents.report_text(folder / f"{name}.report.html")
        found[name] = {"stdout": text, "page": page, **manifest(folder, name)}
    return found


def manifest(folder: Path, stem: str) -> dict[str, Any]:
    kept, dropped = folder / f"{stem}.jsonl", folder / f"{stem}.dropped.jsonl"
    return {
        "kept_sha256": contents.sha256(kept.read_bytes().replace(str(folder).encode(), b"FOLDER")),
        "kept": contents.lines(kept),
        # Videos are probed side by side: the order of what is dropped is not the same in every run.
        "dropped": sorted(contents.lines(dropped), key=json.dumps),
    }


def stores(folder: Path) -> dict[str, Any]:
    """Latents of both kinds of model, of both decoders, of two number formats."""
    clips = "manifest=internvid.clips.jsonl"
    encodings = [
        ("latents_5b", "5b", [*SHORT, clips]),
        ("latents_5b", "5b", [*LONG, clips]),
        ("latents_2b", "2b", [*SHORT, clips]),
        ("latents_2b", "2b", [*BASE, clips]),
        ("latents_pyav", "5b", [*SHORT, "manifest=unprobed.jsonl", "decoder=pyav", "encoder_dtype=fp32"]),
    ]
    for store, variant, options in encodings:
        run([ENCODE, "+exp=demo", f"model.path={MODELS[variant]}", f"latents={store}", *options], folder)
    found: dict[str, Any] = {}
    for store in dict.fromkeys(store for store, _, _ in encodings):
        reports = sorted((folder / store / "reports").glob("encode_*.json"))
        kept = ("encoded", "reused", "quarantined", "remaining", "cut_captions", "refused_by_decord", "bytes_written")
        told = {path.name: {name: json.loads(path.read_text()).get(name) for name in kept} for path in reports}
        found[store] = {**contents.store(folder / store), "reports": told}
    names = list(found)
    jobs = [[*INSPECT, action, f"latents={name}"] for name in names for action in ("stats", "verify")]
    jobs.append([*INSPECT, "preview", "latents=latents_5b", "model_path=model_5b", "output=previews"])
    told = [{name: result[name] for name in ("status", "stdout")} for result in run_commands(jobs, folder)]
    pictures = {path.name: contents.sha256(path.read_bytes()) for path in sorted((folder / "previews").iterdir())}
    return {**found, "inspected": told, "previews": pictures}


def trainings(folder: Path) -> dict[str, Any]:
    """Runs on two ranks through the DeepSpeed launcher."""
    found = {}
    for name, (variant, options) in TRAININGS.items():
        train = ["deepspeed", "--num_gpus", "2", TRAIN, "+exp=demo", f"model.path={MODELS[variant]}"]
        run([*train, f"latents=latents_{variant}", f"run_dir={name}", *options], folder)
        found[name] = contents.run(folder / name)
    return found


def adapters(folder: Path) -> dict[str, Any]:
    """Adapters in all formats, of both copies of the weights, and of an earlier step."""
    formats = ("diffusers", "diffsynth", "comfyui")
    wanted = {f"run_5b.{format}.{weights}": ["run_dir=run_5b", f"format={format}", f"weights={weights}"]
              for format in formats for weights in ("raw", "ema")}  # fmt: skip
    wanted |= {f"run_2b.{format}.raw": ["run_dir=run_2b", f"format={format}"] for format in formats}
    wanted["run_5b.step_4"] = ["run_dir=run_5b", "step=4", "weights=ema"]
    jobs = [[*EXPORT, *options, f"adapter={name}.safetensors"] for name, options in wanted.items()]
    found: dict[str, Any] = {}
    for name, result in zip(wanted, run_commands(jobs, folder), strict=True):
        assert result["status"] == 0, result
        found[name] = {"stdout": result["stdout"], **contents.safetensors(folder / f"{name}.safetensors")}
    return found


def videos(folder: Path) -> dict[str, Any]:
    """Latents and frames of both samplers, with and without adapters, for both kinds of model."""
    prompt = ["prompt=A rabbit, yawning: slowly", "num_inference_steps=3", *SHORT]
    jobs = [[*SAMPLE, "+exp=demo", *prompt, *options, f"output=videos_{name}"] for name, options in SAMPLES.items()]
    found = {}
    for name, result in zip(SAMPLES, run_commands(jobs, folder), strict=True):
        assert result["status"] == 0, result
        assert result["decoded"], "the VAE of diffusers has decoded nothing: nothing of the latents is recorded"
        told = {"stdout": result["stdout"], "decoded": result["decoded"]}
        found[name] = {**told, **contents.folder_of_videos(folder / f"videos_{name}")}
    return found


# In order: each takes files of those before it.
PARTS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "options": options,
    "plans": plans,
    "models": models,
    "manifests": manifests,
    "stores": stores,
    "trainings": trainings,
    "adapters": adapters,
    "videos": videos,
}
# What a part would find there from last time, and go on with.
FILES = {
    "plans": ["plan_*.json"],
    "models": ["model_*"],
    "manifests": ["videos", "*.measures.sqlite"],
    "stores": ["latents_*", "previews"],
    "trainings": list(TRAININGS),
    "videos": ["videos_*"],
}


if __name__ == "__main__":
    sys.exit(main())
