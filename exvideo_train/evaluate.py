"""``python -m exvideo_train.evaluate``: folders of videos to measures, a verdict and a report."""

from __future__ import annotations

from exvideo_train.config.evaluation import Evaluate
from exvideo_train.entry import run_command

USAGE = """\
Measure videos made with and without an adapter, pair by pair, and write report.html and results.json.

  python -m exvideo_train.evaluate with=DIR without=DIR output=REPORT
  python -m exvideo_train.evaluate with=DIR without=DIR +variants.step500=DIR reference=REAL output=REPORT
"""
# Words of the command line that are short for longer ones.
SHORT = {"with": "+variants.with", "without": "+variants.without"}


def evaluate(config: Evaluate) -> None:
    """Measure, compare and write."""
    from exvideo_train.evaluation.run import run_evaluation

    run_evaluation(config)


def main() -> None:
    run_command(Evaluate, evaluate, "evaluate", USAGE, SHORT)


if __name__ == "__main__":
    main()
