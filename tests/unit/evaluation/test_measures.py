"""Every measure tells the video made to fail it from the sound one, at two qualities of encoding alike."""

from __future__ import annotations

import numpy as np
import pytest
from cv2 import GaussianBlur

from exvideo_train.evaluation.frames import high_band_share, variance_of_laplacian
from exvideo_train.evaluation.measures import make_measures, slope

# Video made to fail it, measure, and by how much at least it lies below (negative) or above the sound video.
ORDERS = [
    ("blurred", "sharpness", -80.0),
    ("blurred", "sharpness_kept", -0.8),
    ("blurred", "sharpness_slope", -0.3),
    ("blurred", "high_band", -0.02),
    ("blurred", "high_band_kept", -0.8),
    ("blurred", "high_band_slope", -0.3),
    ("flickering", "flicker", -0.05),
    ("flickering", "luminance_jitter", 25.0),
    ("frozen", "motion", -0.05),
    ("frozen", "still_share", 0.4),
    ("jerky", "smoothness", -0.5),
    ("drifting", "luminance_drift", 10.0),
    ("drifting", "saturation_drift", 25.0),
    ("drifting", "colour_drift", 20.0),
    ("looped", "self_similarity", 1.0),
    ("looped", "repeat_distance", -0.8),
    ("looped", "no_repeat", -1.0),
    ("cut", "cuts", 1.0),
]
# Most that re-encoding may move a measure of the sound video.
STABLE = {
    "sharpness": 20.0,
    "sharpness_kept": 0.15,
    "sharpness_slope": 0.03,
    "high_band": 0.005,
    "high_band_kept": 0.15,
    "high_band_slope": 0.03,
    "flicker": 0.01,
    "luminance_jitter": 0.3,
    "motion": 0.01,
    "smoothness": 0.05,
    "luminance_drift": 1.0,
    "saturation_drift": 2.5,
    "colour_drift": 1.0,
    "content_drift": 0.05,
    "self_similarity": 0.05,
    "repeat_distance": 0.1,
    "no_repeat": 0.0,
    "still_share": 0.0,
    "cuts": 0.0,
}


@pytest.mark.parametrize(("video", "measure", "least"), ORDERS, ids=[f"{video}-{name}" for video, name, _ in ORDERS])
@pytest.mark.parametrize("quality", ["good", "poor"])
def test_tells_the_spoilt_video(values, video, measure, least, quality):
    difference = values[video, quality][measure] - values["sound", "good"][measure]
    assert difference <= least if least < 0 else difference >= least


@pytest.mark.parametrize("measure", STABLE)
def test_is_stable_to_another_quality(values, measure):
    good, poor = values["sound", "good"][measure], values["sound", "poor"][measure]
    assert poor == pytest.approx(good, abs=STABLE[measure])


def test_tables_name_every_measure():
    names = {measure.name for measure in make_measures(10.0)}
    assert names == set(STABLE)
    # Content drift has no direction: a glide over a landscape ends elsewhere too.
    assert names - {name for _, name, _ in ORDERS} == {"content_drift"}


def test_high_band_is_of_frequency_alone():
    """Stripes of two pixels lie at 0.25 cycles a pixel, of four at 0.125; contrast and brightness change nothing."""
    columns = np.arange(96)
    stripes = {width: np.tile(100 + 80 * np.cos(2 * np.pi * columns / width), (64, 1)) for width in (3, 8)}
    assert high_band_share(stripes[3], 0.25) > 0.99
    assert high_band_share(stripes[8], 0.25) < 0.01
    assert high_band_share(stripes[3] / 4 + 20, 0.25) == pytest.approx(high_band_share(stripes[3], 0.25), abs=1e-3)
    assert high_band_share(np.full((64, 96), 120.0), 0.25) == 0.0


def test_sharpness_falls_with_blur():
    picture = np.random.default_rng(0).integers(0, 255, (64, 96), np.uint8)
    sharpness = [
        variance_of_laplacian(picture),
        *(variance_of_laplacian(GaussianBlur(picture, (0, 0), s)) for s in (1, 2)),
    ]
    assert sharpness[0] > 10 * sharpness[1] > 100 * sharpness[2] / 2
    assert variance_of_laplacian(np.full((64, 96), 7, np.uint8)) == 0


def test_slope_is_a_share_of_the_mean_a_second():
    seconds = np.arange(17) / 8
    assert slope(200 - 50 * seconds, seconds) == pytest.approx(-50 / 150)
