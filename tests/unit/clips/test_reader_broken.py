"""Each broken input has its own reason, whatever decodes it, and leaves nothing open."""

from __future__ import annotations

import os
import resource
import tempfile
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from support.broken import damage_packet, write_broken, write_good
from support.videos import draw_number, make_video, read_numbers, shown_at

from exvideo_train.clips.container import UnreadableClip
from exvideo_train.clips.reader import read_frames
from exvideo_train.geometry import Geometry

SMALL = Geometry(num_frames=17, height=96, width=128, fps=8)


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    return write_good(tmp_path_factory.mktemp("good") / "good.mp4")


BROKEN = [
    ("absent", 0.0, None, "missing"),
    ("cut_off", 0.0, None, "truncated"),
    ("cut_off_matroska", 0.0, None, "truncated"),
    ("zero_bytes", 0.0, None, "empty_file"),
    ("text", 0.0, None, "not_video"),
    ("audio", 0.0, None, "no_video_stream"),
    ("one_frame", 0.0, None, "too_short"),
    ("jumping_timestamps", 0.0, None, "bad_timestamps"),
    ("returning_timestamps", 0.0, None, "bad_timestamps"),
    ("corrupt_packets", 0.0, None, "corrupt"),
    ("unknown_codec", 0.0, None, "unsupported_codec"),
    ("folder", 0.0, None, "not_a_file"),
    ("pipe", 0.0, None, "not_a_file"),
    ("intact", 2.0, 1.0, "bad_span"),
    ("intact", -1.0, 3.0, "bad_span"),
    ("intact", 1.0, 2.5, "too_short"),
    ("intact", 3.0, 9.0, "span_past_end"),
    ("intact", 30.0, 39.0, "span_past_end"),
]


@pytest.mark.parametrize("codec", ["libx264", "libx265", "libvpx-vp9", "libsvtav1"])
def test_damage_is_noticed_in_every_codec(codec, clip, read, tmp_path):
    write_broken("corrupt_packets", write_good(tmp_path / "good.mp4", codec), tmp_path / "broken.mp4")
    with pytest.raises(UnreadableClip) as caught:
        read(clip(tmp_path / "broken.mp4"), SMALL)
    assert caught.value.reason == "corrupt"


@pytest.mark.parametrize(("kind", "start", "end", "reason"), BROKEN)
def test_each_broken_input_has_its_own_reason(kind, start, end, reason, good, clip, read, tmp_path):
    path = tmp_path / "broken.mp4"
    write_broken(kind, good, path)
    with pytest.raises(UnreadableClip) as caught:
        read(clip(path, start, end), SMALL)
    assert caught.value.reason == reason, caught.value
    assert caught.value.detail


def test_a_file_that_may_not_be_read(good, clip, read):
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        path = Path(folder) / "secret.mp4"
        path.write_bytes(good.read_bytes())
        path.chmod(0)
        root = os.geteuid() == 0
        if root:
            os.seteuid(65534)
        try:
            with pytest.raises(UnreadableClip) as caught:
                read(clip(path), SMALL)
        finally:
            if root:
                os.seteuid(0)
    assert caught.value.reason == "permission"


@pytest.mark.parametrize("damaged", [0, 3])
def test_damage_before_the_span_does_not_matter(damaged, video, clip, read, tmp_path):
    path = video(tmp_path / "damaged.mp4", frames=150, gop=25)
    content = bytearray(path.read_bytes())
    with av.open(str(path)) as container:
        positions = [(packet.pts, packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
    _, position, size = positions[damaged]
    content[position + 8 : position + size] = b"\xff" * (size - 8)
    path.write_bytes(content)
    moments = [2.0 + index / 8 + 0.0015 for index in range(17)]
    expected = shown_at([index / 25 for index in range(150)], moments)
    assert read_numbers(read(clip(path, 2.0), SMALL)) == expected


@pytest.mark.parametrize(("name", "codec"), [("x.mp4", "libx264"), ("x.mkv", "libx264"), ("x.avi", "mpeg4")])
def test_pyav_trusts_nothing_between_damage_and_the_next_key_frame(name, codec, clip, tmp_path):
    """Key frames at 0 and 2 s, damage at about 1 s: a span from 1.2 s on begins with what is made of it."""
    good, path = tmp_path / f"good_{name}", tmp_path / name
    noise = np.random.default_rng(0).integers(0, 128, (96, 128, 3), np.uint8)
    frames = [np.roll(noise, 2 * number, axis=1) + draw_number(number, 96, 128) // 2 for number in range(100)]
    make_video(good, frames, codec, gop=50)
    damage_packet(good, path, 25)
    with pytest.raises(UnreadableClip) as caught:
        read_frames(clip(path, 1.2), Geometry(9, 96, 128, 8), num_threads=1, decoder="pyav")
    assert caught.value.reason == "corrupt"
    for start in (0.0, 2.0):
        geometry = Geometry(9, 96, 128, 16)
        found, expected = (read_frames(clip(video, start), geometry, 1, "pyav") for video in (path, good))
        assert torch.equal(found, expected)


def test_pyav_gives_no_later_frame_for_one_that_is_lost(video, clip, tmp_path):
    """The first of two groups of pictures cannot be decoded without its key frame."""
    good, path = video(tmp_path / "good.mp4", frames=100, gop=50, options={"sc_threshold": "0"}), tmp_path / "x.mp4"
    damage_packet(good, path, 0)
    with pytest.raises(UnreadableClip) as caught:
        read_frames(clip(path, 1.2), SMALL, num_threads=1, decoder="pyav")
    assert caught.value.reason == "corrupt"
    assert read_numbers(read_frames(clip(path, 2.0), Geometry(9, 96, 128, 8), 1, "pyav"))[0] == 50


def test_unreadable_clip_travels_between_processes():
    import pickle

    error = pickle.loads(pickle.dumps(UnreadableClip("corrupt", "x")))
    assert (error.reason, error.detail, str(error)) == ("corrupt", "x", "corrupt: x")


def test_open_files_are_closed(good, clip, read):
    before = len(os.listdir("/proc/self/fd"))
    limit = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(20):
        read(clip(good), SMALL, num_threads=1)
        with pytest.raises(UnreadableClip):
            read(clip(good, 3.0), SMALL, num_threads=1)
    assert len(os.listdir("/proc/self/fd")) == before
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - limit < 50_000
