"""encode_latents as users run it: real processes, a tiny real model, cuts of the real clip."""

import json
import os
import shutil
import socket
import sys
from functools import partial

import pytest
import torch
from support.encoding import (
    GEOMETRY,
    REPOSITORY,
    SCRIPT,
    TIMEOUT_SECONDS,
    arguments,
    finish,
    identity,
    record_of,
    run_here,
)

from exvideo_train.clips.reader import read_frames
from exvideo_train.clips.record import write_manifest
from exvideo_train.config.latents import InspectLatents, StoreAction
from exvideo_train.errors import UserError
from exvideo_train.geometry import Geometry
from exvideo_train.latents.__main__ import inspect_latents
from exvideo_train.latents.store import LatentStore
from exvideo_train.locks import hold
from exvideo_train.models.cogvideox.encoders import TextEncoder, VideoEncoder


@pytest.fixture
def run_command(run_command):
    """The shared fixture, with this file's patience."""
    return partial(run_command, timeout_seconds=TIMEOUT_SECONDS)


def test_store_holds_what_the_encoders_give(data, whole, tiny_model_5b):
    store = LatentStore.open(whole[0])
    assert store.clip_ids(GEOMETRY) == sorted(record.clip_id for record in data[1])
    text = TextEncoder(tiny_model_5b, "cpu", torch.bfloat16, 16)
    video = VideoEncoder(tiny_model_5b, "cpu", torch.bfloat16, False)
    for record in data[1][::3]:
        clip = store.read(record.clip_id, GEOMETRY)
        assert clip.caption == record.caption
        assert torch.equal(clip.tensors["text"], text.encode([record.caption])[0])
        torch.testing.assert_close(
            clip.tensors["moments"], video.encode(read_frames(record, GEOMETRY)), rtol=0.02, atol=0.02
        )
    assert torch.equal(store.empty_prompt()["text"], text.encode([""])[0])


def test_each_bad_input_has_its_own_reason(data, whole):
    report = json.loads((whole[0] / "reports" / f"encode_{GEOMETRY.name}.json").read_text())
    assert (report["encoded"], report["reused"], report["remaining"]) == (6, 0, 0)
    assert sum(report["quarantined"].values()) == len(data[2])
    lines = (whole[0] / "reports" / f"quarantined_{GEOMETRY.name}.jsonl").read_text().splitlines()
    reasons = {entry["clip_id"]: entry["reason"] for entry in map(json.loads, lines)}
    expected = ["missing", "not_video", "empty_file", "truncated", None, "bad_span"]
    for record, reason in zip(data[2], expected, strict=True):
        assert reasons[record.clip_id] == (reason or reasons[record.clip_id])
    assert reasons[data[2][4].clip_id] in ("span_past_end", "too_short")
    assert "encoded      6" in whole[1]
    for field in ("decoding", "encoding", "waiting", "clips/s"):
        assert field in whole[1]
    leftovers = {path.name for path in (whole[0] / "reports").iterdir()}
    assert leftovers == {f"encode_{GEOMETRY.name}.json", f"quarantined_{GEOMETRY.name}.jsonl", "quarantine"}


def test_second_run_reuses_everything(data, whole, tiny_model_5b, capsys):
    before = identity(whole[0])
    times = {path: path.stat().st_mtime_ns for path in whole[0].glob("clips/*/*/*")}
    run_here(arguments(tiny_model_5b, data[0] / "clips.jsonl", whole[0]))
    said = capsys.readouterr().out
    assert "encoded    6 already" in said
    assert "reused       6" in said
    assert identity(whole[0]) == before
    assert {path: path.stat().st_mtime_ns for path in times} == times


def test_a_store_that_is_being_encoded_into_is_refused(data, tiny_model_5b, tmp_path):
    command = arguments(tiny_model_5b, data[0] / "good.jsonl", tmp_path)
    with hold(tmp_path / "reports" / "in_use", "", ""), pytest.raises(UserError, match=f"process {os.getpid()} on"):
        run_here(command)
    assert not (tmp_path / "store.json").exists()


def test_dry_run_touches_nothing(data, whole, tiny_model_5b, tmp_path, capsys):
    manifest = data[0] / "clips.jsonl"
    run_here(arguments(tiny_model_5b, manifest, tmp_path / "new", "dry_run=true"))
    plan = capsys.readouterr().out
    assert "to encode  12" in plan
    assert "GiB needed" in plan
    assert not (tmp_path / "new").exists()
    times = {path: path.stat().st_mtime_ns for path in whole[0].rglob("*")}
    run_here(arguments(tiny_model_5b, manifest, whole[0], "dry_run=true"))
    assert "6 quarantined" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in whole[0].rglob("*")} == times


def hub_cache(folder, model=None):
    """A hub cache that holds a model as owner/name, or nothing."""
    repository = folder / "hub" / "models--owner--name"
    if model is not None:
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text("c0ffee")
        (repository / "snapshots").mkdir()
        (repository / "snapshots" / "c0ffee").symlink_to(model)
    return folder


def test_dry_run_of_a_hub_model_downloads_nothing(data, tiny_model_5b, run_command, tmp_path):
    command = arguments("owner/name", data[0] / "clips.jsonl", tmp_path / "new", "dry_run=true")
    with socket.create_server(("127.0.0.1", 0)) as hub:
        hub.settimeout(0.1)
        online = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": f"http://127.0.0.1:{hub.getsockname()[1]}"}
        result = run_command(command, status=2, env={**online, "HF_HOME": str(tmp_path / "empty")})
        assert "model.path=owner/name" in result.stderr
        assert "`hf download owner/name`" in result.stderr
        assert "Traceback" not in result.stderr
        cache = hub_cache(tmp_path / "full", tiny_model_5b)
        assert "to encode  12" in run_command(command, env={**online, "HF_HOME": str(cache)}).stdout
        with pytest.raises(TimeoutError):
            hub.accept()
    assert not (tmp_path / "new").exists()


def test_second_geometry_leaves_the_first_alone(data, whole, tiny_model_5b, run_command, tmp_path, capsys):
    store = tmp_path / "store"
    shutil.copytree(whole[0], store)
    before = {name: content for name, content in identity(store).items() if name.startswith(("clips/", "empty_"))}
    index = (store / "index.jsonl").read_text().splitlines()
    portrait = Geometry(17, 96, 64, 25)
    options = ("num_frames=17", "height=96", "width=64")
    command = [
        option for option in arguments(tiny_model_5b, data[0] / "good.jsonl", store) if "num_frames" not in option
    ]
    assert "encoded      6" in run_command([*command, *options]).stdout
    after = identity(store)
    assert {name: after[name] for name in before} == before
    assert set(index) < set((store / "index.jsonl").read_text().splitlines())
    assert LatentStore.open(store).clip_ids(portrait) == LatentStore.open(store).clip_ids(GEOMETRY)
    inspect_latents(InspectLatents(action=StoreAction.stats, latents=str(store)))
    stats = capsys.readouterr().out
    for geometry in (GEOMETRY, portrait):
        assert f"{geometry.name}: 6 clips, 3 captions" in stats
    inspect_latents(InspectLatents(action=StoreAction.verify, latents=str(store)))
    assert "the store is whole" in capsys.readouterr().out


@pytest.mark.parametrize("folders", ["the store's alone", "all"])
def test_read_only_store_is_named_and_a_later_run_continues(data, whole, tiny_model_5b, run_command, tmp_path, folders):
    store = tmp_path / "store"
    shutil.copytree(whole[0], store)
    sorted(store.glob("clips/*/*/*.safetensors"))[0].unlink()
    command = arguments(tiny_model_5b, data[0] / "good.jsonl", store)
    command[0] = str(REPOSITORY / SCRIPT)
    read_only = [store] if folders != "all" else [store, *(path for path in store.rglob("*") if path.is_dir())]
    before = identity(store)
    for folder in read_only:
        folder.chmod(0o555)
    try:
        result = run_command(["tests/support/without_privilege.py", *command], status=2)
    finally:
        for folder in read_only:
            folder.chmod(0o755)
    assert f"latents={store}: not writable" in result.stderr
    assert "Permission denied" in result.stderr
    assert "Traceback" not in result.stderr
    assert identity(store) == before
    assert not list(store.rglob("*.tmp"))
    if folders == "all":
        result = run_command(["tests/support/without_privilege.py", *command])
        assert "reused       5" in result.stdout
        assert identity(store) == identity(whole[0])


def test_other_options_than_the_stores_are_refused(data, whole, tiny_model_5b):
    before = identity(whole[0])
    more = ("tiling=true", "encoder_dtype=fp32")
    with pytest.raises(UserError) as refusal:
        run_here(arguments(tiny_model_5b, data[0] / "clips.jsonl", whole[0], *more))
    assert "tiling: the store has False, this run has True" in str(refusal.value)
    assert "vae_dtype: the store has bf16, this run has fp32" in str(refusal.value)
    assert identity(whole[0]) == before


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("manifest=absent.jsonl", "manifest=absent.jsonl does not exist"),
        ("num_frames=10", "num_frames=10"),
        ("device=cuda:7", "device=cuda:7"),
        ("prefetch_clips=0", "prefetch_clips=0"),
        ("model.path=absent", "model.path=absent"),
        ("latents=/sys/exvideo_store", "/sys/exvideo_store"),
    ],
)
def test_bad_options_are_named(data, tiny_model_5b, tmp_path, option, message):
    name = option.split("=")[0]
    command = arguments(tiny_model_5b, data[0] / "clips.jsonl", tmp_path / "s")
    with pytest.raises(UserError, match=message):
        run_here([*(argument for argument in command if argument.split("=")[0] != name), option])
    assert not (tmp_path / "s").exists()


def test_full_disk_stops_with_a_message_and_a_later_run_continues(
    data, tiny_model_5b, run_command, tmp_path, good_identity
):
    store = tmp_path / "store"
    run_command(arguments(tiny_model_5b, data[0] / "good.jsonl", store, "max_clips=2"))
    assert len(LatentStore.open(store).clip_ids(GEOMETRY)) == 2
    # No file may grow beyond 8 KiB: latents do not fit, as on a full disk.
    command = [sys.executable, str(REPOSITORY / SCRIPT), *arguments(tiny_model_5b, data[0] / "good.jsonl", store)[1:]]
    limited = ["bash", "-c", 'ulimit -f 8; exec "$@"', "bash", *command]
    status, stdout, stderr = finish(limited, tmp_path)
    assert status == 2, stdout + stderr
    assert "cannot write" in stderr
    assert "free space" in stderr
    assert "Traceback" not in stderr
    assert len(LatentStore.open(store).clip_ids(GEOMETRY)) == 2
    assert not list(store.rglob("*.tmp"))
    result = run_command(arguments(tiny_model_5b, data[0] / "good.jsonl", store))
    assert "reused       2" in result.stdout
    assert identity(store) == good_identity


def test_quarantined_clips_are_tried_again_when_asked(data, tiny_model_5b, run_command, tmp_path, clip_path, capsys):
    video = tmp_path / "late.mp4"
    write_manifest(tmp_path / "m.jsonl", [record_of(video, 0.2, "late"), record_of(clip_path, 0, "there")])
    store = tmp_path / "store"
    # No decoder can be this fast: every clip times out, and the run goes on.
    result = run_command(arguments(tiny_model_5b, tmp_path / "m.jsonl", store, "clip_timeout_seconds=0.0001"))
    assert "timeout" in result.stdout
    os.link(clip_path, video)
    run_here(arguments(tiny_model_5b, tmp_path / "m.jsonl", store))
    assert "encoded      0" in capsys.readouterr().out
    result = run_command(arguments(tiny_model_5b, tmp_path / "m.jsonl", store, "retry_quarantined=true"))
    assert "encoded      2" in result.stdout
    assert "quarantined  0" in result.stdout


def test_store_commands(data, tiny_model_5b, run_command, tmp_path, whole, capsys):
    store = tmp_path / "store"
    shutil.copytree(whole[0], store)

    def said(action, **options):
        inspect_latents(InspectLatents(action=StoreAction[action], latents=str(store), **options))
        return capsys.readouterr().out

    assert "the store is whole" in said("verify")
    files = sorted(store.glob("clips/*/*/*.safetensors"))
    damaged = bytearray(files[0].read_bytes())
    damaged[-1] ^= 1
    files[0].write_bytes(damaged)
    files[1].unlink()
    (store / "empty_prompt.safetensors").write_text("not the embedding of anything")
    with pytest.raises(SystemExit) as ended:
        said("verify", repair=False)
    findings = capsys.readouterr().out
    assert ended.value.code == 1
    assert "4 whole, 1 damaged, 0 not in the index, 1 indexed but missing" in findings
    assert "empty prompt: missing or damaged" in findings
    assert (store / "empty_prompt.safetensors").exists()
    assert "repaired" in run_command(["-m", "exvideo_train.latents", "verify", f"latents={store}"]).stdout
    assert not (store / "empty_prompt.safetensors").exists()
    kept = {path.name: path.read_bytes() for path in (store / "damaged").rglob("*") if path.is_file()}
    assert kept == {files[0].name: bytes(damaged), "empty_prompt.safetensors": b"not the embedding of anything"}
    shutil.rmtree(store / "damaged")
    stats = said("stats")
    assert "4 clips" in stats
    assert "posterior std" in stats
    said("preview", model_path=str(tiny_model_5b), output=str(tmp_path))
    assert (tmp_path / f"preview_{GEOMETRY.name}.png").stat().st_size > 10_000
    run_command(arguments(tiny_model_5b, data[0] / "clips.jsonl", store))
    assert identity(store) == identity(whole[0])
