"""What is particular about decord: what it gives, and what it refuses because it would count it wrongly."""

from __future__ import annotations

import io
from functools import partial

import av
import numpy as np
import pytest
import torch
from support.videos import read_numbers, shown_at

from exvideo_train.clips.container import UnreadableClip, probe_video
from exvideo_train.clips.decoders.span_packets import copy_span
from exvideo_train.clips.reader import read_clip, read_frames
from exvideo_train.geometry import Geometry

SMALL = Geometry(num_frames=17, height=96, width=128, fps=8)


def test_decord_is_decord(clip, clip_path):
    """Level by level what bare decord gives for frames it can find by itself, once it is told the colour matrix."""
    import decord

    tagged = io.BytesIO()
    with av.open(str(clip_path)) as source, av.open(tagged, "w", format="matroska") as target:
        stream = target.add_stream_from_template(source.streams.video[0], opaque=True)
        stream.codec_context.colorspace = 1
        for packet in source.demux(video=0):
            if packet.size:
                packet.stream = stream
                target.mux(packet)
    tagged.seek(0)
    reader = decord.VideoReader(tagged, width=1280, height=720, num_threads=1)
    frames_FHWC = read_frames(clip(clip_path), Geometry(17, 720, 1280, 5), decoder="decord").numpy()
    np.testing.assert_array_equal(reader.get_batch(range(0, 85, 5)).asnumpy(), frames_FHWC)


def test_decord_refuses_packets_that_show_nothing(video, clip, tmp_path):
    """H.264 that begins at a recovery point holds back its first frames: all others would be counted wrongly."""
    options = {"x264-params": "intra-refresh=1:keyint=2:bframes=0"}
    path = video(tmp_path / "refreshed.mp4", options=options)
    expected = shown_at([index / 25 for index in range(150)], [1.0 + index / 8 + 0.0015 for index in range(17)])
    assert read_numbers(read_frames(clip(path, 1.0), SMALL, decoder="pyav")) == expected
    with pytest.raises(UnreadableClip) as caught:
        read_frames(clip(path, 1.0), SMALL, decoder="decord")
    assert caught.value.reason == "corrupt"


def test_pyav_reads_codecs_that_decord_cannot_be_given(video, clip, tmp_path):
    path = video(tmp_path / "old.wmv", codec="wmv2")
    frames_FHWC, refusal = read_clip(clip(path), SMALL)
    assert refusal == "unsupported_codec"
    assert torch.equal(frames_FHWC, read_frames(clip(path), SMALL, decoder="pyav"))
    assert read_clip(clip(path), SMALL, decoder="pyav")[1] is None
    with pytest.raises(UnreadableClip, match="decord cannot be given wmv2") as caught:
        read_frames(clip(path), SMALL, decoder="decord")
    assert caught.value.reason == "unsupported_codec"


@pytest.mark.parametrize("width", [32, 48, 64, 80, 96, 112, 144, 208])
def test_narrow_pictures_keep_their_three_channels(width, video, clip, read, tmp_path):
    path = video(tmp_path / "clock.mp4", frames=60, size=(48, width))
    frames_FHWC = read(clip(path), Geometry(17, 48, width, 8))
    assert read_numbers(frames_FHWC) == [int(index * 3.125) for index in range(17)]
    assert frames_FHWC.float().std(dim=3).max() < 3


@pytest.mark.parametrize(("codec", "name"), [("libvpx-vp9", "clock.webm"), ("libsvtav1", "clock.mp4")])
def test_groups_of_pictures_are_decoded_side_by_side(codec, name, video, clip, tmp_path):
    """decord decodes VP9 on one thread alone; the frames are the same."""
    path = video(tmp_path / name, codec=codec, frames=100, gop=20)
    span = copy_span(str(path), 1.0, 3.0, max_parts=2)
    assert [len(part.times) for part in span.parts] == [40, 17]
    frames_FHWC = read_frames(clip(path, 1.0), SMALL, num_threads=2, decoder="decord")
    assert read_numbers(frames_FHWC) == [25 + int(index * 3.125 + 0.01) for index in range(17)]
    assert torch.equal(frames_FHWC, read_frames(clip(path, 1.0), SMALL, num_threads=1, decoder="decord"))


def test_damage_in_any_group_of_pictures_is_found(video, clip, tmp_path):
    path = video(tmp_path / "whole.webm", codec="libvpx-vp9", frames=100, gop=20)
    damaged = tmp_path / "damaged.webm"
    with av.open(str(path)) as source, av.open(str(damaged), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0], opaque=True)
        for number, packet in enumerate(entry for entry in source.demux(video=0) if entry.size):
            written = av.Packet(bytes(packet.size)) if number == 48 else packet
            written.pts, written.dts, written.time_base = packet.pts, packet.dts, packet.time_base
            written.stream = stream
            target.mux(written)
    assert len(copy_span(str(damaged), 0.0, 3.9, max_parts=4).parts) > 2
    assert read_frames(clip(path), SMALL, num_threads=4, decoder="decord").shape[0] == 17
    for read in (partial(read_frames, decoder="decord"), read_clip):
        with pytest.raises(UnreadableClip, match="decord") as caught:
            read(clip(damaged), SMALL, num_threads=4)
        assert caught.value.reason == "corrupt"
        # Details are compared between runs: neither a time of day nor a place in decord's source belongs in them.
        assert ".cc:" not in caught.value.detail


def test_an_aspect_that_only_the_container_tells(video, clip, read, tmp_path):
    """Stored 128x96, shown twice as wide: a crop to the stored shape keeps the middle half of each row."""
    picture = np.full((96, 128, 3), 20, np.uint8)
    picture[:, 36:92] = 200
    path = video(tmp_path / "wide.mp4", frames=[picture] * 60)
    content = bytearray(path.read_bytes())
    # The track's matrix, whose first number stretches the width.
    place = content.index(b"tkhd") + 44
    assert content[place : place + 4] == (1 << 16).to_bytes(4, "big")
    content[place : place + 4] = (2 << 16).to_bytes(4, "big")
    path.write_bytes(content)
    assert probe_video(str(path)).width == 256
    frames_FHWC = read(clip(path), SMALL).numpy()
    assert frames_FHWC[:, :, 10:-10].min() > 150


def test_frames_closer_than_a_millisecond_are_told_apart(video, clip, read, tmp_path):
    """Matroska, which decord is given, rounds to milliseconds: they would be one."""
    path = video(tmp_path / "fast.mp4", frames=2200, fps=2000, size=(48, 64))
    # A quarter of a frame's time after each begins, tolerance included.
    start = 0.25 / 2000 - 0.0015 + 0.01
    frames_FHWC = read(clip(path, start), Geometry(201, 48, 64, 200))
    assert read_numbers(frames_FHWC) == [20 + 10 * index for index in range(201)]


def test_av1_with_more_threads_than_decord_can(video, clip, tmp_path):
    path = video(tmp_path / "clock.mp4", codec="libsvtav1")
    alone = read_frames(clip(path), SMALL, num_threads=1, decoder="decord")
    for _ in range(3):
        assert torch.equal(read_frames(clip(path), SMALL, num_threads=16, decoder="decord"), alone)


def test_pyav_reads_times_that_step_back(video, clip, tmp_path):
    """Two recordings joined byte by byte, the second of which begins 0.2 s before the first ends."""
    path = tmp_path / "joined.ts"
    first, second = (
        video(tmp_path / name, frames=60, milliseconds=[begin + 40 * index for index in range(60)]).read_bytes()
        for name, begin in (("first.ts", 0), ("second.ts", 2200))
    )
    path.write_bytes(first + second)
    frames_FHWC, refusal = read_clip(clip(path, 1.0), SMALL)
    assert refusal == "bad_timestamps"
    assert torch.equal(frames_FHWC, read_frames(clip(path, 1.0), SMALL, decoder="pyav"))


def test_a_frame_that_an_edit_list_cuts_off_is_not_chosen(video, clip, tmp_path):
    """The last moment falls on the cut: the frame before it is still shown, within the tolerance."""
    path = video(tmp_path / "cut.mp4")
    content = bytearray(path.read_bytes())
    place = content.index(b"elst") + 12
    content[place : place + 4] = (2000).to_bytes(4, "big")
    path.write_bytes(content)
    frames_FHWC, refusal = read_clip(clip(path), SMALL)
    assert read_numbers(frames_FHWC)[-2:] == [46, 49]
    assert refusal == "bad_timestamps"


@pytest.mark.parametrize("codec", ["libx264", "libsvtav1"])
def test_a_few_frames_of_a_slow_part(codec, video, clip, read, tmp_path):
    """A span of four packets seconds apart, of which decord could not tell how many there are."""
    begins = [0, 40, 80, 120, 2000, 4000, 6000, 8000, 8040, 8080]
    path = video(tmp_path / "slow.mp4", codec=codec, frames=len(begins), milliseconds=begins, gop=4)
    assert read_numbers(read(clip(path, 2.5), Geometry(9, 96, 128, 2))) == [4, 4, 4, 5, 5, 5, 5, 6, 6]
