"""Videos that are broken, each in its own way."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np

from support.videos import make_video

# Zeros that take any disk minutes to read, and no room on it.
ENDLESS_BYTES = 1 << 42
CLUSTER = b"\x1fC\xb6u"


def write_good(path: Path, codec: str = "libx264") -> Path:
    """100 frames of noise at 25 a second: every packet is large, and matters."""
    rng = np.random.default_rng(0)
    return make_video(path, frames=[rng.integers(0, 255, (96, 128, 3), np.uint8) for _ in range(100)], codec=codec)


def write_broken(kind: str, good: Path, path: Path) -> None:
    """Make the file at ``path`` broken as the name in `MAKERS` says, from a video of :func:`write_good`."""
    MAKERS[kind](good, path)


def damage_packet(good: Path, path: Path, number: int) -> None:
    """Copy a video with two thirds of one packet, counted in the order of decoding, overwritten."""
    with av.open(str(good)) as source, av.open(str(path), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0], opaque=True)
        for position, packet in enumerate(entry for entry in source.demux(video=0) if entry.size):
            written = packet
            if position == number:
                content = bytes(packet)
                kept = len(content) // 3
                written = av.Packet(content[:kept] + b"\x5a" * (len(content) - kept))
                written.pts, written.dts, written.time_base = packet.pts, packet.dts, packet.time_base
                written.is_keyframe = packet.is_keyframe
            written.stream = stream
            target.mux(written)


def _cut_off(good: Path, path: Path) -> None:
    content = good.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def _cut_off_matroska(good: Path, path: Path) -> None:
    content = _as_matroska(good, path)
    path.write_bytes(content[: len(content) // 3])


def _audio(_: Path, path: Path) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=44100, layout="mono")
        tone = av.AudioFrame.from_ndarray(np.zeros((1, 44100 * 3), np.float32), format="fltp", layout="mono")
        tone.sample_rate = 44100
        container.mux(stream.encode(tone))
        container.mux(stream.encode(None))


def _corrupt_packets(good: Path, path: Path) -> None:
    content = good.read_bytes()
    rng = np.random.default_rng(1)
    middle = len(content) // 3
    damage = rng.integers(0, 255, len(content) // 10, np.uint8).tobytes()
    path.write_bytes(content[:middle] + damage + content[middle + len(damage) :])


def _jumping_timestamps(good: Path, path: Path) -> None:
    """From the sixth frame on a thousand seconds late: a player would show the fifth for ever."""
    _remux(good, path, lambda number: 1000.0 if number > 5 else 0.0)


def _returning_timestamps(good: Path, path: Path) -> None:
    """Some frames are late, those after them are shown before them."""
    _remux(good, path, lambda number: 1.0 if 10 < number < 20 else 0.0, keep_order=True)


def _hang(good: Path, path: Path) -> None:
    """After the first second the reader looks for the next cluster in zeros without end."""
    content = _as_matroska(good, path)
    second = content.index(CLUSTER, content.index(CLUSTER) + 4)
    path.write_bytes(content[:second])
    os.truncate(path, ENDLESS_BYTES)


def _as_matroska(good: Path, path: Path) -> bytes:
    whole = path.with_name(f"{path.stem}_whole.mkv")
    _remux(good, whole, lambda _: 0.0, cluster_time_limit="500")
    content = whole.read_bytes()
    whole.unlink()
    return content


def _remux(
    good: Path, path: Path, late_seconds: Callable[[int], float], keep_order: bool = False, **options: Any
) -> None:
    """Copy the packets, each so many seconds late; ``keep_order`` leaves their decoding times alone."""
    with av.open(str(good)) as source, av.open(str(path), "w", options=options) as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for number, packet in enumerate(source.demux(video=0)):
            if packet.dts is None or packet.pts is None or packet.time_base is None:
                continue
            late = int(late_seconds(number) / packet.time_base)
            packet.pts += late
            packet.dts += 0 if keep_order else late
            packet.stream = stream
            target.mux(packet)


MAKERS: dict[str, Callable[[Path, Path], Any]] = {
    "absent": lambda good, path: None,
    "audio": _audio,
    "corrupt_packets": _corrupt_packets,
    "cut_off": _cut_off,
    "cut_off_matroska": _cut_off_matroska,
    "folder": lambda good, path: path.mkdir(),
    "hang": _hang,
    "intact": lambda good, path: path.write_bytes(good.read_bytes()),
    "jumping_timestamps": _jumping_timestamps,
    "one_frame": lambda good, path: make_video(path, frames=1),
    "pipe": lambda good, path: os.mkfifo(path),
    "returning_timestamps": _returning_timestamps,
    "text": lambda good, path: path.write_text("<html>429 Too Many Requests</html>\n" * 50),
    "unknown_codec": lambda good, path: path.write_bytes(good.read_bytes().replace(b"avc1", b"zzz9")),
    "zero_bytes": lambda good, path: path.write_bytes(b""),
}
