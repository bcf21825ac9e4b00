"""encode_latents with encoders that die, on several devices and machines, on Ray and killed: the store is the same."""

import json
import signal
import subprocess
import sys
from functools import partial

import psutil
import pytest
from support.encoding import (
    REPOSITORY,
    SCRIPT,
    TIMEOUT_SECONDS,
    arguments,
    finish,
    identity,
    run_here,
    wait_until,
)
from support.processes import ended
from support.ranks import free_port

from exvideo_train.latents import encode
from exvideo_train.latents.encode import Launch
from exvideo_train.latents.encode_report import Totals, totals_to_json


@pytest.fixture
def run_command(run_command):
    """The shared fixture, with this file's patience."""
    return partial(run_command, timeout_seconds=TIMEOUT_SECONDS)


def _encoders(process):
    """Encoding processes of a running command."""
    found = psutil.Process(process.pid).children()
    return [child for child in found if _runs_spawned_work(child)]


def _runs_spawned_work(process):
    try:
        return "spawn_main" in " ".join(process.cmdline())
    except psutil.Error:
        return False


def test_dead_encoder_is_replaced_and_interruption_reports(data, tiny_model_5b, tmp_path, good_identity, run_command):
    store = tmp_path / "store"
    command = [sys.executable, str(REPOSITORY / SCRIPT), *arguments(tiny_model_5b, data[0] / "good.jsonl", store)[1:]]
    with ended(
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=tmp_path)
    ) as process:
        wait_until(lambda: _encoders(process), process)
        first = wait_until(lambda: _encoders(process), process)[0]
        first.kill()
        wait_until(lambda: [child for child in _encoders(process) if child.pid != first.pid], process)
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=TIMEOUT_SECONDS)
    assert process.returncode == 130, output
    assert "died (exit code -9) and is replaced" in output
    assert "the same command again continues" in output
    assert "remaining" in output
    run_command(arguments(tiny_model_5b, data[0] / "good.jsonl", store))
    assert identity(store) == good_identity


def test_two_machines_under_accelerate_launch_share_the_work(data, tiny_model_5b, run_command, tmp_path, good_identity):
    store = tmp_path / "store"
    command = arguments(tiny_model_5b, data[0] / "clips.jsonl", store)
    command[0] = str(REPOSITORY / SCRIPT)
    # For several GPUs accelerate starts torchrun, which needs no GPU; its own launcher for CPUs needs MPI.
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines=2", "--num_processes=2"]
    launch += ["--mixed_precision=no", "--dynamo_backend=no", "--main_process_ip=127.0.0.1"]
    launch += [f"--main_process_port={free_port()}"]
    log = tmp_path / "second.log"
    with open(log, "wb") as stream:
        second_machine = [sys.executable, *launch, "--machine_rank=1", *command]
        process = subprocess.Popen(second_machine, cwd=tmp_path, stdout=stream, stderr=stream, start_new_session=True)
    with ended(process):
        result = run_command([*launch, "--machine_rank=0", *command])
        assert process.wait(60) == 0, log.read_text()
    assert "on 2 encoder(s)" in result.stdout
    assert "encoding: 100%" in result.stderr
    assert identity(store) == good_identity


def test_two_encoders_of_one_process_give_the_same_store(
    data, tiny_model_5b, tmp_path, good_identity, monkeypatch, capsys
):
    """As on a machine with two GPUs and no launcher."""
    monkeypatch.setattr(encode, "find_launch", lambda device: Launch(0, ["cpu", "cpu"], [2]))
    store = tmp_path / "store"
    # As an earlier run leaves it whose first rank was killed: no figures of this run.
    stale = store / "reports" / "ranks" / "00001.json"
    stale.parent.mkdir(parents=True)
    stale.write_text(json.dumps(totals_to_json([Totals(num_encoded=1000)])))
    run_here(arguments(tiny_model_5b, data[0] / "clips.jsonl", store))
    assert "on 2 encoder(s)" in capsys.readouterr().out
    assert not stale.exists()
    assert identity(store) == good_identity


def test_ray_gives_the_same_store(data, tiny_model_5b, run_command, tmp_path, good_identity):
    store = tmp_path / "store"
    # As two runs leave it that were killed whole while they encoded this healthy clip.
    clip_id = data[1][2].clip_id
    attempts = store / "reports" / "attempts" / clip_id[:3]
    attempts.mkdir(parents=True)
    for number in range(2):
        (attempts / f"{clip_id}.{number}").touch()
    command = arguments(tiny_model_5b, data[0] / "clips.jsonl", store, "engine=ray")
    result = run_command(command, env={"RAY_TMPDIR": "/tmp"})
    assert "encoded      6" in result.stdout
    assert "quarantined  6" in result.stdout
    assert identity(store) == good_identity


def test_killed_runs_end_in_the_uninterrupted_store(tmp_path):
    script = REPOSITORY / "benchmarks" / "kill_encoding.py"
    status, stdout, stderr = finish(
        [sys.executable, script, "--kills", "2", "--clips", "14", "--folder", tmp_path], tmp_path
    )
    assert status == 0, stdout + stderr
