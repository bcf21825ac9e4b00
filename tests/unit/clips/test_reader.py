"""Frames by time from every codec and rate, upright, cropped and antialiased; each broken input with its own reason."""

from __future__ import annotations

import subprocess
import sys
import tarfile
from dataclasses import replace
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.videos import read_numbers, shown_at

from exvideo_train.clips.container import UnreadableClip, probe_video
from exvideo_train.clips.reader import read_clip, read_frames
from exvideo_train.geometry import Geometry

SMALL = Geometry(num_frames=17, height=96, width=128, fps=8)
CODECS = {
    "h264.mp4": {"codec": "libx264"},
    "h264_sound.mp4": {"codec": "libx264", "sound": True},
    "h264_10bit.mkv": {"codec": "libx264", "pixel_format": "yuv420p10le"},
    "h264_transport.ts": {"codec": "libx264"},
    "hevc.mp4": {"codec": "libx265"},
    "hevc_10bit.mp4": {"codec": "libx265", "pixel_format": "yuv420p10le"},
    "vp9.webm": {"codec": "libvpx-vp9"},
    "av1.mp4": {"codec": "libsvtav1"},
    "av1_10bit.mkv": {"codec": "libsvtav1", "pixel_format": "yuv420p10le"},
    "odd_size.mp4": {"codec": "libx264", "pixel_format": "yuv444p", "size": (99, 131)},
    "mpeg4.avi": {"codec": "mpeg4"},
}


@pytest.mark.parametrize("name", CODECS)
def test_every_codec_shows_the_right_frames_from_any_start(name, video, clip, read, tmp_path):
    path = video(tmp_path / name, **CODECS[name])
    times = [index / 25 for index in range(150)]
    # Between keyframes, on one, at the very start, and the last window that fits.
    for start in (0.0, 0.44, 1.0, 2.999, 3.96):
        frames_FHWC = read(clip(path, start), SMALL)
        assert frames_FHWC.shape == (17, 96, 128, 3)
        assert frames_FHWC.dtype == torch.uint8
        moments = [start + index / 8 + 0.0015 for index in range(17)]
        assert read_numbers(frames_FHWC) == shown_at(times, moments), start


@pytest.mark.parametrize("rate", [Fraction(24000, 1001), Fraction(30000, 1001), Fraction(60), Fraction(50)])
def test_constant_rates_show_the_right_moments(rate, video, clip, read, tmp_path):
    path = video(tmp_path / "clock.mp4", frames=int(rate * 4), fps=rate)
    times = [float(index / rate) for index in range(int(rate * 4))]
    for start in (0.0, 1.3):
        shown = read_numbers(read(clip(path, start), SMALL))
        for index, number in enumerate(shown):
            lag = start + index / 8 - times[number]
            assert -0.002 <= lag < 1 / float(rate), f"frame {index} shows {times[number]:.3f} s"


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_variable_rate_shows_the_right_moments(suffix, video, clip, read, tmp_path):
    steps = [17, 200, 33, 33, 90, 500, 10, 41]
    milliseconds = [0]
    while milliseconds[-1] < 5000:
        milliseconds.append(milliseconds[-1] + steps[len(milliseconds) % len(steps)])
    path = video(tmp_path / f"variable{suffix}", frames=len(milliseconds), milliseconds=milliseconds)
    for start in (0.0, 0.7, 2.25):
        shown = read_numbers(read(clip(path, start), SMALL))
        assert shown == shown_at([moment / 1000 for moment in milliseconds], [start + i / 8 for i in range(17)])


@pytest.mark.parametrize("codec", ["libx264", "libx265"])
def test_reordered_frames_of_matroska_are_shown_in_order(codec, video, clip, read, tmp_path):
    """It does not say when its first packets are decoded; at 5 frames a second they are far apart."""
    path = video(tmp_path / "slow.mkv", codec=codec, frames=40, fps=5)
    for start in (0.0, 0.4, 5.2):
        expected = shown_at([index / 5 for index in range(40)], [start + index / 8 + 0.0015 for index in range(17)])
        assert read_numbers(read(clip(path, start), SMALL)) == expected
    assert read_numbers(read(clip(path, 0.2), Geometry(1, 96, 128, 8))) == [1]


def test_frames_that_an_edit_list_cuts_off_are_not_shown(video, clip, read, decoder, tmp_path):
    path = video(tmp_path / "cut.mp4")
    content = bytearray(path.read_bytes())
    place = content.index(b"elst") + 12
    assert int.from_bytes(content[place : place + 4], "big") == 6000
    content[place : place + 4] = (2100).to_bytes(4, "big")
    path.write_bytes(content)
    assert read(clip(path), SMALL).shape[0] == 17
    with pytest.raises(UnreadableClip) as caught:
        read_clip(clip(path, 0.8), SMALL, decoder=decoder)
    assert caught.value.reason == "span_past_end"


def test_a_video_that_begins_late_is_counted_from_its_first_frame(video, clip, read, tmp_path):
    path = video(tmp_path / "late.mkv", frames=60, milliseconds=[5000 + 40 * index for index in range(60)])
    assert read_numbers(read(clip(path), SMALL)) == [int(index * 3.125) for index in range(17)]


def test_the_example_clip_holds_one_129_frame_window(clip, clip_path, read):
    geometry = Geometry(129, 64, 96, 25)
    whole = read(clip(clip_path), geometry)
    assert torch.equal(whole, read(clip(clip_path, 0.0, 5.28), geometry))
    with pytest.raises(UnreadableClip) as caught:
        read(clip(clip_path), Geometry(137, 64, 96, 25))
    assert caught.value.reason == "too_short"


def test_frames_equal_those_of_decoding_everything(clip, clip_path):
    """Against the plainest use of PyAV: decode all, take the 129 frames by index."""
    geometry = Geometry(9, 720, 1280, 5)
    frames_FHWC = read_frames(clip(clip_path, 1.0), geometry)
    with av.open(str(clip_path)) as container:
        decoded = list(container.decode(video=0))
    for index in range(9):
        expected = (
            decoded[25 + 5 * index]
            .reformat(format="rgb24", src_colorspace="ITU709", interpolation="BICUBIC")
            .to_ndarray()
        )
        difference = np.abs(expected.astype(int) - frames_FHWC[index].numpy()).mean()
        # The plain conversion's short cut for chroma costs it 2 levels; another frame differs by more than 8.
        assert difference < 3.0, index


HD_FILES = {
    "h264.mp4": "libx264",
    "h264_transport.ts": "libx264",
    "hevc.mp4": "libx265",
    "hevc_transport.ts": "libx265",
    "vp9.webm": "libvpx-vp9",
    "av1.mp4": "libsvtav1",
    "mpeg4.avi": "mpeg4",
}


@pytest.mark.parametrize("name", HD_FILES)
def test_untagged_hd_video_is_bt709(name, video, clip, read, tmp_path):
    """Saturated blocks encoded with the BT.601 matrix and shown, as players do, with that of BT.709."""
    rng = np.random.default_rng(0)
    blocks = rng.choice([40, 90, 210], (9, 16, 3)).astype(np.uint8)
    picture = blocks.repeat(80, 0).repeat(80, 1)
    path = video(tmp_path / name, frames=[picture] * 5, codec=HD_FILES[name])
    shown_FHWC = read(clip(path), Geometry(1, 720, 1280, 8)).numpy().astype(float)
    shown = shown_FHWC[0, 40::80, 40::80]
    bt601, bt709 = ((0.299, 0.587, 0.114), (0.2126, 0.7152, 0.0722))
    expected = np.clip(blocks @ (rgb_of(*bt709) @ yuv_of(*bt601)).T, 0, 255)
    assert float(np.abs(blocks - expected).mean()) > 6
    assert float(np.abs(shown - expected).mean()) < 3


def yuv_of(red: float, green: float, blue: float) -> np.ndarray:
    """RGB to luma and colour differences, from the weights of luma."""
    luma = np.array([red, green, blue])
    return np.stack([luma, (np.eye(3)[2] - luma) / (2 * (1 - blue)), (np.eye(3)[0] - luma) / (2 * (1 - red))])


def rgb_of(red: float, green: float, blue: float) -> np.ndarray:
    return np.linalg.inv(yuv_of(red, green, blue))


@pytest.mark.parametrize("turn", [90, 180, 270])
def test_rotation_metadata_is_applied(turn, video, clip, read, tmp_path):
    path = video(tmp_path / "turned.mp4", frames=60, turn=turn)
    info = probe_video(str(path))
    assert (info.width, info.height) == (128, 96)
    frames_FHWC = read(clip(path), SMALL)
    assert read_numbers(frames_FHWC) == [int(index * 3.125) for index in range(17)]


def test_pixel_aspect_is_applied(video, clip, read, tmp_path):
    """Anamorphic video is shown 4/3 wider than stored: its crop to 4:3 keeps the stored middle alone."""
    height, width = 96, 128
    picture = np.full((height, width, 3), 200, np.uint8)
    # Bright middle of the width that a 4:3 crop of a 16:9 picture keeps, dark sides.
    picture[:, :15] = picture[:, -15:] = 20
    path = video(tmp_path / "wide.mp4", frames=[picture] * 60, pixel_aspect=Fraction(4, 3))
    assert probe_video(str(path)).width == 171
    assert read(clip(path), SMALL).numpy().min() > 150


@pytest.mark.parametrize(("height", "width"), [(480, 720), (720, 480), (256, 256), (720, 1280)])
def test_crop_and_resize_against_a_float_reference(height, width, clip, clip_path, decoder, read):
    """Antialiased bicubic of the centre crop in floating point, with the BT.709 matrix, from the decoded planes.

    decord's conversion makes all colours a level darker; a picture half a pixel aside differs by 3.7 to 5.2.
    """
    mean, most = {"pyav": (0.6, 6), "decord": (1.6, 8)}[decoder]
    frames_FHWC = read(clip(clip_path), Geometry(9, height, width, 2))
    with av.open(str(clip_path)) as container:
        frame = next(container.decode(video=0))
        frame_at_2_seconds = [entry for entry in container.decode(video=0) if entry.time <= 2.0][-1]
    for index, decoded in ((0, frame), (4, frame_at_2_seconds)):
        difference = (float_reference(decoded, height, width) - frames_FHWC[index]).abs()
        assert difference.mean() < mean
        assert float(difference.quantile(0.99) if difference.numel() < 2**24 else difference.max()) < most


def float_reference(frame: av.VideoFrame, height: int, width: int) -> torch.Tensor:
    planes = torch.from_numpy(frame.to_ndarray(format="yuv420p")).float()
    full_height, full_width = frame.height, frame.width
    luma = (planes[:full_height] - 16) * 255 / 219
    chroma = planes[full_height:].reshape(2, full_height // 2, full_width // 2)
    blue, red = (F.interpolate(chroma[None], (full_height, full_width), mode="bilinear")[0] - 128) * 255 / 224
    red_part, blue_part = luma + 2 * (1 - 0.2126) * red, luma + 2 * (1 - 0.0722) * blue
    green_part = (luma - 0.2126 * red_part - 0.0722 * blue_part) / 0.7152
    picture = torch.stack([red_part, green_part, blue_part]).clamp(0, 255)
    crop_width = min(full_width, round(full_height * width / height))
    crop_height = min(full_height, round(full_width * height / width))
    left, top = (full_width - crop_width) // 2 // 2 * 2, (full_height - crop_height) // 2 // 2 * 2
    cropped = picture[None, :, top : top + crop_height, left : left + crop_width]
    return F.interpolate(cropped, (height, width), mode="bicubic", antialias=True)[0].permute(1, 2, 0).clamp(0, 255)


def test_a_clip_may_have_its_own_sampling_rate(video, clip, read, tmp_path):
    path = video(tmp_path / "short.mp4", frames=40)
    with pytest.raises(UnreadableClip):
        read(clip(path), SMALL)
    fast = replace(clip(path), sampling_fps=12.5)
    assert read_numbers(read(fast, SMALL)) == list(range(0, 34, 2))


def test_members_of_a_tar_shard_are_read_in_place(video, clip, read, tmp_path):
    path = video(tmp_path / "clip.mp4", frames=60)
    shard = tmp_path / "00000.tar"
    with tarfile.open(shard, "w") as archive:
        archive.add(path, "0000000_00000.mp4")
        archive.add(path, "empty.mp4", filter=lambda member: setattr(member, "size", 0) or member)
    frames_FHWC = read(clip(f"{shard}::0000000_00000.mp4"), SMALL)
    assert torch.equal(frames_FHWC, read(clip(path), SMALL))
    for member, reason in (("absent.mp4", "missing"), ("empty.mp4", "empty_file")):
        with pytest.raises(UnreadableClip) as caught:
            read(clip(f"{shard}::{member}"), SMALL)
        assert caught.value.reason == reason


MEMORY_SCRIPT = """
import resource, sys, torch
from exvideo_train.clips.reader import read_frames
from exvideo_train.clips.record import ClipRecord
from exvideo_train.geometry import Geometry
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
def read(num_frames, fps):
    record = ClipRecord("abc", "test", sys.argv[1], 0.0, None, "")
    read_frames(record, Geometry(num_frames, 96, 128, fps), num_threads=1, decoder=sys.argv[2])
read(9, 25)
before = peak()
read(int(sys.argv[3]), int(sys.argv[4]))
print(peak() - before)
"""


@pytest.mark.parametrize(("decoder", "num_frames", "fps"), [("pyav", 97, 25), ("decord", 25, 8)])
def test_full_size_frames_are_never_all_in_memory(decoder, num_frames, fps, video, tmp_path):
    """decord is measured where it skips frames: it runs ahead of a reader that wants them all."""
    picture = np.tile(np.arange(1920, dtype=np.uint8), (1080, 1))[..., None].repeat(3, 2)
    path = video(tmp_path / "large.mp4", frames=[picture] * 100, options={"preset": "ultrafast"})
    done = subprocess.run(
        [sys.executable, "-c", MEMORY_SCRIPT, str(path), decoder, str(num_frames), str(fps)],
        check=True,
        capture_output=True,
        text=True,
        timeout=120,
    )
    # 97 frames at full size would be 600 MB in RGB and 300 MB as decoded, 25 of them 155 MB in RGB.
    assert int(done.stdout) < 80_000
