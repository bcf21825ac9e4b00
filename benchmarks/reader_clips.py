"""The clips that readers are measured on, made from the example."""

from __future__ import annotations

import itertools
from fractions import Fraction
from pathlib import Path
from typing import Any

import av

from exvideo_train.geometry import Geometry

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "clips" / "bigbuckbunny.mp4"


def make_clips(folder: Path) -> list[tuple[str, Path, float, Geometry]]:
    """(name, video, start, geometry) of what is read."""
    at_8, at_25 = Geometry(129, 480, 720, 8), Geometry(129, 480, 720, 25)
    long_clip = loop_packets(folder / "whole.mp4", 115)
    return [
        ("H.264 720p 25 fps, 129 frames at 25 fps", EXAMPLE, 0.0, at_25),
        ("H.264 720p, 16 s from 290 s of 10 min, at 8 fps", long_clip, 290.0, at_8),
        ("H.264 1080p 30 fps, 16 s at 8 fps", encode(folder / "h264.mp4", "libx264", {"preset": "fast"}), 0.0, at_8),
        ("HEVC 1080p 30 fps, 16 s at 8 fps", encode(folder / "hevc.mp4", "libx265", {"preset": "veryfast"}), 0.0, at_8),
        ("VP9 1080p 30 fps, 16 s at 8 fps", encode(folder / "vp9.webm", "libvpx-vp9", VP9), 0.0, at_8),
        ("AV1 1080p 30 fps, 16 s at 8 fps", encode(folder / "av1.mp4", "libsvtav1", {"preset": "10"}), 0.0, at_8),
    ]


VP9 = {"deadline": "realtime", "cpu-used": "8", "row-mt": "1"}


def loop_packets(path: Path, times: int) -> Path:
    """The example many times over, its packets copied: a long video like those that data sets cut clips from."""
    with av.open(str(path), "w") as target:
        stream: Any = None
        for number in range(times):
            with av.open(str(EXAMPLE)) as source:
                video: Any = source.streams.video[0]
                stream = stream or target.add_stream_from_template(video)
                step = int(Fraction(132, 25) / video.time_base)
                for packet in source.demux(video):
                    if packet.dts is not None and packet.pts is not None:
                        packet.pts += number * step
                        packet.dts += number * step
                        packet.stream = stream
                        target.mux(packet)
    return path


def encode(path: Path, codec: Any, options: dict[str, str]) -> Path:
    """17 s of the example at 1920x1080 and 30 fps, back and forth."""
    with av.open(str(EXAMPLE)) as source:
        pictures = [frame.reformat(1920, 1080, "yuv420p") for frame in source.decode(video=0)]
    if codec == "libx265":
        options = {**options, "x265-params": "log-level=0"}
    with av.open(str(path), "w") as target:
        stream = target.add_stream(codec, rate=30, options=options)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = 1920, 1080, "yuv420p", 4_000_000
        for number, picture in enumerate(itertools.islice(itertools.cycle(pictures + pictures[::-1]), 510)):
            picture.pts, picture.time_base = number, Fraction(1, 30)
            target.mux(stream.encode(picture))
        target.mux(stream.encode(None))
    return path
