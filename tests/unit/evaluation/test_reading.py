"""Whole videos read as they are, at another rate and size, or refused by name."""

from __future__ import annotations

import numpy as np
import pytest
from support.videos import draw_number, make_video, read_number

from exvideo_train.clips.container import UnreadableClip
from exvideo_train.evaluation.reading import Reading, read_frames

NUM_FRAMES = 40


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    """40 frames at 8 a second that show their numbers, the index in front as for the web."""
    path = tmp_path_factory.mktemp("video") / "x.mp4"
    noise = np.random.default_rng(0).integers(0, 30, (NUM_FRAMES, 96, 128, 3), np.uint8)
    frames = [draw_number(number, 96, 128) + noise[number] for number in range(NUM_FRAMES)]
    return make_video(path, frames, fps=8)


def test_every_frame_at_its_own_size_and_moment(video):
    read = list(read_frames(str(video), Reading(0.0, None, 99)))
    assert [read_number(frame) for _, frame in read] == list(range(NUM_FRAMES))
    assert [seconds for seconds, _ in read] == pytest.approx(np.arange(NUM_FRAMES) / 8)
    assert {frame.shape for _, frame in read} == {(96, 128, 3)}


def test_another_rate_and_size(video):
    read = list(read_frames(str(video), Reading(4.0, (48, 64), 99)))
    assert [seconds for seconds, _ in read] == pytest.approx(np.arange(NUM_FRAMES // 2) / 4)
    numbers = [read_number(frame) for _, frame in read]
    assert all(number in (2 * index, 2 * index + 1) for index, number in enumerate(numbers))
    assert {frame.shape for _, frame in read} == {(48, 64, 3)}


REFUSED = {
    "nothing": (lambda content: b"", 99, "0 bytes"),
    "noise": (lambda content: np.random.default_rng(0).bytes(5000), 99, "not a video"),
    "playlist": (lambda content: b"#EXTM3U\nfile:///etc/passwd\n", 99, "not a video"),
    "without its end": (lambda content: content[: len(content) // 2], 99, "index is missing"),
    "too many frames": (lambda content: content, NUM_FRAMES - 1, "max_frames=39"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_videos_are_named(video, tmp_path, case):
    change, max_frames, says = REFUSED[case]
    path = tmp_path / "x.mp4"
    path.write_bytes(change(video.read_bytes()))
    with pytest.raises(UnreadableClip) as refusal:
        list(read_frames(str(path), Reading(0.0, None, max_frames)))
    assert says in refusal.value.detail
    assert str(path) in refusal.value.detail


def test_a_stream_that_ends_before_its_promise_is_refused(video, tmp_path):
    """The index stands in front and is whole, the frames behind it are cut off, as a broken download leaves them."""
    import av

    path = tmp_path / "x.mp4"
    with av.open(str(video)) as whole, av.open(str(path), "w", options={"movflags": "+faststart"}) as copy:
        stream = copy.add_stream_from_template(whole.streams.video[0])
        for packet in whole.demux(whole.streams.video[0]):
            if packet.dts is not None:
                packet.stream = stream
                copy.mux(packet)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 6 // 10])
    with pytest.raises(UnreadableClip) as refusal:
        list(read_frames(str(path), Reading(0.0, None, 99)))
    assert refusal.value.reason in ("truncated", "corrupt")
    assert str(path) in refusal.value.detail
