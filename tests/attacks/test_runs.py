"""Options, run folders and checkpoints of a wrong shape, the latter also from strangers (resume=PATH)."""

from __future__ import annotations

import hashlib
import json
import os
import socket
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import save_file
from support.attacks import Attack, attacks, check_ending, held, refused

from exvideo_train.config.commands import Export, Train, Weights
from exvideo_train.config.experiment import LoggerConfig
from exvideo_train.entry import compose_config, to_dataclass
from exvideo_train.errors import UserError
from exvideo_train.export import export, find_trained
from exvideo_train.files import sha256_file
from exvideo_train.parallel.mesh import Mesh, init_mesh
from exvideo_train.training import job
from exvideo_train.training.checkpoint import (
    CheckpointWriter,
    TrainingState,
    list_checkpoints,
    load_checkpoint,
    step_folder,
    write_checkpoint,
)
from exvideo_train.training.loggers import RunLogger, read_metrics
from exvideo_train.training.loop import run_folder_held
from exvideo_train.training.resume import find_checkpoint, set_aside_later_checkpoints

ALONE = Mesh(0, 1, 1, torch.device("cpu"))
NAME = "transformer_blocks.0.attn1.to_q"
LONG = "x" * 300


def tensors(value: float = 0.5) -> dict[str, dict[str, torch.Tensor]]:
    pair = {f"{NAME}.lora_A.weight": torch.full((2, 8), value), f"{NAME}.lora_B.weight": torch.zeros(8, 2)}
    return {key: {name: tensor.clone() for name, tensor in pair.items()} for key in ("lora", "exp_avg", "exp_avg_sq")}


def config(**changes: Any) -> dict[str, Any]:
    lora = {"rank": 2, "alpha": 2.0, "targets": ["attn1.to_q"]}
    sizes = {"num_frames": 17, "height": 64, "width": 96, "fps": 8.0}
    return {"model": {"path": "tiny"}, "lora": lora, **sizes, **changes}


def state(step: int = 1, **changes: Any) -> TrainingState:
    return TrainingState(step, 4 * step, step, 0, config(**changes))


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    write_checkpoint(step_folder(tmp_path / "run", 1), state(), tensors())
    return tmp_path / "run"


# --- options


def option(*overrides: str) -> Attack:
    """Refused by the name of the last option."""
    name = overrides[-1].split("=")[0].lstrip("+")
    return refused(" ".join(overrides), overrides, f"{name}=")


OPTIONS = [
    held("as shipped", ()),
    held("no warm-up, no clipping", ("optim.warmup_steps=0", "optim.gradient_clip=0", "optim.eps=0")),
    *(option(f"optim.lr={value}") for value in ("inf", "nan", "-inf", "0", "-1", "1e30", "2")),
    *(option(f"lora.alpha={value}") for value in ("inf", "nan")),
    *(option(f"lora.rank={value}") for value in (0, -1, 10**9)),
    *(option(f"lora.dropout={value}") for value in ("nan", 1, -0.1)),
    *(option(f"optim.betas=[{value}]") for value in ("0.9,nan", "0.9,1", "-0.1,0.9", "0.9", "")),
    *(option(f"optim.eps={value}") for value in ("nan", -1)),
    *(option(f"optim.weight_decay={value}") for value in ("inf", -1, 1e9)),
    *(option(f"optim.gradient_clip={value}") for value in ("nan", -1)),
    *(option(f"optim.ema_decay={value}") for value in ("nan", 1)),
    *(option(f"optim.final_lr_ratio={value}") for value in ("nan", 2)),
    option("optim.warmup_steps=-1"),
    option("data.caption_dropout=nan"),
    option("data.num_workers=-1"),
    option("data.num_workers=100000"),
    option("data.token_budget=-1"),
    option("data.held_out_clips=-1"),
    option("checkpoint.every_steps=-1"),
    option("checkpoint.keep_last=-2"),
    option("validation.every_steps=-5"),
    option("safety.loss_spike_factor=0"),
    option("safety.time_limit_minutes=inf"),
    option("safety.rank_timeout_seconds=nan"),
    option("max_steps=0"),
    option("max_steps=1000000000000"),
    option("seed=-1"),
    *(option(f"fps={value}") for value in ("inf", "nan", 0, 1e300)),
    option("num_frames=1000000001"),
    option("height=1600000000"),
    refused("digits", (f"data.geometries=[{'9' * 5000}x64x96_8fps]",), "write frames x height x width"),
]


@cache
def composed_once() -> DictConfig:
    return compose_config("train", ["+exp=demo", "latents=x", "run_dir=y"], Train)


@attacks(OPTIONS)
def test_options(attack: Attack) -> None:
    def check() -> dict[str, str]:
        composed = OmegaConf.merge(composed_once(), OmegaConf.from_dotlist(list(attack.content)))
        assert isinstance(composed, DictConfig)
        assert to_dataclass(composed, Train).trained_geometries
        return {}

    check_ending(attack, check)


# --- checkpoints


def signed(edit: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    """Change state.json and make its own checksum right again, as whoever wants it believed does."""

    def attack(folder: Path) -> None:
        path = folder / "state.json"
        content = json.loads(path.read_text())
        edit(content)
        text = json.dumps(content["state"], sort_keys=True)
        content["state_sha256"] = hashlib.sha256(text.encode()).hexdigest()
        path.write_text(json.dumps(content))

    return attack


def of_state(**changes: Any) -> Callable[[Path], None]:
    return signed(lambda content: content["state"].update(changes))


def of_files(**changes: Any) -> Callable[[Path], None]:
    return signed(lambda content: content["sha256"].update({name.replace("__", "."): x for name, x in changes.items()}))


def text(content: str) -> Callable[[Path], None]:
    return lambda folder: (folder / "state.json").write_text(content) and None


def tensors_in(file: str, **changes: torch.Tensor) -> Callable[[Path], None]:
    """Other tensors in a file, with the right checksum."""

    def attack(folder: Path) -> None:
        named = tensors()["lora"] | {f"{NAME}.{half}.weight": tensor for half, tensor in changes.items()}
        save_file({name: tensor for name, tensor in named.items() if tensor.numel()}, folder / file)
        digest = sha256_file(folder / file)
        signed(lambda content: content["sha256"].update({file: digest}))(folder)

    return attack


def as_fifo(file: str) -> Callable[[Path], None]:
    def attack(folder: Path) -> None:
        (folder / file).unlink()
        os.mkfifo(folder / file)

    return attack


def as_folder(file: str) -> Callable[[Path], None]:
    def attack(folder: Path) -> None:
        (folder / file).unlink()
        (folder / file).mkdir()

    return attack


NONE = torch.zeros(0)
CHECKPOINTS = [
    held("as written", lambda folder: None),
    refused("NaN in the adapter", tensors_in("lora.safetensors", lora_A=torch.full((2, 8), torch.nan)), "not finite"),
    refused("infinity in a moment", tensors_in("exp_avg.safetensors", lora_B=torch.full((8, 2), torch.inf)), "finite"),
    refused("integers", tensors_in("lora.safetensors", lora_A=torch.ones(2, 8, dtype=torch.int64)), "lora.safetensors"),
    refused("half precision", tensors_in("lora.safetensors", lora_A=torch.ones(2, 8).half()), "F32"),
    refused("a moment of another shape", tensors_in("exp_avg.safetensors", lora_A=torch.ones(3, 8)), "other tensors"),
    refused("a moment less", tensors_in("exp_avg_sq.safetensors", lora_A=NONE), "exp_avg_sq.safetensors"),
    refused("no tensors", tensors_in("lora.safetensors", lora_A=NONE, lora_B=NONE), "holds no tensors"),
    refused("a file without checksum", lambda folder: save_file(tensors()["lora"], folder / "ema.safetensors"), "ema"),
    refused("a header of 2**60 bytes", lambda folder: (folder / "lora.safetensors").write_bytes(b"\0" * 7 + b"\x10")),
    refused("empty", text(""), "state.json", "state"),
    refused("a list", text("[]"), "whole checkpoint"),
    refused("a number", text("7"), "whole checkpoint"),
    refused("brackets", text("[" * 100_000), "nested deeper"),
    refused("2 MB", text(" " * (2 << 20)), "state.json"),
    refused("not UTF-8", lambda folder: (folder / "state.json").write_bytes(b"\xff\xfe"), "whole checkpoint"),
    refused("a version of words", text('{"format_version": "\\u001b[2J"}'), "format_version='\\x1b[2J'"),
    refused("no state", text('{"format_version": 1}'), "state"),
    refused("a field more", of_state(os="rm"), "os"),
    refused("a field with a name of 9 kB", of_state(**{"x" * 9000: 1}), "state has a field 'xxx", "...", "unknown"),
    refused("a step below 0", of_state(step=-1), "state.step=-1"),
    refused("a step of True", of_state(step=True), "state.step=True"),
    refused("a step of words", of_state(step="1"), "state.step='1'"),
    refused("a position of 1e9", of_state(position=1e9), "state.position="),
    refused("a config of words", of_state(config="x"), "state.config='x'"),
    refused("resumed from a list", of_state(resumed_from=[]), "state.resumed_from=[]"),
    refused("checksums of a file elsewhere", of_files(**{"../../../etc/passwd": "0"}), "sha256="),
    refused("a checksum of null", of_files(lora__safetensors=None), "differs from its checksum"),
    refused("checksums of a list", signed(lambda content: content.update(sha256=[])), "sha256=[]"),
    refused("no checksum of the adapter", signed(lambda content: content.update(sha256={})), "sha256={}"),
    refused("a FIFO for state.json", as_fifo("state.json"), "not a regular file"),
    refused("a FIFO for tensors", as_fifo("lora.safetensors"), "not a regular file"),
    refused("a folder for tensors", as_folder("exp_avg.safetensors"), "not a regular file"),
]


@attacks(CHECKPOINTS)
def test_checkpoints(attack: Attack, run_dir: Path) -> None:
    path = step_folder(run_dir, 1)
    attack.content(path)

    def load() -> dict[str, str]:
        checkpoint = find_checkpoint(run_dir.parent / "other", str(path), print)
        assert checkpoint is not None
        assert checkpoint.tensors("lora").keys() == tensors()["lora"].keys()
        return {}

    check_ending(attack, load)


CONFIGS = [
    held("as written", {}),
    refused("no adapter", {"lora": None}, "state.json"),
    refused("an adapter of words", {"lora": "x"}, "state.json"),
    refused("a rank of words", {"lora": {"rank": "2", "alpha": 2, "targets": ["x"]}}, "state.json"),
    refused("targets of a number", {"lora": {"rank": 2, "alpha": 2, "targets": 7}}, "state.json"),
    refused("no model", {"model": {}}, "state.json"),
    refused("frames of words", {"num_frames": "17"}, "state.json"),
    refused("an alpha of 0", {"lora": {"rank": 2, "alpha": 0, "targets": ["attn1.to_q"]}}, "alpha=0"),
    refused("another rank", {"lora": {"rank": 3, "alpha": 2, "targets": ["attn1.to_q"]}}, "rank 3"),
]


@attacks(CONFIGS)
def test_export_of_a_checkpoint_with_a_config_of_another_shape(attack: Attack, tmp_path: Path) -> None:
    write_checkpoint(step_folder(tmp_path, 1), state(**attack.content), tensors())
    target = tmp_path / "a.safetensors"

    def write() -> dict[str, str]:
        export(Export(run_dir=str(tmp_path), adapter=str(target)))
        return {}

    check_ending(attack, write)
    assert target.exists() == (attack.name == "as written")


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_checkpoint_of_non_finite_weights_is_not_written(run_dir: Path, value: float) -> None:
    writer = CheckpointWriter(run_dir, keep_last=1, keep_every=0, log=print)
    with pytest.raises(UserError, match=r"^step 2: lora of transformer.*not saved; .*step_00000001.*optim\.lr"):
        writer.save(state(2), tensors(value), wait=True)
    assert list_checkpoints(run_dir) == [step_folder(run_dir, 1)]
    assert load_checkpoint(step_folder(run_dir, 1)).state == state()


# --- run folders


def test_what_else_lies_among_checkpoints_is_left_alone(run_dir: Path) -> None:
    folder = run_dir / "checkpoints"
    strays = ["step_1x", "step_", "step_00000002 (copy)", "step_" + "9" * 200, ".step_x", "superseded_step_00000009"]
    for name in strays:
        (folder / name).mkdir()
    (folder / "step_00000003").write_text("a file")
    assert list_checkpoints(run_dir) == [step_folder(run_dir, 1)]
    set_aside_later_checkpoints(run_dir, 1, print)
    CheckpointWriter(run_dir, keep_last=1, keep_every=0, log=print).save(state(4), tensors(), wait=True)
    assert list_checkpoints(run_dir) == [step_folder(run_dir, 4)]
    assert find_trained(run_dir, Weights.raw, None)[1] == step_folder(run_dir, 4)
    assert {path.name for path in folder.iterdir()} == {*strays, "step_00000003", "step_00000004"} - {".step_x"}


def a_file(path: Path) -> Path:
    path.write_text("")
    return path


FOLDERS = [
    held("new", lambda base: base / "a" / "b"),
    refused("of 300 letters", lambda base: base / LONG, "run_dir=", "name too long"),
    refused("below one of 300 letters", lambda base: base / LONG / "run", "run_dir=", "name too long"),
    refused("a file", lambda base: a_file(base / "file"), "run_dir=", "Not a directory"),
    refused("below a file", lambda base: a_file(base / "file") / "run", "run_dir=", "Not a directory"),
    refused("not writable", lambda base: Path("/proc/run"), "run_dir=", "cannot write"),
]


@attacks(FOLDERS)
def test_run_folders(attack: Attack, tmp_path: Path) -> None:
    path = attack.content(tmp_path)

    def use() -> dict[str, str]:
        with run_folder_held(Train(run_dir=str(path)), ALONE):
            assert path.is_dir()
            assert find_checkpoint(path, "auto", print) is None
        return {}

    check_ending(attack, use)


@pytest.mark.parametrize("path", [Path(LONG), Path("/dev/null")])
def test_a_dry_run_and_an_export_name_the_folder(path: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="run_dir="):
        find_checkpoint(path, "auto", print)
    with pytest.raises(UserError, match="no checkpoint or run folder"):
        find_checkpoint(tmp_path, str(path), print)
    with pytest.raises(UserError, match="run_dir="):
        export(Export(run_dir=str(path), adapter=str(tmp_path / "a.safetensors")))


def test_a_folder_that_cannot_be_listed_is_not_an_empty_one(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").symlink_to(tmp_path / "checkpoints")
    with pytest.raises(UserError, match="cannot be listed"):
        find_checkpoint(tmp_path, "auto", print)


RECORD = '{"step": 1, "loss": 0.5}'
WORDS = '{"loss": 1, "extension_gap": null, "by_position": [""]}'
SCORES = '{"loss": 1, "extension_gap": null, "by_position": [1, null]}'
RECORDS = [
    held("as written", RECORD),
    held("a validation", f'{{"step": 0, "validation": {SCORES}}}'),
    held("fields of a later version", '{"step": 1, "loss": null, "more": [[]]}'),
    refused("a list", "[]", "line 2", "delete that line"),
    refused("a number", "7", "line 2"),
    refused("half a record", RECORD[:9], "line 2"),
    refused("an empty line", "", "line 2"),
    refused("no step", '{"loss": 1}', "line 2", "step"),
    refused("a step of words", '{"step": "1"}', "line 2", "step"),
    refused("a step of True", '{"step": true}', "line 2", "step"),
    refused("a loss of words", '{"step": 1, "loss": "1"}', "line 2"),
    refused("a loss of NaN", '{"step": 1, "loss": NaN}', "line 2", "NaN"),
    refused("400 digits", f'{{"step": 1, "loss": {"9" * 400}}}', "line 2", "digits"),
    refused("brackets", "[" * 100_000, "line 2", "nested deeper"),
    refused("a validation of words", '{"step": 1, "validation": "x"}', "line 2", "validation='x'"),
    refused(
        "positions of words", f'{{"step": 1, "validation_ema": {SCORES.replace("null]", chr(34) * 2 + "]")}}}', "2"
    ),
    held("sample videos", '{"step": 1, "samples": {"with": {"sharpness": 1.5, "cuts": null}}}'),
    refused("samples of words", '{"step": 1, "samples": "x"}', "line 2", "samples='x'"),
    refused("a measure of words", '{"step": 1, "samples": {"with": {"cuts": "1"}}}', "line 2"),
    refused("escapes", '{"step": "\\u001b[2J"}', "line 2"),
]


@attacks(RECORDS)
def test_records(attack: Attack, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(f"{RECORD}\n{attack.content}\n")

    def read() -> dict[str, str]:
        assert len(read_metrics(tmp_path)) == 2
        return {}

    check_ending(attack, read)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_records_that_are_no_file(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "metrics.jsonl")
    with pytest.raises(UserError, match="not a regular file"):
        RunLogger(tmp_path, LoggerConfig(), {}, is_main=True).start(1, 9)


# --- the machine


def test_shared_memory_that_cannot_be_written_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch would wait for ever for a batch that its reader cannot send."""
    monkeypatch.setattr(job, "SHARED_MEMORY", Path("/proc"))
    job._check_shared_memory(0, ALONE)
    with pytest.raises(UserError, match=r"^/proc is not writable .*--ipc=host.*data\.num_workers=0"):
        job._check_shared_memory(1, ALONE)


@pytest.mark.parametrize(
    ("port", "remedy"), [("used", "--master_port 29501"), ("abc", "launch.md"), ("99999", "launch")]
)
def test_a_port_that_cannot_be_had(port: str, remedy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        taken = str(other.getsockname()[1]) if port == "used" else port
        for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": taken}.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(UserError, match=f"MASTER_PORT={taken}: .*{remedy}"):
            init_mesh(1, 60.0)
