"""Measures of made pictures: cuts and what only looks like one, motion, freezes, black, bars, hashes."""

from __future__ import annotations

import numpy as np
import pytest

from exvideo_train.clips.duplicates import first_alike
from exvideo_train.clips.quality import bars_in_crop, measure_clip, measure_frames

HEIGHT, WIDTH = 90, 160


def texture(seed: int, height: int = HEIGHT, width: int = 4 * WIDTH) -> np.ndarray:
    """A smooth random colour picture, wide enough to pan over."""
    rng = np.random.default_rng(seed)
    coarse = rng.uniform(30, 225, (height // 6 + 2, width // 6 + 2, 3))
    rows, columns = np.arange(height) / 6, np.arange(width) / 6
    y, x = rows.astype(int), columns.astype(int)
    fy, fx = (rows - y)[:, None, None], (columns - x)[None, :, None]
    top = coarse[y][:, x] * (1 - fx) + coarse[y][:, x + 1] * fx
    bottom = coarse[y + 1][:, x] * (1 - fx) + coarse[y + 1][:, x + 1] * fx
    return top * (1 - fy) + bottom * fy


def pan(seed: int, count: int, pixels_a_frame: float = 1.0) -> np.ndarray:
    """A camera that moves sideways, uint8 (F, H, W, C)."""
    picture = texture(seed)
    starts = (np.arange(count) * pixels_a_frame).astype(int) % (3 * WIDTH)
    return np.stack([picture[:, start : start + WIDTH] for start in starts]).astype(np.uint8)


def moments(count: int, fps: float = 25.0) -> np.ndarray:
    return np.arange(count) / fps


def num_cuts(frames: np.ndarray, fps: float = 25.0) -> int:
    return measure_frames(frames, moments(len(frames), fps)).num_cuts(3.0, 15.0)


def test_cuts_are_found_and_placed():
    frames = np.concatenate([pan(1, 40), pan(2, 35), pan(3, 50)])
    measures = measure_frames(frames, moments(len(frames)))
    assert measures.num_cuts(3.0, 15.0) == 2
    assert [round(at * 25) for at, _, _ in measures.cut_strengths] == [40, 75]


@pytest.mark.parametrize("at", [2, 3, 122])
def test_cuts_at_the_very_ends_are_found(at):
    assert num_cuts(np.concatenate([pan(1, at), pan(2, 125 - at)])) == 1


@pytest.mark.parametrize("pixels_a_frame", [0.0, 0.5, 2.0, 6.0])
def test_camera_motion_is_no_cut(pixels_a_frame):
    assert num_cuts(pan(4, 125, pixels_a_frame)) == 0


def test_animation_on_threes_and_repeated_frames_are_no_cuts():
    assert num_cuts(np.repeat(pan(5, 42, 6.0), 3, axis=0)) == 0


def test_a_flash_is_no_cut():
    frames = pan(6, 100)
    frames[50:52] = np.minimum(255, frames[50:52].astype(int) + 120)
    assert num_cuts(frames) == 0


def test_noise_is_no_cut():
    frames = pan(7, 100).astype(int) + np.random.default_rng(0).integers(-25, 25, (100, HEIGHT, WIDTH, 3))
    assert num_cuts(np.clip(frames, 0, 255).astype(np.uint8)) == 0


@pytest.mark.parametrize("length", [12, 25, 40])
def test_dissolves_between_quiet_shots_count(length):
    first, second = pan(8, 100, 0.02).astype(float), pan(9, 100, 0.02).astype(float)
    share = np.clip((np.arange(100) - 40) / length, 0, 1)[:, None, None, None]
    assert num_cuts((first * (1 - share) + second * share).astype(np.uint8)) == 1


@pytest.mark.parametrize("length", [12, 25, 40])
def test_fades_to_black_count(length):
    share = np.clip((np.arange(100) - 40) / length, 0, 1)[:, None, None, None]
    assert num_cuts((pan(8, 100, 0.2) * (1 - share)).astype(np.uint8)) == 1


def test_the_real_clip_is_one_scene(clip_path):
    measures = measure_clip(str(clip_path), 0.0, 5.2)
    assert measures.num_cuts(3.0, 15.0) == 0
    assert 5 < measures.motion < 30
    assert (measures.frozen_share, measures.black_share) == (0.0, 0.0)
    assert measures.bars == (0.0, 0.0, 0.0, 0.0)


def test_finds_the_cuts_of_pyscenedetect_and_those_it_misses_in_fast_motion():
    import scenedetect
    from scenedetect.detectors import AdaptiveDetector

    parts = [pan(seed, 30 + 7 * seed, 0.5 * seed) for seed in range(1, 5)]
    frames = np.concatenate(parts)
    detector = AdaptiveDetector(min_scene_len=5)
    theirs = []
    for number, frame in enumerate(frames):
        cuts = detector.process_frame(scenedetect.FrameTimecode(number, 25.0), np.ascontiguousarray(frame[..., ::-1]))
        theirs += [cut.frame_num for cut in cuts]
    measures = measure_frames(frames, moments(len(frames)))
    ours = [round(at * 25) for at, ratio, change in measures.cut_strengths if ratio >= 3.0 and change >= 15.0]
    assert ours == np.cumsum([len(part) for part in parts])[:-1].tolist()
    assert theirs
    assert set(theirs) <= set(ours)


def test_motion_and_freezes():
    still = np.repeat(pan(1, 1), 125, axis=0)
    measures = measure_frames(still, moments(125))
    assert (measures.motion, measures.frozen_share) == (0.0, 1.0)
    noisy = np.clip(still + np.random.default_rng(0).normal(0, 1, still.shape), 0, 255).astype(np.uint8)
    assert measure_frames(noisy, moments(125)).motion < 1.5
    assert measure_frames(pan(1, 125, 1.0), moments(125)).motion > 5
    half = np.concatenate([pan(1, 62), np.repeat(pan(1, 62)[-1:], 63, axis=0)])
    assert 0.35 < measure_frames(half, moments(125)).frozen_share < 0.55


def test_motion_is_by_time_not_by_frame():
    fast, slow = pan(2, 240, 0.5), pan(2, 240, 0.5)[::2]
    at_60 = measure_frames(fast, moments(240, 60)).motion
    at_30 = measure_frames(slow, moments(120, 30)).motion
    assert abs(at_60 - at_30) < 0.05 * at_30


def test_black_frames_and_bars():
    frames = pan(3, 100)
    frames[:20] = 3
    assert measure_frames(frames, moments(100)).black_share == pytest.approx(0.2)
    boxed = pan(3, 100)
    boxed[:, :12] = boxed[:, -12:] = 5
    boxed[:, 4, 17] = 90
    top, bottom, left, right = measure_frames(boxed, moments(100)).bars
    assert (top, bottom) == (pytest.approx(12 / 90), pytest.approx(12 / 90))
    assert (left, right) == (0, 0)


def test_bars_count_where_the_crop_takes_them():
    # Pillars of a sixth each side: gone when the crop to a square takes less than the middle.
    assert bars_in_crop((0, 0, 1 / 6, 1 / 6), 16 / 9, 1.0) == pytest.approx(0.0)
    assert bars_in_crop((0.1, 0.1, 0, 0), 16 / 9, 1.5) == pytest.approx(0.2)
    assert bars_in_crop((0.1, 0.1, 0, 0), 9 / 16, 1.5) == pytest.approx(0.0)
    assert bars_in_crop((1.0, 0, 0, 0), 1.5, 1.5) == pytest.approx(1.0)


def test_hashes_survive_encoding_and_tell_clips_apart(video, tmp_path):
    copies = [
        video(tmp_path / "a.mp4", frames=list(pan(1, 60)), size=(90, 160)),
        video(tmp_path / "b.webm", frames=list(pan(1, 60)), size=(90, 160), codec="libvpx-vp9"),
        video(tmp_path / "c.mp4", frames=list(np.repeat(np.repeat(pan(1, 60), 2, 1), 2, 2)), size=(180, 320)),
        video(tmp_path / "other.mp4", frames=list(pan(2, 60)), size=(90, 160)),
    ]
    hashes = [bytes.fromhex(measure_clip(str(path), 0.0, 2.0).hash_hex) for path in copies]
    rows = np.frombuffer(b"".join(hashes), np.uint8).reshape(-1, 24)
    assert first_alike(rows, 6).tolist() == [-1, 0, 0, -1]


def test_no_pair_of_alike_hashes_is_missed():
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 256, (3000, 24), np.uint8)
    expected = np.full(3000, -1)
    for _ in range(300):
        first, second = sorted(rng.choice(3000, 2, replace=False))
        if expected[first] == expected[second] == -1 and first not in expected and second not in expected:
            bits = np.unpackbits(hashes[first])
            bits[rng.choice(192, rng.integers(0, 7), replace=False)] ^= 1
            hashes[second] = np.packbits(bits)
            expected[second] = first
    assert np.array_equal(first_alike(hashes, 6), expected)
    assert (first_alike(hashes, -1) == -1).all()


def test_many_alike_pictures_do_not_take_for_ever():
    hashes = np.zeros((20000, 24), np.uint8)
    assert first_alike(hashes, 6).tolist() == [-1] + [0] * 19999
