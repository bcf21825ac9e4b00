"""The measures on a real clip, and on the same clip spoilt: told apart at either quality, in order of the strength."""

from __future__ import annotations

import pytest
from support.spoilt import GRADED, QUALITIES, track_of
from support.videos import make_video

from exvideo_train.evaluation.measures import make_measures, measure_track

FPS = 12
# Video made to fail it, measure, and by how much at least it lies below (negative) or above the sound clip, whichever
# of the two is encoded worse.
ORDERS = [
    ("blurred", "sharpness", -400.0),
    ("blurred", "sharpness_kept", -0.8),
    ("blurred", "sharpness_slope", -0.5),
    ("blurred", "high_band", -0.01),
    ("blurred", "high_band_kept", -0.8),
    ("blurred", "high_band_slope", -0.5),
    ("flickering", "flicker", -0.08),
    ("flickering", "luminance_jitter", 25.0),
    ("frozen", "motion", -0.005),
    ("frozen", "still_share", 0.4),
    ("jerky", "smoothness", -0.2),
    ("drifting", "luminance_drift", 12.0),
    ("drifting", "saturation_drift", 25.0),
    ("drifting", "colour_drift", 15.0),
    ("looped", "self_similarity", 1.0),
    ("looped", "repeat_distance", -0.8),
    ("looped", "no_repeat", -1.0),
    ("cut", "cuts", 1.0),
    ("cut", "content_drift", 0.5),
]
# Most that the poorer encoding may move a measure of the sound clip, as a share of its value or by itself.
STABLE_SHARE = {"sharpness": 0.35, "high_band": 0.3, "sharpness_kept": 0.25, "high_band_kept": 0.25, "motion": 0.05}
STABLE = {
    "sharpness_slope": 0.1,
    "high_band_slope": 0.1,
    "flicker": 0.005,
    "luminance_jitter": 0.2,
    "smoothness": 0.1,
    "luminance_drift": 1.0,
    "saturation_drift": 2.0,
    "colour_drift": 0.5,
    "content_drift": 0.01,
    "self_similarity": 0.01,
    "repeat_distance": 0.02,
    "no_repeat": 0.0,
    "still_share": 0.0,
    "cuts": 0.0,
}
STRENGTHS = (0.25, 0.5, 1.0)
# The spoilt video, and measures that grow (1) or fall (-1) with its strength.
GROW = [
    ("blurred", {"sharpness": -1, "sharpness_kept": -1, "sharpness_slope": -1, "high_band": -1, "high_band_slope": -1}),
    ("frozen", {"still_share": 1, "motion": -1}),
    ("flickering", {"flicker": -1, "luminance_jitter": 1}),
    ("drifting", {"colour_drift": 1, "luminance_drift": 1}),
]


@pytest.mark.parametrize(("video", "measure", "least"), ORDERS, ids=[f"{video}-{name}" for video, name, _ in ORDERS])
@pytest.mark.parametrize("quality", QUALITIES)
@pytest.mark.parametrize("sound_quality", QUALITIES)
def test_tells_the_spoilt_clip(real_values, video, measure, least, quality, sound_quality):
    difference = real_values[video, quality][measure] - real_values["sound", sound_quality][measure]
    assert difference <= least if least < 0 else difference >= least


@pytest.mark.parametrize("measure", [*STABLE_SHARE, *STABLE])
def test_is_stable_to_another_quality(real_values, measure):
    good, poor = (real_values["sound", quality][measure] for quality in ("good", "poor"))
    assert poor == pytest.approx(good, rel=STABLE_SHARE.get(measure, 0), abs=STABLE.get(measure, 0))


def test_tables_name_every_measure():
    names = {measure.name for measure in make_measures(10.0)}
    assert names == {*STABLE_SHARE, *STABLE} == {name for _, name, _ in ORDERS}


@pytest.mark.parametrize(("video", "measures"), GROW, ids=[video for video, _ in GROW])
def test_orders_by_the_strength(real_clip, real_values, tmp_path, video, measures):
    # The clip drifts by itself, the other way: against that a weak drift cancels.
    found = [] if video == "drifting" else [real_values["sound", "poor"]]
    for strength in STRENGTHS:
        frames_FHWC = GRADED[video](real_clip, strength)
        path = make_video(tmp_path / f"{strength}.mp4", frames_FHWC, fps=FPS, options={"crf": QUALITIES["poor"]})
        found.append(measure_track(track_of(path), make_measures(2.0)))
    for name, direction in measures.items():
        numbers = [direction * values[name] for values in found]
        assert numbers == sorted(numbers), (name, numbers)
        assert len(set(numbers)) == len(numbers), (name, numbers)
