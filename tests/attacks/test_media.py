"""Files that are no videos, or claim what no video is: each costs itself, and nothing but what was given is opened."""

from __future__ import annotations

import ast
import io
import struct
import subprocess
import sys
import tarfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest
from support.attacks import Attack, attacks, check_ending, dropped, held
from support.videos import clip_of, draw_number, make_video, read_numbers

import exvideo_train
from exvideo_train.clips.container import UnreadableClip, probe_video
from exvideo_train.clips.judging import FilterOptions, judge_clips
from exvideo_train.clips.quality import measure_clip
from exvideo_train.clips.reader import read_clip
from exvideo_train.clips.record import TAR_SEPARATOR, write_manifest
from exvideo_train.clips.workers import parallel_map
from exvideo_train.config.clips import FilterThresholds
from exvideo_train.geometry import Geometry

SMALL = Geometry(num_frames=9, height=96, width=128, fps=8)
UDP_PORT = 43_217
SDP = f"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video {UDP_PORT} RTP/AVP 96\n"
SDP += "a=rtpmap:96 H264/90000\n"
HLS = "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nsibling.mp4\n#EXT-X-ENDLIST\n"
DASH = '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static"><Period/></MPD>\n'
IMF = '<?xml version="1.0"?><CompositionPlaylist xmlns="http://www.smpte-ra.org/schemas/2067-3/2016"/>\n'
SRT = "1\n00:00:00,000 --> 00:00:09,000\nwords\n\n"
PNG = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0) + bytes(200)
WAV = (
    b"RIFF\xff\xff\0\0WAVEfmt " + struct.pack("<IHHIIHH", 16, 1, 1, 8000, 8000, 1, 8) + b"data\xff\xff\0\0" + bytes(999)
)

FORMAT = "unsupported_format"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return _good(tmp_path_factory.getbasetemp())


@cache
def _good(folder: Path) -> bytes:
    """2.4 s that show their numbers, from 100 on."""
    frames = [draw_number(100 + number, 96, 128) for number in range(60)]
    return make_video(folder / "attacked.mp4", frames).read_bytes()


def read_all_ways(video: str) -> dict[str, str]:
    """What probing and both decoders say against a video; they must agree on the reason."""
    ways: list[Callable[[], object]] = [partial(probe_video, video)]
    ways += [partial(read_clip, clip_of(video), SMALL, 1, decoder) for decoder in ("pyav", "decord")]
    said = []
    for way in ways:
        try:
            way()
        except UnreadableClip as error:
            said.append((error.reason, error.detail))
    assert len(said) in (0, len(ways)), f"only some ways refuse it: {said}"
    assert len({reason for reason, _ in said}) <= 1, said
    return {video: " ".join(said[0])} if said else {}


def in_tar(content: bytes, folder: Path) -> str:
    shard = folder / "0.tar"
    with tarfile.open(shard, "w") as target:
        member = tarfile.TarInfo("a.mp4")
        member.size = len(content)
        target.addfile(member, io.BytesIO(content))
    return f"{shard}{TAR_SEPARATOR}a.mp4"


@contextmanager
def no_port_is_bound() -> Iterator[None]:
    """Looks at this machine's UDP sockets all the while."""
    found: list[str] = []
    done = threading.Event()
    port = f":{UDP_PORT:04X} "

    def watch() -> None:
        while not done.wait(0.002):
            found.extend(line for line in Path("/proc/net/udp").read_text().splitlines() if port in line)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()
    assert not found


LISTS = [
    dropped("SDP, which listens on the network", ("a.mp4", SDP), FORMAT, "format sdp"),
    dropped("SDP under its own name", ("a.sdp", SDP), FORMAT, "format sdp"),
    dropped("ffconcat of a sibling", ("a.mp4", "ffconcat version 1.0\nfile sibling.mp4\n"), FORMAT, "format concat"),
    dropped("ffconcat under its own name", ("a.ffconcat", "ffconcat version 1.0\nfile sibling.mp4\n"), FORMAT),
    dropped("a playlist of a sibling", ("a.m3u8", HLS), FORMAT, "format hls"),
    dropped("a playlist named as a video", ("a.mp4", HLS), "not_video"),
    dropped("DASH", ("a.mpd", DASH), "not_video"),
    dropped("IMF", ("a.xml", IMF), "not_video"),
    dropped("subtitles", ("a.mp4", SRT), FORMAT, "format srt"),
    dropped("FFmpeg's metadata", ("a.mp4", ";FFMETADATA1\ntitle=x\n"), FORMAT, "format ffmetadata"),
    dropped("a picture of 60,000 x 60,000", ("a.mp4", PNG), FORMAT, "format png_pipe"),
    dropped("sound alone", ("a.mp4", WAV), FORMAT, "format wav"),
    dropped("a web page", ("a.mp4", "<html>429 Too Many Requests</html>\n" * 50), "not_video"),
]


@attacks(LISTS)
def test_what_is_no_video_opens_nothing(
    attack: Attack, good: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sibling.mp4").write_bytes(good)
    name, content = attack.content
    content = content.encode() if isinstance(content, str) else content
    (tmp_path / name).write_bytes(content)
    with no_port_is_bound():
        check_ending(attack, lambda: read_all_ways(str(tmp_path / name)))
        if name == "a.mp4":
            check_ending(attack, lambda: read_all_ways(in_tar(content, tmp_path)))


NAMES = [
    held("two files joined", "concat:sibling.mp4|sibling.mp4"),
    held("a web address", "http:a.mp4"),
    held("a file's address", "file:sibling.mp4"),
    held("standard input", "pipe:0"),
    held("a dash", "-"),
    held("data in the name", "data:video;base64,AAAA.mp4"),
    held("a part of a file", "subfile,,start,0,end,9,,:sibling.mp4"),
    held("a cache of a file", "cache:sibling.mp4"),
    held("a numbered sequence", "%d.mp4"),
    held("a pattern", "*.mp4"),
    held("a line break", "a\nb.mp4"),
    held("no UTF-8", "\udcff.mp4"),
]


@attacks(NAMES)
def test_a_name_is_a_name(attack: Attack, good: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_video(tmp_path / "sibling.mp4", frames=60)
    Path(attack.content).write_bytes(good)
    check_ending(attack, lambda: read_all_ways(attack.content))
    assert read_numbers(read_clip(clip_of(attack.content), SMALL)[0])[0] == 100


def number(value: int, size: int = 4) -> bytes:
    return value.to_bytes(size, "big")


def at(tag: bytes, offset: int, value: bytes) -> Callable[[bytes], bytes]:
    """Overwrites so many bytes after the place of an MP4 box's name."""

    def change(content: bytes) -> bytes:
        place = content.index(tag) + offset
        return content[:place] + value + content[place + len(value) :]

    return change


def with_alias(content: bytes) -> bytes:
    """The video's data zeros, and its data reference an alias of a sibling: what Macs wrote."""
    name = b"sibling.mp4"
    alias = bytes(14) + bytes([3]) + b"vol".ljust(27, b"\0") + bytes(12)
    alias += bytes([len(name)]) + name.ljust(63, b"\0") + bytes(16) + struct.pack(">hh", 1, 1) + bytes(16)
    alias += struct.pack(">hh", 2, len(name)) + name + b"\0" + struct.pack(">hh", -1, 0)
    box = number(len(alias) + 8) + b"alis" + alias
    changed = bytearray(content)
    place = changed.index(b"dref") + 12
    size = int.from_bytes(changed[place : place + 4], "big")
    for outer in (b"moov", b"trak", b"mdia", b"minf", b"dinf", b"dref"):
        begin = changed.index(outer) - 4
        changed[begin : begin + 4] = number(int.from_bytes(changed[begin : begin + 4], "big") + len(box) - size)
    changed[place : place + size] = box
    begin = changed.index(b"mdat")
    length = int.from_bytes(changed[begin - 4 : begin], "big") - 8
    changed[begin + 4 : begin + 4 + length] = bytes(length)
    return bytes(changed)


MOST = number(0x7FFFFFFF)
CLAIMS = [
    dropped("an alias of a sibling for its data", with_alias, "truncated"),
    held("a matrix of zeros", at(b"tkhd", 44, bytes(36))),
    held("a matrix of ones", at(b"tkhd", 44, b"\xff" * 36)),
    held("the greatest matrix", at(b"tkhd", 44, MOST * 9)),
    held("the greatest track", at(b"tkhd", 80, b"\xff" * 8)),
    held("65535 x 65535 pixels in the header alone", at(b"avc1", 28, b"\xff" * 4)),
    held("an unknown length", at(b"mdhd", 20, b"\xff" * 4)),
    held("2^31 frames of one length", at(b"stts", 12, MOST)),
    held("2^31 samples a chunk", at(b"stsc", 16, MOST)),
    held("2^31 chunks", at(b"stco", 8, MOST)),
    held("an edit that begins at -2^31", at(b"elst", 12, MOST + number(0x80000000))),
    held("a decoder header of 2^31 bytes", at(b"avcC", -4, MOST)),
    dropped("2^32 samples", at(b"stsz", 12, b"\xff" * 4), "truncated"),
    dropped("2^32 samples of one byte", at(b"stsz", 8, number(1) + b"\xff" * 4), "truncated"),
]


@attacks(CLAIMS)
def test_claims_of_a_header(attack: Attack, good: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sibling.mp4").write_bytes(good)
    (tmp_path / "a.mp4").write_bytes(attack.content(good))
    check_ending(attack, lambda: read_all_ways("a.mp4"))


def _jpegs(path: Path) -> None:
    """Motion JPEG in AVI whose pictures claim 60000 x 60000, as does its header."""
    make_video(path, frames=40, codec="mjpeg", pixel_format="yuvj420p")
    content = path.read_bytes()
    for order, begin, sizes in ((">HH", b"\xff\xc0\0\x11\x08", (96, 128)), ("<II", b"", (128, 96))):
        true = begin + struct.pack(order, *sizes)
        assert true in content
        content = content.replace(true, begin + struct.pack(order, 60_000, 60_000))
    path.write_bytes(content)


def _large(path: Path) -> None:
    make_video(path, frames=[np.zeros((4368, 8192, 3), np.uint8)], options={"preset": "ultrafast"})


def _patched(*change: object) -> Callable[[Path], object]:
    """A good video with bytes overwritten, as :func:`at` does it."""
    return lambda path: path.write_bytes(at(*change)(make_video(path, frames=60).read_bytes()))  # type: ignore[arg-type]


SHAPES = [
    held("a good one", partial(make_video, frames=60)),
    dropped("60000 x 60000", _jpegs, "corrupt"),
    dropped("8192 x 4368", _large, "too_large", "8192x4368"),
    dropped("two by two", partial(make_video, frames=60, size=(2, 2)), "too_small"),
    dropped("a line", partial(make_video, frames=60, size=(2, 512)), "too_small", "aspect"),
    dropped("a column", partial(make_video, frames=60, size=(512, 2)), "too_small", "aspect"),
    dropped("pixels 200 times as wide", _patched(b"tkhd", 44, number(200 << 16)), "corrupt", "200 times as wide"),
    dropped("pixels of no width", _patched(b"tkhd", 44, number(2)), "corrupt", "times as wide as high"),
    dropped("500 million frames a second", _patched(b"mdhd", 16, MOST), "too_short"),
    dropped("a frame a week", _patched(b"stts", 16, MOST), "low_fps"),
    dropped("no time scale", _patched(b"mdhd", 16, number(0)), "low_fps"),
    dropped("a time scale of -1", _patched(b"mdhd", 16, b"\xff" * 4), "low_fps"),
]


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Every clip of `SHAPES` in one run of the filter, and what is said against it."""
    folder = tmp_path_factory.mktemp("shapes")
    videos = [folder / f"{place}.{'avi' if '60000' in case.name else 'mp4'}" for place, case in enumerate(SHAPES)]
    for case, video in zip(SHAPES, videos, strict=True):
        case.content(video)
    write_manifest(folder / "clips.jsonl", [clip_of(video, caption="a b c") for video in videos])
    options = FilterOptions(SMALL, FilterThresholds(min_short_side=16), num_workers=1, progress=False)
    found = judge_clips(folder / "clips.jsonl", folder / "journal", options)
    return {case.name: " ".join([*entry.reasons, entry.detail]) for case, entry in zip(SHAPES, found, strict=True)}


@attacks(SHAPES)
def test_shapes_and_rates_of_no_video(attack: Attack, judged: dict[str, str]) -> None:
    said = judged[attack.name]
    check_ending(attack, lambda: {attack.name: said} if said.strip() else {})


def test_a_span_behind_the_end_of_a_video_of_unknown_length(tmp_path: Path) -> None:
    content = make_video(tmp_path / "whole.mkv", frames=60).read_bytes()
    length = content.index(b"\x44\x89\x88")
    (tmp_path / "a.mkv").write_bytes(content[:length] + b"\xec\x89" + content[length + 2 :])
    for start in (9.0, 1e15):
        with pytest.raises(UnreadableClip) as caught:
            measure_clip(str(tmp_path / "a.mkv"), start, start + 1)
        assert caught.value.reason == "span_past_end"


def test_a_worker_has_no_more_memory_than_a_video_may_take() -> None:
    with pytest.raises(RuntimeError, match="MemoryError"):
        list(parallel_map(bytearray, [1 << 40], num_workers=1, timeout_seconds=60.0))


TIGHT = """
import re, resource, sys
import av, numpy
from exvideo_train.clips.container import UnreadableClip, probe_video
used = int(re.search(r"VmData:\\s*(\\d+) kB", open("/proc/self/status").read())[1])
resource.setrlimit(resource.RLIMIT_DATA, ((used << 10) + (int(sys.argv[2]) << 20), -1))
try:
    print(probe_video(sys.argv[1]))
except UnreadableClip as error:
    print(error.reason)
"""


def test_a_decoder_that_is_refused_memory_costs_its_clip(tmp_path: Path) -> None:
    video = make_video(
        tmp_path / "large.avi", [np.zeros((2048, 4096, 3), np.uint8)], codec="mjpeg", pixel_format="yuvj420p"
    )

    def probed(mebibytes: int) -> str:
        command = [sys.executable, "-c", TIGHT, str(video), str(mebibytes)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    assert probed(4) == "too_large"
    assert "width=4096" in probed(2000)


def test_one_function_opens_media() -> None:
    """What else there is writes, or is decord on content that this function's packets were copied into."""
    package = Path(exvideo_train.__file__).parent
    found = {
        (str(path.relative_to(package)), call)
        for path in package.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and (call := ast.unparse(node.func)).endswith(
            ("av.open", "VideoReader", "VideoCapture", "Image.open", "read_video")
        )
        and not any(isinstance(value, ast.Constant) and value.value == "w" for value in node.args)
    }
    assert found == {
        ("clips/opening.py", "av.open"),
        ("clips/decoders/decord.py", "self._decord.VideoReader"),
        # A picture that the user names, of two formats.
        ("sampling/pictures.py", "Image.open"),
    }
