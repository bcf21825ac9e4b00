"""A forecast as tables for a terminal, and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from exvideo_train.config.plan import Plan
from exvideo_train.planning.forecast import GIB, HOURS_PER_DAY, Disk, Forecast, Model
from exvideo_train.planning.measures import MeasuresRow
from exvideo_train.planning.suggestions import Suggestion

MEMORY_ROWS = {
    "weights": "frozen weights",
    "trained": "trained, fp32",
    "optimizer": "optimizer: fp32 copy, moments, moving average",
    "gradients": "gradients and their buffers",
    "kept": "activations kept, batch",
    "working": "working peak",
    "runtime": "reserve: CUDA, NCCL, fragmentation (assumed)",
}
MOMENTS = {"forward": "the forward pass", "backward": "the backward pass", "update": "the update"}


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns aligned, the first to the left and the others to the right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        rest = (cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True))
        return "  ".join([cells[0].ljust(widths[0]), *rest]).rstrip()

    return "\n".join([line(header), "  ".join("-" * width for width in widths), *map(line, rows)])


def gib(num_bytes: float) -> str:
    return f"{num_bytes / GIB:,.2f}"


def _suggestions_table(title: str, suggestions: Sequence[Suggestion]) -> list[str]:
    rows = [
        [
            suggestion.text,
            gib(suggestion.forecast.memory.total),
            f"{suggestion.forecast.time.total:,.1f}",
            f"{suggestion.forecast.gpu_seconds_per_sample:,.1f}",
            "same" if suggestion.same_adapter else "another",
        ]
        for suggestion in suggestions
    ]
    return [title, table(["change", "GiB", "s/step", "GPU-s/sample", "adapter"], rows), ""]


def text(
    config: Plan,
    model: Model,
    here: Forecast,
    others: Sequence[Forecast],
    on_disk: Disk,
    suggestions: Sequence[Suggestion],
) -> str:
    """The whole report."""
    memory, device = here.memory, here.device
    samples = f"{here.samples_per_step} samples a step"
    lines = [
        f"{config.model.path}, {here.geometry.name}: {here.num_tokens:,} tokens a sample, "
        f"{here.trained:,} trained parameters",
        f"{here.world_size} x {device.name} ({device.memory_gib} GiB each) = "
        f"{here.world_size // here.sequence_size} data x {here.sequence_size} sequence, "
        f"ZeRO-{config.memory.zero_stage}, recompute {config.memory.recompute.name}, {samples}",
        "",
        table(
            [f"memory of one GPU in {MOMENTS[memory.moment]} (its worst moment)", "GiB"],
            [
                *([title, gib(getattr(memory, name))] for name, title in MEMORY_ROWS.items()),
                ["total", gib(memory.total)],
                ["without the reserve: torch's max_memory_allocated", gib(memory.allocated)],
                *([["in host memory, a rank", gib(memory.host)]] if memory.host else []),
            ],
        ),
        "",
        _verdict(here),
        "",
    ]
    if suggestions and here.fits:
        lines += _suggestions_table("Faster, and fits too:", suggestions)
    elif suggestions:
        lines += _suggestions_table("What would make it fit, cheapest first:", suggestions)
    elif not here.fits:
        lines += ["Nothing that was tried makes it fit: use more GPUs a sample, or a smaller size.", ""]
    lines += [_work_table(here), "", _time_table(others), "", _run_lines(config, here, on_disk)]
    return "\n".join(lines)


def _verdict(here: Forecast) -> str:
    spare = here.spare_bytes
    share = abs(spare) / GIB / here.device.memory_gib
    if here.fits:
        return (
            f"Fits in {here.device.name}'s {here.device.memory_gib} GiB: YES, {gib(spare)} GiB to spare ({share:.0%})."
        )
    return f"Fits in {here.device.name}'s {here.device.memory_gib} GiB: NO, {gib(-spare)} GiB too much ({share:.0%})."


def _work_table(here: Forecast) -> str:
    trace = here.trace
    attention = trace.attention_forward_flops + trace.attention_backward_flops
    total = trace.forward_flops + trace.backward_flops
    return table(
        ["work of one GPU in a micro-step", ""],
        [
            ["forward, PFLOP", f"{trace.forward_flops / 1e15:,.3f}"],
            ["backward with recomputation, PFLOP", f"{trace.backward_flops / 1e15:,.3f}"],
            ["of both, attention", f"{attention / total:.0%}"],
            ["read and written by element-wise work, GiB", f"{trace.moved_bytes / GIB:,.0f}"],
            ["sent to other GPUs in a step, GiB", gib(here.time.wire_bytes)],
        ],
    )


def _time_table(forecasts: Sequence[Forecast]) -> str:
    rows = []
    for planned in forecasts:
        time = planned.time
        rows.append(
            [
                planned.device.name,
                *(f"{value:,.1f}" for value in (time.products, time.attention, time.elementwise)),
                f"{time.communication + time.offload:,.1f}",
                f"{time.total:,.1f}",
                f"{planned.share_of_peak:.0%}",
                f"{planned.run_hours / HOURS_PER_DAY:,.2f}",
                "yes" if planned.fits else "no",
            ]
        )
    header = [
        "seconds a step (estimated)",
        "products",
        "attention",
        "element-wise",
        "links",
        "total",
        "of peak",
        "days",
    ]
    return table([*header, "fits"], rows)


def _run_lines(config: Plan, here: Forecast, on_disk: Disk) -> str:
    samples = here.samples_per_step * here.max_steps
    lines = [
        f"run: {here.max_steps:,} steps, {samples:,} samples = {samples / config.clips:,.1f} epochs of "
        f"{config.clips:,} clips; {here.run_hours:,.1f} h, {here.gpu_hours:,.0f} GPU hours"
    ]
    if config.price is not None:
        lines.append(f"price: {here.gpu_hours * config.price:,.0f} at {config.price:g} a GPU hour")
    lines.append(
        f"disk: {gib(on_disk.latents)} GiB of latents, {gib(on_disk.checkpoints)} GiB of checkpoints "
        f"({gib(on_disk.checkpoint)} each), {gib(on_disk.adapter)} GiB of adapters"
    )
    lines.append(
        "memory and FLOPs are computed from the real step; times are estimated from stated shares of the vendors' "
        "figures (docs/plan.md), without data waiting, validation and torch.compile"
    )
    return "\n".join(lines)


def measures_text(config: Plan, added: Sequence[MeasuresRow], without: Sequence[MeasuresRow], memory_gib: float) -> str:
    """The table of the six measures."""
    header = ["memory of one GPU, GiB", "weights+encoders", "gradients+optimizer", "activations", "total", "fits"]

    def cells(row: MeasuresRow) -> list[str]:
        memory = row.memory
        return [
            row.title,
            gib(memory.weights + memory.trained + row.encoders),
            gib(memory.gradients + memory.optimizer),
            gib(memory.kept + memory.working),
            gib(row.total),
            "yes" if row.total <= memory_gib * GIB else "no",
        ]

    return "\n".join(
        [
            f"{config.model.path}, {config.geometry.name}, {config.gpus} x {config.device.name}: "
            "computed, not measured",
            "",
            table(header, [cells(row) for row in added]),
            "",
            table(header, [cells(row) for row in without]),
        ]
    )


def as_json(
    here: Forecast, others: Sequence[Forecast], on_disk: Disk, suggestions: Sequence[Suggestion]
) -> dict[str, Any]:
    """Everything of the report as plain values; bytes and seconds without rounding."""
    return {
        **_forecast_json(here),
        "disk_bytes": asdict(on_disk),
        "devices": {planned.device.name: _forecast_json(planned) for planned in others},
        "options": [
            {"change": suggestion.text, "same_adapter": suggestion.same_adapter, **_forecast_json(suggestion.forecast)}
            for suggestion in suggestions
        ],
    }


def _forecast_json(planned: Forecast) -> dict[str, Any]:
    return {
        "device": planned.device.name,
        "gpus": planned.world_size,
        "geometry": planned.geometry.name,
        "num_tokens": planned.num_tokens,
        "trained_parameters": planned.trained,
        "fits": planned.fits,
        "spare_bytes": planned.spare_bytes,
        "memory_bytes": {
            **asdict(planned.memory),
            "allocated": planned.memory.allocated,
            "total": planned.memory.total,
        },
        "trace": asdict(planned.trace),
        "step_seconds": {**asdict(planned.time), "total": planned.time.total},
        "share_of_peak": planned.share_of_peak,
        "samples_per_step": planned.samples_per_step,
        "run_hours": planned.run_hours,
        "gpu_hours": planned.gpu_hours,
    }


def measures_json(added: Sequence[MeasuresRow], without: Sequence[MeasuresRow]) -> dict[str, Any]:
    """The table of the six measures as plain values."""

    def row_json(row: MeasuresRow) -> dict[str, Any]:
        return {"title": row.title, "total": row.total, "encoders": row.encoders, **asdict(row.memory)}

    return {"added": [row_json(row) for row in added], "without": [row_json(row) for row in without]}
