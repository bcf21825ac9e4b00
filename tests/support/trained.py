"""The runs that the integration tests of training compare, made once a session: two, one and four ranks.

All runs of one number of ranks share their processes (see many_runs.py). All are fp32, so that forms that compute the
same in another order agree to rounding.
"""

from __future__ import annotations

import json
import shutil
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from exvideo_train.training.order import split_held_out
from support.ranks import many_runs
from support.store import BASE, LONG, SHORT, clip_ids, write_store

STEPS = 20
# Epochs of 14 clips and steps of 4: a group crosses the border of two epochs.
SHORT_CLIPS, BASE_CLIPS, LONG_CLIPS = clip_ids(14), clip_ids(7, 20), clip_ids(12, 40)
NAN_CLIP = SHORT_CLIPS[5]
CROSS_STEPS = 7
MIXED = [
    f"data.geometries=[{SHORT.name},{BASE.name}]",
    "data.token_budget=312",
    "max_steps=8",
    "checkpoint.every_steps=3",
    "checkpoint.keep_last=9",
]
HELD_OUT = [
    f"num_frames={LONG.num_frames}",
    "data.held_out_clips=3",
    "max_steps=4",
    "optim.ema_decay=0.5",
    "checkpoint.every_steps=1",
    "checkpoint.keep_last=9",
]
# Ways to compute the same: memory options by the run's name.
FORMS = {
    "plain": [],
    "compiled": ["memory.compile=true"],
    "compiled_keep_attention": ["memory.compile=true", "memory.recompute=keep_attention"],
    "math_attention": ["memory.attention=math"],
}


class Trained:
    """Results of the runs, and their run folders under ``folder``."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder = folder
        self.model = model
        self.latents = folder / "latents"
        write_store(self.latents, model, {SHORT: SHORT_CLIPS, BASE: BASE_CLIPS, LONG: LONG_CLIPS})
        self.nan_latents = folder / "nan_latents"
        write_store(self.nan_latents, model, {SHORT: SHORT_CLIPS}, nan_clips=[NAN_CLIP])

    @property
    def held_out(self) -> list[str]:
        """Clips that the runs with `HELD_OUT` hold out."""
        return split_held_out(sorted(LONG_CLIPS), 3)[1]

    def overrides(self, name: str, *more: str) -> list[str]:
        """Options of a run in the folder ``name``; later ones win."""
        return [
            "+exp=demo",
            f"model.path={self.model}",
            "model.dtype=fp32",
            f"latents={self.latents}",
            f"run_dir={self.run_dir(name)}",
            "num_frames=17",
            "fps=8",
            f"max_steps={STEPS}",
            "checkpoint.every_steps=0",
            "validation.every_steps=0",
            "validation.sample_every_steps=0",
            "validation.timestep_quantiles=4",
            "data.held_out_clips=0",
            "data.num_workers=0",
            "logger=console",
            "optim.ema_decay=0",
            "optim.lr=0.003",
            "optim.schedule=cosine",
            "optim.warmup_steps=3",
            # Most steps are clipped at this norm, some are not.
            "optim.gradient_clip=0.09",
            *more,
        ]

    def run_dir(self, name: str) -> Path:
        return self.folder / name

    def spec(self, name: str, *more: str, folder: str | None = None, **options: Any) -> dict[str, Any]:
        return {"name": name, "overrides": self.overrides(folder or name, *more), **options}

    def metrics(self, name: str) -> list[dict[str, Any]]:
        """Records of optimizer steps."""
        return [record for record in self.records(name) if "loss" in record]

    def records(self, name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.run_dir(name) / "metrics.jsonl").read_text().splitlines()]

    def losses(self, name: str) -> list[float]:
        return [record["loss"] for record in self.metrics(name)]

    def grad_norms(self, name: str) -> list[float]:
        return [record["grad_norm"] for record in self.metrics(name)]

    def validations(self, name: str, key: str = "validation") -> list[dict[str, Any]]:
        return [record[key] for record in self.records(name) if key in record]

    def checkpoint(self, name: str, step: int) -> Path:
        return self.run_dir(name) / "checkpoints" / f"step_{step:08d}"

    def adapter(self, name: str, file: str = "adapter.safetensors") -> dict[str, torch.Tensor]:
        return load_file(self.run_dir(name) / file)

    @cached_property
    def two(self) -> dict[str, Any]:
        """Two ranks."""
        spec, saved = self.spec, ["checkpoint.every_steps=5", "checkpoint.keep_last=9"]
        dropout = ["data.batch_size=2", "lora.dropout=0.3", "max_steps=6", *saved, "checkpoint.every_steps=2"]
        nan = [f"latents={self.nan_latents}", "data.batch_size=2", "max_steps=6"]
        return many_runs(
            [
                spec("two", "data.batch_size=2", *saved),
                spec("sequence", "data.batch_size=4", "parallel.sequence=2", unequal=True),
                spec("zero1", "data.batch_size=2", "memory.zero_stage=1"),
                spec("accumulated", "optim.accumulation_steps=2"),
                spec("offloaded", "data.batch_size=2", "memory.offload_optimizer=true", *saved),
                # Resume: as after a signal, and from a path, for each way that states are kept.
                spec("stopped", "data.batch_size=2", stop_after=7),
                spec("stopped again", "data.batch_size=2", folder="stopped"),
                spec("offloaded_resumed", *self._from("offloaded", 15), "memory.offload_optimizer=true"),
                spec("cross 2", "data.batch_size=2", f"max_steps={CROSS_STEPS}", folder="cross", stop_after=2),
                spec("cross_whole", "data.batch_size=2", f"max_steps={CROSS_STEPS}"),
                spec("dropout", *dropout),
                spec("dropout_kept", *dropout, "memory.recompute=none"),
                spec("dropout_resumed", *dropout, f"resume={self.checkpoint('dropout', 4)}"),
                spec("mixed", *MIXED),
                spec("mixed_resumed", *MIXED, f"resume={self.checkpoint('mixed', 3)}"),
                spec("held_out_2", *HELD_OUT, "validation.every_steps=2"),
                spec("nan_1", *nan, "memory.zero_stage=1"),
                spec("nan_2", *nan),
                spec("spoilt", "data.batch_size=2", "checkpoint.every_steps=3", "max_steps=9", spoil_after=4),
                spec("nan_offloaded", *nan, "memory.offload_optimizer=true"),
                # ZeRO-3 last: for the rest of a process DeepSpeed replaces torch's linear by one that rounds otherwise.
                spec("zero3", "data.batch_size=2", "memory.zero_stage=3", "optim.ema_decay=0.5", *saved),
                spec("zero3_resumed", *self._from("zero3", 15), "memory.zero_stage=3", "optim.ema_decay=0.5"),
                spec("zero1_from_zero3", *self._from("zero3", 15), "memory.zero_stage=1", "optim.ema_decay=0.5"),
                spec(
                    "zero3_sequence",
                    "data.batch_size=4",
                    "parallel.sequence=2",
                    "memory.zero_stage=3",
                    stop_after=5,
                ),
                spec("held_out_3", *HELD_OUT, "validation.every_steps=2", "memory.zero_stage=3"),
                spec("nan_3", *nan, "memory.zero_stage=3"),
            ],
            2,
            self.folder / "two_ranks",
        )

    def _from(self, name: str, step: int) -> list[str]:
        return ["data.batch_size=2", f"resume={self.checkpoint(name, step)}"]

    @cached_property
    def one(self) -> dict[str, Any]:
        """One rank; goes on with the run that two ranks began."""
        _ = self.two
        spec = self.spec
        faults = ["data.batch_size=4", "max_steps=6"]
        held_out = [*HELD_OUT, "data.batch_size=2", "validation.every_steps=2"]
        from_path = ["max_steps=4", f"resume={self.checkpoint('never', 1)}"]
        adapter = self.run_dir("held_out_1") / "adapter.safetensors"
        self._damage_latents()
        return many_runs(
            [
                spec("one", "data.batch_size=4"),
                spec("one_accumulated", "data.batch_size=2", "optim.accumulation_steps=2"),
                spec("cross 1", "data.batch_size=4", f"max_steps={CROSS_STEPS}", folder="cross", stop_after=4),
                spec("mixed_one", *MIXED, "optim.accumulation_steps=2"),
                spec("held_out_1", *held_out),
                spec("begun_from_file", *held_out, "max_steps=1", f"lora.init={adapter}"),
                spec("held_out_none", *HELD_OUT, "data.batch_size=2"),
                spec("bf16", "model.dtype=bf16", "max_steps=3", fingerprint=True),
                spec("bf16_resumed", "model.dtype=bf16", "max_steps=6", folder="bf16"),
                spec(
                    "disk_full",
                    *faults,
                    "checkpoint.every_steps=1",
                    "optim.ema_decay=0.9",
                    disk_full=[3, 4],
                ),
                spec("all_nan", f"latents={self.folder / 'all_nan'}", *faults, "safety.max_nonfinite_steps=3"),
                spec("spoilt_when_saved", *faults, "checkpoint.every_steps=1", spoil_after=3),
                spec("corrupt", f"latents={self.folder / 'corrupt'}", *faults),
                spec("too_corrupt", f"latents={self.folder / 'corrupt'}", *faults, "data.max_corrupt_clips=1"),
                spec(
                    "logged",
                    "max_steps=4",
                    "logger.wandb=true",
                    "logger.tensorboard=true",
                    "logger.log_every_steps=2",
                    "data.num_workers=1",
                ),
                spec("spikes", *faults, "safety.loss_spike_factor=1.01"),
                spec("spikes_logged_late", *faults, "safety.loss_spike_factor=1.01", "logger.log_every_steps=4"),
                spec("held_out_damaged", *held_out, f"latents={self.folder / 'held_out_corrupt'}"),
                # The stop comes in a step that validation is due in.
                spec("held_out_stopped", *held_out, stop_after=2),
                spec("held_out_stopped again", *held_out, folder="held_out_stopped"),
                *(spec(name, "max_steps=2", *options) for name, options in FORMS.items()),
                spec("never", "max_steps=1", "resume=never"),
                spec("from_path", *from_path, stop_after=2),
                spec("from_path again", *from_path, folder="from_path"),
                spec("never again", "max_steps=1", "resume=never", folder="never"),
                spec("other seed", "max_steps=1", "seed=7", "lora.rank=4", folder="never"),
            ],
            1,
            self.folder / "one_rank",
        )

    def _damage_latents(self) -> None:
        write_store(self.folder / "all_nan", self.model, {SHORT: SHORT_CLIPS}, nan_clips=SHORT_CLIPS)
        store = self.folder / "corrupt"
        shutil.copytree(self.latents, store)
        files = sorted((store / "clips" / SHORT.name).rglob("*.safetensors"))
        content = bytearray(files[2].read_bytes())
        content[-5] ^= 1
        files[2].write_bytes(content)
        files[3].write_bytes(files[3].read_bytes()[:-7])
        store = self.folder / "held_out_corrupt"
        shutil.copytree(self.latents, store)
        damaged = next((store / "clips" / LONG.name).rglob(f"{self.held_out[0]}.safetensors"))
        damaged.write_bytes(damaged.read_bytes()[:-7])

    @cached_property
    def two_again(self) -> dict[str, Any]:
        """Two ranks finish the run that two began and one went on with."""
        _ = self.one
        cross = self.spec("cross 3", "data.batch_size=2", f"max_steps={CROSS_STEPS}", folder="cross")
        return many_runs([cross], 2, self.folder / "two_ranks_again")

    @cached_property
    def four(self) -> dict[str, Any]:
        """Four ranks as 2 data x 2 sequence."""
        return many_runs(
            [self.spec("two_by_two", "data.batch_size=2", "parallel.sequence=2")], 4, self.folder / "four_ranks"
        )
