"""``curves.png``: how a run goes, in one picture."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SAMPLE_CURVES = {
    "sharpness": "sharpness, levels²",
    "sharpness_slope": "slope of sharpness, share a second",
    "high_band": "energy in the high band",
    "high_band_slope": "slope of the high band, share a second",
    "flicker": "flicker, 1 none",
    "motion": "motion, diagonals a second",
    "colour_drift": "drift of colour, ΔE",
    "still_share": "half seconds that stand still",
}
"""Measures of sample videos that are drawn (docs/evaluation.md says what each is); metrics.jsonl has all."""


def draw_curves(records: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw `curves_figure` into a PNG, which is replaced whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}")
    curves_figure(records).savefig(temporary, format="png", dpi=100)
    temporary.replace(path)


def curves_figure(records: Sequence[dict[str, Any]]) -> Figure:
    """Losses side by side, and below them, once there are sample videos, what these measure.

    Args:
        records: of metrics.jsonl.
    """
    from matplotlib.figure import Figure

    # Of videos measured late, the record stands behind those of later steps.
    sampled = sorted((record for record in records if record.get("samples")), key=lambda record: record["step"])
    figure = Figure(figsize=(14, 9.5 if sampled else 4), layout="constrained")
    # An array of one or two, whatever their number.
    rows = figure.subfigures(1 + bool(sampled), 1, height_ratios=(4, 5.5)[: 1 + bool(sampled)], squeeze=False)[:, 0]
    _draw_losses(rows[0].subplots(1, 3), records)
    if sampled:
        rows[1].suptitle("sample videos")
        _draw_samples(rows[1].subplots(2, 4).flat, sampled)
    return figure


def _draw_losses(panels: Iterable[Axes], records: Sequence[dict[str, Any]]) -> None:
    """Training and validation loss, extension gap, and held-out loss by latent frame."""
    loss_axes, gap_axes, position_axes = panels
    training = [record for record in records if "loss" in record]
    loss_axes.plot([r["step"] for r in training], [r["loss"] for r in training], lw=0.8, label="training")
    for name in ("validation", "validation_ema"):
        scored = [record for record in records if name in record]
        if not scored:
            continue
        steps = [record["step"] for record in scored]
        loss_axes.plot(steps, [record[name]["loss"] for record in scored], "o-", label=name.replace("_", ", "))
        gaps = [(s, r[name]["extension_gap"]) for s, r in zip(steps, scored, strict=True)]
        gaps = [(step, gap) for step, gap in gaps if gap is not None]
        gap_axes.plot([step for step, _ in gaps], [gap for _, gap in gaps], "o-", label=name.replace("_", ", "))
        if name == "validation":
            for record in dict.fromkeys((0, len(scored) - 1)):
                label = f"step {steps[record]}"
                position_axes.plot(scored[record][name]["by_position"], label=label)
    gap_axes.axhline(1.0, color="gray", lw=0.8, ls="--")
    for axes, title, x_label in (
        (loss_axes, "loss", "step"),
        (gap_axes, "extension gap (loss beyond the base length / within)", "step"),
        (position_axes, "held-out loss by latent frame", "latent frame"),
    ):
        axes.set_title(title)
        axes.set_xlabel(x_label)
        if axes.get_legend_handles_labels()[0]:
            axes.legend()
        elif axes is not loss_axes:
            hint = "no held-out clips longer than the base model's:\nset data.held_out_clips"
            axes.text(0.5, 0.5, hint, ha="center", transform=axes.transAxes)


def _draw_samples(panels: Iterable[Axes], sampled: Sequence[dict[str, Any]]) -> None:
    """Measures of the sample videos by step, a line a variant."""
    variants = list(dict.fromkeys(variant for record in sampled for variant in record["samples"]))
    for axes, (measure, title) in zip(panels, SAMPLE_CURVES.items(), strict=True):
        for number, variant in enumerate(variants):
            found = [(record["step"], record["samples"].get(variant, {}).get(measure)) for record in sampled]
            points = [(step, value) for step, value in found if value is not None]
            # Names come from files: matplotlib would take a pair of dollars for a formula.
            label = variant.replace("_", " ").replace("$", "\\$")
            style = ("o-", "s--", "^:")[number % 3]
            axes.plot([step for step, _ in points], [value for _, value in points], style, ms=3, lw=1, label=label)
        axes.set_title(title, fontsize="medium")
        axes.set_xlabel("step")
        if len(variants) > 1:
            axes.legend(fontsize="small")
