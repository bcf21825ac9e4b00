"""The generator of captioned clips: a function of its seed, read back through the project's own commands."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from exvideo_train.clips.reader import read_frames
from exvideo_train.clips.record import read_manifest
from exvideo_train.geometry import Geometry

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def generator():
    sys.path.insert(0, str(REPOSITORY / "examples" / "tiny"))
    import clips

    yield clips
    sys.path.remove(str(REPOSITORY / "examples" / "tiny"))


def test_a_longer_clip_begins_with_the_shorter_one(generator):
    scene = generator.draw_scene(3)
    assert scene == generator.draw_scene(3)
    longer = generator.render(scene, 129)
    assert np.array_equal(longer[:49], generator.render(scene, 49))
    assert longer[0].shape == (48, 64, 3)
    # Twice the rate shows the same moments in every other frame.
    assert np.array_equal(generator.render(scene, 17, fps=16.0)[::2], longer[:9])


def test_every_word_of_the_captions_is_drawn_and_moves_inside_the_picture(generator):
    scenes = [generator.draw_scene(seed) for seed in range(400)]
    for name, values in {
        "colour": generator.COLOURS, "shape": generator.SHAPES, "motion": generator.MOTIONS,
        "ground": generator.GROUNDS, "camera": generator.CAMERAS,
    }.items():  # fmt: skip
        assert {getattr(scene, name) for scene in scenes} == set(values)
    for scene in scenes:
        rows, columns = generator.positions(scene, np.arange(200.0))
        assert scene.radius - 1e-6 <= rows.min() <= rows.max() <= 48 - scene.radius + 1e-6
        assert 0 < columns.min() <= columns.max() < 64


def test_the_command_writes_what_the_filters_are_for(run_command, generator, tmp_path):
    words = ["--first-seed", "26", "--clips", "12", "--seconds", "2.2", "--fps", "16", "--flawed", "0.4"]
    run_command([str(REPOSITORY / "examples" / "tiny" / "clips.py"), str(tmp_path), *words])
    manifest, kept = tmp_path / "clips.jsonl", tmp_path / "kept.jsonl"
    sources = ["source=internvid", f"metadata={tmp_path / 'metadata.jsonl'}", f"videos={tmp_path / 'videos'}"]
    run_command(["data_prep/build_manifest.py", *sources, f"manifest={manifest}"])
    size = ["num_frames=17", "height=48", "width=64", "fps=8"]
    run_command(["data_prep/filter_clips.py", *size, f"manifest={manifest}", f"output={kept}"])

    flaws = {f"clip_{seed:06d}": generator.draw_flaw(seed, 0.4) for seed in range(26, 38)}
    assert set(flaws.values()) == {None, *generator.FLAWS}
    records = list(read_manifest(kept))
    assert {Path(record.video).stem for record in records} == {name for name, flaw in flaws.items() if flaw is None}
    reasons = {"short": "too_short", "cut": "scene_cut", "still": "still", "black": "black"}
    for line in kept.with_suffix(".dropped.jsonl").read_text().splitlines():
        dropped = json.loads(line)
        assert reasons[flaws[Path(dropped["video"]).stem]] in dropped["reasons"]
    assert records[0].fps == 16
    assert records[0].caption == generator.draw_scene(int(Path(records[0].video).stem[5:])).caption
    assert read_frames(records[0], Geometry(17, 48, 64, 8.0)).shape == (17, 48, 64, 3)
