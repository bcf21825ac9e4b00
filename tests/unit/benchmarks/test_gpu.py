"""The command for the first GPU, on the CPU at small size, so that it cannot rot."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).resolve().parents[3] / "benchmarks"


def test_every_section_runs(tmp_path: Path) -> None:
    output = tmp_path / "gpu"
    subprocess.run(
        [sys.executable, str(BENCHMARKS / "gpu.py"), "device=cpu", "minutes=12", f"output={output}"],
        check=True,
        timeout=800,
    )
    values, text = json.loads(output.with_suffix(".json").read_text()), output.with_suffix(".md").read_text()
    assert not values["failed"]
    assert {row["kernel"] for row in values["attention"] if "kernel" in row} >= {"flash (CPU)", "math"}
    rows = {row["name"]: row for row in values["step"][0]["rows"]}
    for name in ("ours, recompute=full", "ours, as 129f_48g", "ours, as 129f_24g"):
        # The plan does not see what the CPU's attention takes for itself.
        assert rows[name]["planned_gib"] > 0.8 * rows[name]["peak_gib"]
    assert len(values["sample"]["rows"]) == 7
    assert [record["step"] for record in values["commands"]["metrics"] if "loss" in record] == [1, 2, 3, 4]
    assert "train 4 steps" in text
    assert "aten::" in text
