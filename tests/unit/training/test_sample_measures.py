"""Sample videos measured beside training: real videos, and the process that training starts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.videos import make_video

from exvideo_train.errors import UserError
from exvideo_train.evaluation.measures import make_measures, measure_track
from exvideo_train.evaluation.reading import Reading, read_frames
from exvideo_train.evaluation.track import track_video
from exvideo_train.training.curves import SAMPLE_CURVES, curves_figure
from exvideo_train.training.sample_measures import SampleMeasures, read_measures
from exvideo_train.training.samples import environment

NUM_FRAMES = 9


def make_samples(run_dir: Path, step: int, num_videos: int = 2, num_prompts: int = 2) -> Path:
    """A folder as sampling leaves it."""
    folder = run_dir / "samples" / f"step_{step:08d}"
    (folder / "with_adapter").mkdir(parents=True)
    for number in range(num_videos):
        wide = np.random.default_rng(step + number).integers(0, 255, (64, 96 + NUM_FRAMES, 3), np.uint8)
        name = f"with_adapter/{number:03d}.mp4"
        make_video(folder / name, [wide[:, index : index + 96] for index in range(NUM_FRAMES)], fps=8)
        record = {"prompt": f"prompt {number}", "seed": 6, "variant": "with_adapter", "fault": ""}
        (folder / name).with_suffix(".json").write_text(json.dumps(record))
    prompts = [json.dumps({"prompt": f"prompt {number}"}) + "\n" for number in range(num_prompts)]
    (folder / "prompts.jsonl").write_text("".join(prompts))
    return folder


class Run:
    """What a run is told."""

    def __init__(self, run_dir: Path) -> None:
        self.said: list[str] = []
        self.records: list[dict[str, Any]] = []
        self.measures = SampleMeasures(run_dir, environment(), self.said.append, self._record)

    def _record(self, step: int, values: dict[str, Any]) -> None:
        self.records.append({"step": step, **values})


def test_means_are_those_of_the_evaluation(tmp_path: Path) -> None:
    folder, run = make_samples(tmp_path, 10), Run(tmp_path)
    run.measures.add(folder)
    run.measures.finish(5)
    assert run.said == []
    measures = make_measures(10.0)
    tracks = [track_video(read_frames(str(path), Reading(0.0, None, 99)), 0.25) for path in folder.rglob("*.mp4")]
    values = [measure_track(track, measures) for track in tracks]
    (record,) = run.records
    assert (record["step"], record["sample_videos"]) == (10, {"measured": 2, "failed": 0})
    assert set(record["samples"]) == {"with_adapter"}
    for name in SAMPLE_CURVES:
        assert record["samples"]["with_adapter"][name] == pytest.approx(np.mean([value[name] for value in values]))
    # Of a second, no repetition can be told.
    assert record["samples"]["with_adapter"]["no_repeat"] is None


def test_what_was_not_made_or_is_damaged_is_told_and_counted(tmp_path: Path) -> None:
    folder, run = make_samples(tmp_path, 10, num_prompts=4), Run(tmp_path)
    video = folder / "with_adapter" / "001.mp4"
    video.write_bytes(video.read_bytes()[:-3000])
    run.measures.add(folder)
    run.measures.finish(5)
    assert run.records[0]["sample_videos"] == {"measured": 1, "failed": 3}
    (line,) = run.said
    assert str(video) in line
    assert "of 2 prompts none was made" in line


def test_a_begun_run_measures_what_no_record_tells_of_and_nothing_twice(tmp_path: Path) -> None:
    for step in (10, 20, 30, 40):
        make_samples(tmp_path, step)
    first = Run(tmp_path)
    first.measures.add(tmp_path / "samples" / "step_00000020")
    first.measures.finish(5)
    before = (tmp_path / "samples" / "step_00000020" / "measures.json").stat()
    # The run was killed before it wrote its second record, and goes on from step 30.
    again = Run(tmp_path)
    again.measures.resume(30, [{"step": 10, "sample_videos": {"measured": 2, "failed": 0}}, {"step": 20, "loss": 1.0}])
    again.measures.finish(5)
    assert [record["step"] for record in again.records] == [20, 30]
    assert again.records[0] == first.records[0]
    after = (tmp_path / "samples" / "step_00000020" / "measures.json").stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert not (tmp_path / "samples" / "step_00000010" / "measures.json").exists()
    assert not (tmp_path / "samples" / "step_00000040" / "measures.json").exists()


def test_a_failing_process_is_told_and_counted(tmp_path: Path) -> None:
    folder, run = make_samples(tmp_path, 10), Run(tmp_path)
    (folder / "with_adapter" / "001.json").write_text("{")
    run.measures.add(folder)
    run.measures.add(tmp_path / "samples" / "step_00000020")
    run.measures.finish(5)
    assert run.records[0] == {"step": 10, "sample_videos": {"measured": 0, "failed": 2}}
    assert run.said[0] == f"sample videos of step_00000010 not measured: status 2; see {folder / 'log.txt'}"
    assert "001.json: cannot be read" in (folder / "log.txt").read_text()
    assert "step_00000020 not measured" in run.said[1]


def test_measuring_that_takes_too_long_is_given_up(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.measures.add(make_samples(tmp_path, 10))
    run.measures.add(make_samples(tmp_path, 20))
    run.measures.finish(0)
    assert "given up after 0 minutes: step_00000010, step_00000020" in run.said[0]
    assert not (tmp_path / "samples" / "step_00000020" / "measures.json").exists()


GOOD = '"means": {"a": {"sharpness": 1.0}}, "videos": {"a": {"x": {}}}, "num_prompts": 1, "failed": []'


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        "{}",
        "{" + GOOD.replace("1.0", '"x"') + "}",
        "{" + GOOD.replace("1.0", "NaN") + "}",
        "{" + GOOD.replace('{"sharpness": 1.0}', "7") + "}",
        "{" + GOOD.replace("1,", "[],") + "}",
        "{" + GOOD.replace('"failed": []', '"failed": 3') + "}",
        "[" * 100_000,
    ],
)
def test_what_is_no_measures_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "measures.json"
    path.write_text("{" + GOOD + "}")
    assert read_measures(path).num_measured == 1
    path.write_text(content)
    with pytest.raises(UserError, match="not what measuring writes"):
        read_measures(path)


def test_curves_of_videos_measured_late_are_in_order_of_their_steps() -> None:
    def record(step: int, **values: float | None) -> dict[str, Any]:
        return {"step": step, "samples": {"with_$adapter$": {name: values.get(name) for name in SAMPLE_CURVES}}}

    records = [record(20, sharpness=2.0), {"step": 30, "loss": 1.0}, record(10, sharpness=1.0), record(30)]
    figure = curves_figure(records)
    figure.canvas.draw()
    panels = {axes.get_title(): axes for axes in figure.get_axes()}
    assert len(panels) == 3 + len(SAMPLE_CURVES)
    line = panels["sharpness, levels²"].lines[0]
    assert (list(line.get_xdata()), list(line.get_ydata())) == ([10, 20], [1.0, 2.0])
    assert len(curves_figure(records[1:2]).get_axes()) == 3
