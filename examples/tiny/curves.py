"""A training's curve as a table and a drawing.

    python examples/tiny/curves.py tiny_training/sincos_49_training FOLDER

writes curve.csv and curve.png there.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
from pathlib import Path

from loop import CURVE_NAME

from exvideo_train.files import atomic_write, atomic_write_text


def write_curve(training: Path, folder: Path) -> None:
    """Write ``curve.csv``, a line a report, and ``curve.png``, a panel a figure."""
    records = [json.loads(line) for line in (training / CURVE_NAME).read_text().splitlines()]
    names = list(dict.fromkeys(name for record in records for name in record))
    table = io.StringIO()
    writer = csv.DictWriter(table, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: float(f"{value:.5g}") for name, value in record.items()} for record in records)
    atomic_write_text(folder / "curve.csv", table.getvalue())
    _draw(records, [name for name in names if name != "step"], folder / "curve.png")


def _draw(records: list[dict[str, float]], names: list[str], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(
        1, len(names), figsize=(3.2 * len(names), 2.6), layout="constrained", squeeze=False
    )
    for axes, name in zip(panels[0], names, strict=True):
        points = [(record["step"], record[name]) for record in records if name in record]
        axes.plot(*zip(*points, strict=True), marker="" if len(points) > 30 else ".")
        axes.set(title=name, xlabel="step")
        if name == "loss":
            axes.set_yscale("log")
    atomic_write(path, lambda temporary: figure.savefig(temporary, dpi=80, format="png", metadata={"Software": None}))


def main() -> None:
    """Entry of ``python examples/tiny/curves.py``."""
    parser = argparse.ArgumentParser(description="Write a training's curve as curve.csv and curve.png.")
    parser.add_argument("training", type=Path, help="a training's folder, like tiny_training/sincos_49_training")
    parser.add_argument("folder", type=Path, help="where to write them")
    options = parser.parse_args()
    write_curve(options.training, options.folder)


if __name__ == "__main__":
    main()
