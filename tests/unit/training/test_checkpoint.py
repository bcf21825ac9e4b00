from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from exvideo_train.errors import UserError
from exvideo_train.training.checkpoint import (
    CheckpointWriter,
    CorruptCheckpoint,
    TrainingState,
    list_checkpoints,
    load_checkpoint,
    step_folder,
    write_checkpoint,
)
from exvideo_train.training.resume import (
    check_same_run,
    find_checkpoint,
    newest_valid_checkpoint,
    set_aside_later_checkpoints,
)

CONFIG = {"seed": 6, "lora": {"rank": 8}, "optim": {"lr": 1e-3}}


def state(step: int) -> TrainingState:
    return TrainingState(step=step, position=4 * step, num_updates=step, num_skipped=0, config=CONFIG)


def tensors(step: int) -> dict[str, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(step)
    names = ["block.0.lora_A.weight", "block.0.lora_B.weight"]
    return {key: {n: torch.randn(8, 64, generator=generator) for n in names} for key in ("lora", "exp_avg")}


def write(run_dir: Path, *steps: int) -> None:
    for step in steps:
        write_checkpoint(step_folder(run_dir, step), state(step), tensors(step))


def test_round_trip(tmp_path: Path) -> None:
    write(tmp_path, 3)
    checkpoint = load_checkpoint(step_folder(tmp_path, 3))
    assert checkpoint.state == state(3)
    for key, named in tensors(3).items():
        loaded = checkpoint.tensors(key)
        assert all(torch.equal(loaded[name], tensor) for name, tensor in named.items())
    with pytest.raises(UserError, match="kept no ema"):
        checkpoint.tensors("ema")


@pytest.mark.parametrize("file", ["lora.safetensors", "exp_avg.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing", "empty"])
def test_a_damaged_checkpoint_is_passed_over_and_named(tmp_path: Path, file: str, damage: str) -> None:
    write(tmp_path, 1, 2)
    path = step_folder(tmp_path, 2) / file
    content = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    elif damage == "flipped" and file == "state.json":
        # A flipped bit in JSON that stays JSON: the state has a checksum too.
        path.write_bytes(content.replace(b'"step": 2', b'"step": 3'))
    elif damage == "flipped":
        content[-9] ^= 0x10
        path.write_bytes(content)
    else:
        path.write_bytes(content[:-1] if damage == "truncated" else b"")
    said: list[str] = []
    found = newest_valid_checkpoint(tmp_path, said.append)
    if damage == "truncated" and file == "state.json":
        # Its last byte is the newline after the JSON: nothing is lost.
        assert found is not None
        return
    assert found is not None
    assert found.state.step == 1
    assert len(said) == 1
    assert "step_00000002" in said[0]
    assert "checkpoint passed over" in said[0]
    with pytest.raises(CorruptCheckpoint):
        load_checkpoint(step_folder(tmp_path, 2))


def test_every_checkpoint_damaged_stops_instead_of_beginning_anew(tmp_path: Path) -> None:
    write(tmp_path, 1, 2)
    for path in list_checkpoints(tmp_path):
        (path / "lora.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="none of its 2 checkpoints is valid"):
        find_checkpoint(tmp_path, "auto", print)


def test_resume_options(tmp_path: Path) -> None:
    run, empty = tmp_path / "run", tmp_path / "empty"
    write(run, 1, 2)
    assert find_checkpoint(empty, "auto", print) is None
    assert find_checkpoint(empty, "never", print) is None
    for resume, step in (("auto", 2), (str(step_folder(run, 1)), 1), (str(run), 2)):
        found = find_checkpoint(run, resume, print)
        assert found is not None
        assert found.state.step == step
    from_elsewhere = find_checkpoint(empty, str(run), print)
    assert from_elsewhere is not None
    assert from_elsewhere.state.step == 2
    with pytest.raises(UserError, match="choose another run_dir"):
        find_checkpoint(run, "never", print)
    with pytest.raises(UserError, match="resume=newest: not auto, not never"):
        find_checkpoint(run, "newest", print)
    (step_folder(run, 2) / "lora.safetensors").write_bytes(b"")
    with pytest.raises(CorruptCheckpoint):
        find_checkpoint(run, str(step_folder(run, 2)), print)


def test_resuming_from_an_earlier_checkpoint_sets_the_later_ones_aside(tmp_path: Path) -> None:
    """Else they would be the newest, and what the resumed run writes would be pruned as old."""
    write(tmp_path, 2, 4, 6)
    said: list[str] = []
    set_aside_later_checkpoints(tmp_path, 2, said.append)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_00000002"]
    assert "step_00000004" in said[0]
    writer = CheckpointWriter(tmp_path, keep_last=2, keep_every=0, log=print)
    writer.save(state(3), tensors(3), wait=True)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_00000002", "step_00000003"]
    # Nothing was thrown away.
    assert load_checkpoint(tmp_path / "checkpoints" / "superseded_step_00000006").state.step == 6
    write(tmp_path, 6)
    set_aside_later_checkpoints(tmp_path, 3, said.append)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_00000002", "step_00000003"]


def test_keep_last_and_keep_every(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, keep_last=2, keep_every=4, log=print)
    for step in range(1, 11):
        writer.save(state(step), tensors(step))
    writer.finish(raise_error=True)
    assert [int(path.name[-8:]) for path in list_checkpoints(tmp_path)] == [4, 8, 9, 10]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir() if path.name.startswith(".")] == []


def test_a_failed_write_is_told_and_the_previous_stays(tmp_path: Path) -> None:
    said: list[str] = []
    writer = CheckpointWriter(tmp_path, keep_last=1, keep_every=0, log=said.append)
    writer.save(state(1), tensors(1), wait=True)
    # A file where the next checkpoint's folder would be written stands for any error of the disk.
    (tmp_path / "checkpoints" / ".step_00000002.writing").write_text("")
    writer.save(state(2), tensors(2))
    writer.finish()
    if said:
        assert "the previous one stays valid" in said[0]
        with pytest.raises(UserError, match="not written"):
            writer.save(state(2), {"lora": {"x": torch.zeros(1)}, "a/b": {"x": torch.zeros(1)}}, wait=True)
    found = newest_valid_checkpoint(tmp_path, print)
    assert found is not None


def test_stale_half_written_folders_go_away(tmp_path: Path) -> None:
    write(tmp_path, 1)
    stale = tmp_path / "checkpoints" / ".step_00000002.writing"
    stale.mkdir()
    (stale / "lora.safetensors").write_bytes(b"half")
    write(tmp_path, 3)
    assert not stale.exists()


def test_writing_the_same_step_again_never_leaves_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that is started again when it was finished writes its last step again."""
    write(tmp_path, 5)
    renames: list[Path] = []
    rename = Path.rename
    monkeypatch.setattr(Path, "rename", lambda self, target: (renames.append(self), rename(self, target))[1])
    write(tmp_path, 5)
    assert renames == [], "a valid checkpoint of the same state is not touched"
    (step_folder(tmp_path, 5) / "lora.safetensors").write_bytes(b"")
    write(tmp_path, 5)
    assert load_checkpoint(step_folder(tmp_path, 5)).state == state(5)


WRITE_FOR_EVER = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_checkpoint import CheckpointWriter, state, tensors
writer = CheckpointWriter(Path(sys.argv[1]), keep_last=1, keep_every=0, log=print)
writer.save(state(0), tensors(0), wait=True)
print("ready", flush=True)
for step in range(1, 10**6):
    writer.save(state(step), tensors(step))
"""


def test_a_kill_at_any_moment_leaves_a_valid_checkpoint(tmp_path: Path) -> None:
    import random
    import time

    moments = random.Random(0)
    for _ in range(4):
        command = [sys.executable, "-c", WRITE_FOR_EVER, str(tmp_path), str(Path(__file__).parent)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, env=os.environ)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(0.1 + 0.2 * moments.random())
        process.kill()
        process.wait()
        found = find_checkpoint(tmp_path, "auto", print)
        assert found is not None
        assert found.tensors("lora").keys() == tensors(1)["lora"].keys()
        assert len(list_checkpoints(tmp_path)) <= 2


def test_checkpoint_of_another_format_version_is_named(tmp_path: Path) -> None:
    write(tmp_path, 1)
    path = step_folder(tmp_path, 1) / "state.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "format_version": 99}))
    with pytest.raises(UserError, match="format_version=99"):
        load_checkpoint(step_folder(tmp_path, 1))


SHAPES = ("lora.rank", "lora.alpha", "lora.targets")


def test_check_same_run() -> None:
    assert check_same_run(CONFIG, CONFIG, SHAPES) == []
    notes = check_same_run(CONFIG, {**CONFIG, "optim": {"lr": 2e-3}, "run_dir": "elsewhere"}, SHAPES)
    assert notes == ["optim.lr was 0.001, now 0.002"]
    with pytest.raises(UserError, match=r"lora.rank was 8, now 16"):
        check_same_run(CONFIG, {**CONFIG, "lora": {"rank": 16}}, SHAPES)
