"""The sampling benchmark, at its smallest: both sides are compared and every row is there."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).resolve().parents[3] / "benchmarks"


def test_every_row_is_measured(tmp_path: Path) -> None:
    options = ["device=cpu", "frames=9", "steps=1", "repeats=1", f"output={tmp_path / 'sample'}"]
    subprocess.run([sys.executable, str(BENCHMARKS / "sample.py"), *options], check=True, timeout=300)
    content = json.loads((tmp_path / "sample.json").read_text())
    assert content["same_work"]["latents, relative"] < 1e-4
    assert [(row["what"], row["name"]) for row in content["rows"]] == [
        *(("denoising step", name) for name in ("diffusers", "ours", "ours, batched_guidance=false")),
        *(("decoding", name) for name in ("diffusers", "ours", "diffusers, tiles", "ours, vae_tiling=true")),
    ]
    assert all(row["seconds"] and row["peak_gib"] > 0 and not row["failure"] for row in content["rows"])
    assert (tmp_path / "sample.md").read_text().count("\n| 9 |") == 7
