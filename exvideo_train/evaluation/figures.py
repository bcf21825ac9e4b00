"""The report's figures on the boards of ``logger``: its table as numbers, its verdicts as words, its curves."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from exvideo_train.boards import Boards
from exvideo_train.evaluation.charts import NUM_MOMENTS, length, mean_curve
from exvideo_train.evaluation.run import REAL, Evaluation, verdict_words
from exvideo_train.evaluation.track import SERIES
from exvideo_train.terminal import escaped

_CURVE_SECONDS = "curves/seconds"


def log_evaluation(output: Path, evaluation: Evaluation) -> None:
    """Log everything, if a board is asked for; TensorBoard has the curves over milliseconds, as steps are whole."""
    options = evaluation.options
    if not (options.logger.wandb or options.logger.tensorboard):
        return
    boards = Boards(output, options.logger, asdict(options), axes={"curves": _CURVE_SECONDS})
    boards.log(0, {"measures": table(evaluation), "differences": _differences(evaluation)})
    for variant, comparisons in evaluation.comparisons.items():
        rows = [f"| {comparison.measure} | {verdict_words(comparison)} |" for comparison in comparisons]
        title = f"verdicts/{escaped(variant)} against {escaped(options.baseline)}"
        boards.tell(title, "\n".join(["| measure | verdict |", "|---|---|", *rows]))
    tracks = evaluation.tracks()
    seconds = np.linspace(0.0, max(length(track) for videos in tracks.values() for track in videos), NUM_MOMENTS)
    curves = {
        f"curves/{escaped(variant)}/{series}": mean_curve(series, videos, seconds)[0]
        for variant, videos in tracks.items()
        for series in SERIES
    }
    for moment, second in enumerate(seconds):
        values = {name: float(curve[moment]) for name, curve in curves.items()}
        boards.log(round(1000 * second), {_CURVE_SECONDS: float(second), **values})
    boards.close()


def table(evaluation: Evaluation) -> dict[str, dict[str, float]]:
    """The means that the report shows, by variant and measure; of the real videos too."""
    means: dict[str, dict[str, float]] = {}
    for variant, comparisons in evaluation.comparisons.items():
        for comparison in comparisons:
            means.setdefault(escaped(variant), {})[comparison.measure] = comparison.mean
            means.setdefault(escaped(evaluation.options.baseline), {})[comparison.measure] = comparison.baseline_mean
    for measure in evaluation.measures:
        real = [value for video in evaluation.reference if (value := video.values[measure.name]) is not None]
        if real:
            means.setdefault(REAL, {})[measure.name] = sum(real) / len(real)
    return means


def _differences(evaluation: Evaluation) -> dict[str, dict[str, Any]]:
    return {
        escaped(variant): {
            comparison.measure: {
                name: getattr(comparison, name) for name in ("difference", "low", "high", "p_value", "num_pairs")
            }
            for comparison in comparisons
        }
        for variant, comparisons in evaluation.comparisons.items()
    }
