"""Commands: manifests and journals of a wrong shape, targets that are inputs, mistaken reruns, two runs at once."""

from __future__ import annotations

import json
import os
import shutil
import socket
import sqlite3
import subprocess
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import command_environment, command_line
from support.attacks import Attack, attacks, check_ending, held, refused
from support.processes import ended

from exvideo_train import build_manifest, export, filter_clips, locks, plan, sample
from exvideo_train.clips.bounds import MAX_LINE_BYTES
from exvideo_train.clips.journal import Journal
from exvideo_train.clips.probing import probe_videos
from exvideo_train.clips.record import ClipRecord, read_manifest
from exvideo_train.config.clips import BuildManifest, FilterClips
from exvideo_train.config.commands import Export, Sample
from exvideo_train.config.latents import EncodeLatents
from exvideo_train.config.plan import Plan
from exvideo_train.entry import compose_config, to_dataclass
from exvideo_train.extensions.adapter_file import write_adapter
from exvideo_train.files import MAX_JSON_DEPTH
from exvideo_train.geometry import Geometry
from exvideo_train.latents.settings import resolve_settings
from exvideo_train.sampling.requests import VideoRequest

RECORD = ClipRecord("a" * 32, "folder", "/videos/x.mp4", 0.0, 5.0, "words of a caption")


def line(**changes: object) -> bytes:
    return json.dumps({**json.loads(RECORD.to_json()), **changes}).encode()


def raw(field: str, text: str) -> bytes:
    """A field's value as JSON text that Python would not write."""
    return line(**{field: "VALUE"}).replace(b'"VALUE"', text.encode())


LINES = [
    held("as written", line()),
    held("a caption full of brackets", line(caption="[{" * 500)),
    held("a file name that is not UTF-8", line(video="/videos/\udcff.mp4")),
    held("brackets as deep as may be", raw("scores", "{}").replace(b"words", b"[" * 900)),
    refused("nothing but brackets", b"[" * 200_000, "line 2", "brackets nested deeper"),
    refused("scores of brackets", raw("scores", "[" * 500 + "]" * 500), "line 2", f"deeper than {MAX_JSON_DEPTH}"),
    refused(
        "objects in objects", raw("scores", '{"a":' * 70 + "1" + "}" * 70), "line 2", f"deeper than {MAX_JSON_DEPTH}"
    ),
    refused("half an object", line()[:50], "line 2", "not JSON"),
    refused("a list", b"[1, 2]", "line 2", "list"),
    refused("a number alone", b"7", "line 2", "int"),
    refused("not UTF-8", b'{"caption": "\xff\xfe"}', "UTF-8"),
    refused("UTF-16", '{"caption": ""}'.encode("utf-16"), "UTF-8"),
    refused("no end of line", b'"' + b"x" * MAX_LINE_BYTES, "line 2", "bytes of JSON"),
    refused("400 digits", raw("start_seconds", "1" * 400), "line 2", "start_seconds=1111"),
    refused("5000 digits", raw("end_seconds", "1" * 5000), "line 2", "thousands of digits"),
    refused("1e306 seconds", raw("end_seconds", "1e306"), "line 2", "end_seconds=1e+306"),
    refused("1e999 seconds", raw("start_seconds", "1e999"), "line 2", "start_seconds=inf"),
    refused("NaN", raw("start_seconds", "NaN"), "line 2", "start_seconds=nan"),
    refused("minus infinity", raw("duration_seconds", "-Infinity"), "line 2", "duration_seconds=-inf"),
    refused("a rate of NaN", raw("fps", "NaN"), "line 2", "fps=nan"),
    refused("a sampling rate of 0", line(sampling_fps=0), "line 2", "sampling_fps=0"),
    refused("a width of 1e300", line(width=1e300), "line 2", "width=1e+300"),
    refused("a score of 1e308", line(scores={"umt": 1e308}), "line 2", "scores.umt=1e+308"),
    refused("a score of infinity", raw("scores", '{"umt": Infinity}'), "line 2", "scores.umt=inf"),
    refused("a score with a name of 9 kB", line(scores={"x" * 9000: "a"}), f"scores.{'x' * 73}='a' must be"),
    refused("true for a number", line(fps=True), "line 2", "fps=True"),
    held("half a character in the caption, which is left out", line(caption="cut \ud83d")),
    held("NUL in the caption, which is left out", line(caption="cut\0")),
    held("a caption of 10 MB, which is cut", line(caption="x" * 10**7)),
    refused("half a character in the video", line(video="cut \ud83d.mp4"), "line 2", "video="),
    refused("NUL in the video", line(video="a\0.mp4"), "line 2", "NUL"),
    refused("an id of 300 letters", line(clip_id="a" * 300), "line 2", "clip_id="),
    refused("an id that leaves the folder", line(clip_id="../../x"), "line 2", "clip_id="),
    refused("a codec of numbers", line(codec=[1]), "line 2", "codec="),
]


@attacks(LINES)
def test_lines_of_a_manifest(attack: Attack, tmp_path: Path) -> None:
    path = tmp_path / "clips.jsonl"
    path.write_bytes(RECORD.to_json().encode() + b"\n" + attack.content + b"\n")

    def read() -> dict[str, str]:
        assert len(list(read_manifest(path))) == 2
        return {}

    check_ending(attack, read)


def a_table(sql: str, *rows: tuple[object, ...]):
    """Write a database with one table."""

    def write(path: Path) -> None:
        connection = sqlite3.connect(path)
        connection.execute(sql)
        for row in rows:
            connection.execute(f"INSERT INTO found VALUES ({', '.join('?' * len(row))})", row)
        connection.commit()
        connection.close()

    return write


FOUND = "CREATE TABLE found (key TEXT PRIMARY KEY, stamp TEXT, content TEXT)"
JOURNALS = [
    held("empty", lambda path: path.write_bytes(b"")),
    held("without rows", a_table(FOUND)),
    refused("text", lambda path: path.write_text("no database\n" * 100), "delete it"),
    refused("zeros", lambda path: path.write_bytes(bytes(8192)), "delete it"),
    refused("a folder", lambda path: path.mkdir(), "delete it"),
    refused("cut off", lambda path: (a_table(FOUND)(path), path.write_bytes(path.read_bytes()[:5000])), "delete it"),
    refused("of an older schema", a_table("CREATE TABLE found (key TEXT, content TEXT)"), "another", "found"),
    refused("of another program", a_table("CREATE TABLE photos (name TEXT)"), "another program", "photos"),
    refused("content that is no JSON", a_table(FOUND, ("/gone.mp4", "", "{")), "/gone.mp4", "delete it"),
    refused("content of other fields", a_table(FOUND, ("/gone.mp4", "", '{"colour": 1}')), "colour", "delete it"),
    refused("content of another type", a_table(FOUND, ("/gone.mp4", "", "[]")), "/gone.mp4", "delete it"),
    refused("content that is null", a_table(FOUND, ("/gone.mp4", "", None)), "/gone.mp4", "delete it"),
]


@attacks(JOURNALS)
def test_journals(attack: Attack, tmp_path: Path) -> None:
    path = tmp_path / "probes.sqlite"
    attack.content(path)
    before = path.read_bytes() if path.is_file() else b""

    def probe() -> dict[str, str]:
        if attack.says:
            list(probe_videos([("/gone.mp4", None)], path, 1, 60))
            return {}
        with Journal(path) as journal:
            journal.put("a", "", "1")
            assert journal.get("a", "", str) == "1"
        return {}

    check_ending(attack, probe)
    if attack.says and path.is_file():
        assert path.read_bytes() == before, "what is not ours is left as it is"


def files_of(folder: Path) -> dict[str, bytes]:
    """What lies in a folder, links as what they point to."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def internvid_row(video_id: str, start: float = 0, length: float = 4) -> str:
    span = {"Start_timestamp": f"00:00:{start:06.3f}", "End_timestamp": f"00:00:{start + length:06.3f}"}
    return json.dumps({"YoutubeID": video_id, **span, "Caption": "a rabbit comes out of its hole"}) + "\n"


COMMANDS: dict[str, Any] = {
    "build_manifest": (BuildManifest, build_manifest.run),
    "filter_clips": (FilterClips, filter_clips.run),
    "export": (Export, export.export),
    "sample": (Sample, sample.sample),
    "plan": (Plan, plan.plan),
    "encode_latents": (EncodeLatents, lambda config: resolve_settings(config, 1)),
}
OPTIONS = {
    "build_manifest": ["source=internvid", "metadata=M.jsonl", "videos=videos", "probe=false", "num_workers=1"],
    "filter_clips": [
        *("+exp=129f", "num_frames=9", "height=96", "width=144", "num_workers=1", "manifest=clips.jsonl"),
        *("contact_sheet_clips=1", "filter.min_motion=0"),
    ],
    "export": ["run_dir=run"],
    "sample": ["+exp=demo", "model.path=model", "output=."],
    "plan": ["+exp=demo", "model.path=model"],
    "encode_latents": ["+exp=demo", "model.path=model", "manifest=clips.jsonl", "latents=store"],
}


def run(command: str, *options: str) -> None:
    """A command with the options of `OPTIONS` and others, in this process and working directory."""
    config_class, main = COMMANDS[command]
    main(to_dataclass(compose_config(command, [*OPTIONS[command], *options], config_class), config_class))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, clip_path: Path, tiny_model_5b: Path) -> Path:
    """A folder with inputs, links to them, and results of both data commands."""
    folder = tmp_path_factory.mktemp("finished")
    # Judged once: the videos' names and times stay the same in every copy of the folder.
    videos = tmp_path_factory.mktemp("videos")
    for name in ("first______", "second_____"):
        shutil.copy(clip_path, videos / f"{name}.mp4")
    (folder / "videos").symlink_to(videos)
    (folder / "M.jsonl").write_text(
        internvid_row("first______") + internvid_row("second_____", length=0.5) + internvid_row("nowhere____")
    )
    for name in ("lora", "adam"):
        (folder / "run" / "checkpoints" / "step_00000001").mkdir(parents=True, exist_ok=True)
        (folder / "run" / "checkpoints" / "step_00000001" / f"{name}.safetensors").write_text("weights")
    pair = {f"transformer_blocks.0.attn1.to_q.lora_{half}.weight": torch.ones(2, 2) for half in "AB"}
    write_adapter(folder / "run" / "adapter.safetensors", "diffusers", pair, 2, 2.0, ["to_q"], {"steps": 1})
    (folder / "prompts.txt").write_text("a rabbit\n")
    (folder / "model").symlink_to(tiny_model_5b)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run("build_manifest", "manifest=clips.jsonl")
        run("filter_clips", "output=kept.jsonl")
    assert {path.name for path in folder.glob("kept*")} == {
        *("kept.jsonl", "kept.dropped.jsonl", "kept.report.html", "kept.measures.sqlite")
    }
    return folder


@pytest.fixture
def folder(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, as working directory."""
    copy = tmp_path / "data"
    shutil.copytree(finished, copy, symlinks=True)
    monkeypatch.chdir(copy)
    Path("here").symlink_to(".")
    for name in ("M", "clips"):
        os.link(f"{name}.jsonl", f"hard_{name}.jsonl")
        Path(f"link_{name}.jsonl").symlink_to(f"{name}.jsonl")
    os.link("M.jsonl", "x.dropped.jsonl")
    os.link("clips.jsonl", "y.dropped.jsonl")
    os.link("clips.jsonl", "z.report.html")
    os.link("clips.jsonl", "w.measures.sqlite")
    Path("contact_sheets").mkdir()
    stem = VideoRequest("a rabbit", "", 6, Geometry(129, 64, 96, 25)).stem
    os.link("prompts.txt", f"contact_sheets/{stem}.png")
    Path("link_run").symlink_to("run")
    Path("store").mkdir()
    os.link("clips.jsonl", "store/index.jsonl")
    return copy


SILENT: Any = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
CHECKPOINT = "run/checkpoints/step_00000001"
IS_INPUT = [
    *[
        refused(f"build_manifest {option}", ("build_manifest", option), "manifest= would write", "metadata= reads")
        for option in (
            *("manifest=M.jsonl", "manifest=./run/../M.jsonl", "manifest=here/M.jsonl", "manifest=hard_M.jsonl"),
            *("manifest=link_M.jsonl", "manifest=x.jsonl"),
        )
    ],
    *[
        refused(f"build_manifest {pattern}", ("build_manifest", f"metadata={pattern}", target), "metadata= reads")
        for pattern, target in (
            ("*.jsonl", "manifest=new.jsonl"),
            ("here/*.jsonl", "manifest=new.jsonl"),
            ("M*.jsonl", "manifest=here/M2.jsonl"),
            ("*.dropped.jsonl", "manifest=new.jsonl"),
        )
    ],
    refused("build_manifest a.mp4", ("build_manifest", "manifest=videos/first______.mp4"), "must end in .jsonl"),
    refused("build_manifest a.tar", ("build_manifest", "manifest=a.tar"), "must end in .jsonl"),
    refused("build_manifest a folder", ("build_manifest", "manifest=videos"), "is a folder"),
    *[
        refused(f"filter_clips {option}", ("filter_clips", option), "output= would write", "manifest= reads")
        for option in (
            *("output=clips.jsonl", "output=./clips.jsonl", "output=here/clips.jsonl", "output=hard_clips.jsonl"),
            *("output=link_clips.jsonl", "output=y.jsonl", "output=z.jsonl", "output=w.jsonl"),
        )
    ],
    refused("filter_clips dropped list", ("filter_clips", "manifest=kept.dropped.jsonl", "output=kept.jsonl"), "reads"),
    refused("filter_clips a folder", ("filter_clips", "output=videos"), "is a folder"),
    refused("filter_clips kept.csv", ("filter_clips", "output=kept.csv"), "must end in .jsonl"),
    *[
        refused(f"export {path}", ("export", f"adapter={path}"), "adapter=")
        for path in (
            *("run/adapter.safetensors", "link_run/adapter_ema.safetensors", f"{CHECKPOINT}/lora.safetensors"),
            *(f"link_{CHECKPOINT}/lora.safetensors", f"{CHECKPOINT}/ema.safetensors", f"{CHECKPOINT}/a/b.safetensors"),
        )
    ],
    refused("sample", ("sample", "prompts_file=prompts.txt"), "output= would write", "prompts_file= reads"),
    refused("plan", ("plan", "json=model/transformer/config.json"), "json= would write", "model.path= reads"),
    refused("encode_latents", ("encode_latents",), "latents= would write store/index.jsonl", "manifest= reads"),
]


@attacks(IS_INPUT)
def test_inputs_are_never_outputs(attack: Attack, folder: Path) -> None:
    before = files_of(folder)
    check_ending(attack, lambda: run(*attack.content) or {})
    assert files_of(folder) == before


BUILD, FILTER = ("build_manifest", "manifest=clips.jsonl"), ("filter_clips", "output=kept.jsonl")
LONG = "x" * 300
RERUNS = [
    refused("a long name", ("build_manifest", f"manifest={LONG}.jsonl"), "name too long"),
    refused("a name with a long lock", ("build_manifest", f"manifest={LONG[:249]}.jsonl"), "name too long"),
    refused("a long output", ("filter_clips", f"output={LONG}.jsonl"), "name too long"),
    refused("a file as folder", ("build_manifest", "manifest=M.jsonl/clips.jsonl"), "M.jsonl", "cannot write"),
    refused("a folder that cannot be", ("filter_clips", "output=/proc/x/kept.jsonl"), "/proc/x", "cannot write"),
    refused("no videos there", (*BUILD, "videos=run"), "no video file"),
    refused("other videos", (*BUILD, "videos=other"), "no clip can be used", "missing 3", "clips.failed.dropped"),
    refused("no folder", (*BUILD, "videos=nowhere"), "not a folder"),
    refused("other metadata", (*BUILD, "metadata=prompts.txt"), "no clip can be used"),
    refused("nothing kept", (*FILTER, "filter.min_short_side=5000"), "too_small 1", "kept.failed.report"),
    refused("no manifest", (*FILTER, "manifest=nowhere.jsonl"), "does not exist"),
    refused("broken manifest", (*FILTER, "manifest=prompts.txt"), "line 1"),
]


@attacks(RERUNS)
def test_a_mistaken_rerun_leaves_the_good_result(attack: Attack, folder: Path) -> None:
    (folder / "other").mkdir()
    (folder / "other" / "another____.mp4").write_bytes(b"x")
    before = files_of(folder)
    check_ending(attack, lambda: run(*attack.content) or {})
    # What went wrong is listed beside it.
    assert before == {name: content for name, content in files_of(folder).items() if ".failed." not in name}
    with sqlite3.connect(folder / "kept.measures.sqlite") as journal:
        assert journal.execute("SELECT count(*) FROM found").fetchone() == (1,)


@pytest.mark.parametrize(("command", "target"), [("build_manifest", "manifest"), ("filter_clips", "output")])
def test_a_target_in_work_is_refused_by_host_and_pid(command: str, target: str, folder: Path) -> None:
    before = files_of(folder)
    path = "clips.jsonl" if command == "build_manifest" else "kept.jsonl"
    # Through another path to the same file.
    arguments = [f"data_prep/{command}.py", *OPTIONS[command], f"{target}=here/{path}"]
    with locks.hold(folder / f".{path}.lock", f"{target}={path}", "wait"):
        done = subprocess.run(
            command_line(arguments), env=command_environment(), capture_output=True, text=True, timeout=120, cwd=folder
        )
    assert done.returncode == 2, done.stderr
    holder = f"process {os.getpid()} on {socket.gethostname()}"
    assert f"error: {target}=here/{path}: {holder}" in done.stderr
    assert files_of(folder) == before


def test_two_builds_of_one_manifest_leave_it_whole(folder: Path) -> None:
    Path("many.jsonl").write_text("".join(internvid_row("first______", number / 1000) for number in range(20_000)))
    arguments = ["data_prep/build_manifest.py", *OPTIONS["build_manifest"], "metadata=many.jsonl", "manifest=new.jsonl"]
    with ExitStack() as stack:
        builds = [
            stack.enter_context(
                ended(subprocess.Popen(command_line(arguments), env=command_environment(), cwd=folder, **SILENT))
            )
            for _ in range(3)
        ]
        ends = [(build.communicate(timeout=240)[1], build.returncode) for build in builds]
    assert {status for _, status in ends} == {0, 2}, ends
    assert all("at work in it" in text for text, status in ends if status)
    assert len(list(read_manifest(Path("new.jsonl")))) == 20_000
    assert {path.name for path in folder.glob(".*")} == set()
