"""Building manifests: sorted, without duplicates, probed, streamed, continued after a kill."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.disk import full_disk

from exvideo_train.clips import manifest as manifest_module
from exvideo_train.clips.manifest import BuildOptions, build_manifest
from exvideo_train.clips.record import ClipRecord, make_clip_id, read_manifest
from exvideo_train.clips.sorting import SortedRows, clip_row
from exvideo_train.clips.sources import text_files
from exvideo_train.clips.sources.folder import CaptionedFolder
from exvideo_train.clips.sources.internvid import InternVid
from exvideo_train.clips.sources.video_index import build_video_index
from exvideo_train.clips.target import dropped_path, working_folder
from exvideo_train.errors import UserError

QUIET = BuildOptions(probe=True, num_workers=2, timeout_seconds=30, progress=False)
UNPROBED = BuildOptions(probe=False, num_workers=2, progress=False)


def row(video_id: str, start: str, end: str, caption: str = "words of a caption") -> str:
    return json.dumps(
        {
            "YoutubeID": video_id,
            "Start_timestamp": start,
            "End_timestamp": end,
            "Caption": caption,
            "Aesthetic_Score": 4.5,
            "UMT_Score": 0.4,
        }
    )


def internvid(folder: Path, rows: list[str], layout: bool | None = None) -> InternVid:
    (folder / "M.jsonl").write_text("\n".join(rows) + "\n")
    return InternVid(str(folder / "M.jsonl"), build_video_index(folder / "videos", folder / "index"), layout)


def drops(manifest: Path) -> list[tuple[str, str]]:
    lines = [json.loads(line) for line in dropped_path(manifest).read_text().splitlines()]
    return [(line["reason"], line.get("video", "")) for line in lines]


def test_videos_are_probed_once_and_what_is_unusable_is_listed(clip_path, tmp_path):
    videos = tmp_path / "videos"
    videos.mkdir()
    for name in ("whole______.mp4", "cut________.mp4", "named_____x_00:10:00.000_00:10:05.280.mp4"):
        shutil.copy(clip_path, videos / name)
    (videos / "text_______.mp4").write_text("no video")
    source = internvid(
        tmp_path,
        [
            row("whole______", "00:00:02.000", "00:00:05.000"),
            row("whole______", "00:00:00.000", "00:00:05.280"),
            row("whole______", "00:00:00.000", "00:00:05.280", "twice"),
            row("whole______", "00:00:30.000", "00:00:36.000"),
            row("cut________", "00:02:10.000", "00:02:15.240"),
            row("named_____x", "00:10:00.000", "00:10:05.280"),
            row("text_______", "00:00:00.000", "00:00:01.000"),
            row("nowhere____", "00:00:00.000", "00:00:01.000"),
        ],
    )
    manifest = tmp_path / "clips.jsonl"
    report = build_manifest(source, manifest, QUIET)
    records = list(read_manifest(manifest))
    assert [(Path(r.video).name[:6], r.start_seconds, r.end_seconds, r.duration_seconds) for r in records] == [
        ("cut___", 0.0, None, 5.28),
        ("named_", 0.0, None, 5.28),
        ("whole_", 0.0, 5.28, 5.28),
        ("whole_", 2.0, 5.0, 3.0),
    ]
    assert {(r.fps, r.width, r.height, r.codec) for r in records} == {(25.0, 1280, 720, "h264")}
    assert records[0].clip_id == make_clip_id("internvid", "cut________", 130.0, 135.24)
    assert report.num_clips == 4
    assert report.num_videos == 3
    assert dict(report.dropped) == {"missing": 1, "duplicate": 1, "not_video": 1, "span_past_end": 1}
    assert sorted(reason for reason, _ in drops(manifest)) == ["duplicate", "missing", "not_video", "span_past_end"]
    assert not working_folder(manifest).exists()


def test_the_manifest_depends_on_neither_row_order_nor_workers(tmp_path, monkeypatch):
    videos = tmp_path / "videos"
    videos.mkdir()
    rng = random.Random(0)
    names = [f"{number:011d}" for number in range(40)]
    for name in names:
        (videos / f"{name}.mp4").write_bytes(b"x")
    rows = [
        row(rng.choice(names), "00:00:01.000", f"00:00:{rng.randrange(2, 60):02d}.000", "the same") for _ in range(600)
    ]
    manifests = []
    for number, num_workers in enumerate((1, 3)):
        rng.shuffle(rows)
        # Many small pieces, so that sorting is put to work.
        monkeypatch.setattr(text_files, "PIECE_BYTES", 4000)
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "videos").symlink_to(videos)
        source = internvid(folder, rows)
        source.index = build_video_index(videos, folder / "index")
        build_manifest(source, folder / "clips.jsonl", BuildOptions(False, num_workers, 30, False))
        manifests.append((folder / "clips.jsonl").read_bytes())
    assert manifests[0] == manifests[1]
    records = list(read_manifest(tmp_path / "0" / "clips.jsonl"))
    assert len({record.clip_id for record in records}) == len(records)
    assert records == sorted(records, key=lambda r: (r.video, r.start_seconds, r.end_seconds))


def test_rows_are_sorted_by_code_points_whoever_adds_them(tmp_path):
    names = ["/a", "/a b", "/a\nb", "/a\tb", "/\udcff", "/\ue000", "/\U0001f600", "/\\"]
    records = [
        ClipRecord("abc", "test", name, start, end, caption)
        for name in names
        for start, end in ((0.0, None), (2.0, 10.0), (10.0, 11.0))
        for caption in ("", "\u00e9", "z")
    ]
    drops = [f'{{"reason": "{number * 7919 % 1000}"}}\n' for number in range(100)]
    expected = [
        (record.video, record.to_json())
        for record in sorted(records, key=lambda r: (r.video, r.start_seconds, r.end_seconds or 1e9, r.to_json()))
    ]
    random.Random(0).shuffle(records)
    rows = SortedRows(tmp_path / "rows.sqlite")
    for number in range(0, 100, 10):
        rows.add(map(clip_row, records[number : number + 10]), drops[number : number + 10])
    found = [(video.decode("utf-8", "surrogatepass"), content) for video, _, content in rows.clips()]
    assert found == expected
    assert list(rows.dropped()) == sorted(drops)
    rows.close()


def test_a_full_disk_while_rows_are_sorted_is_told(tmp_path):
    rows = SortedRows(tmp_path / "rows.sqlite")
    row = clip_row(ClipRecord("abc", "test", "/a", 0.0, None, "words " * 3000))
    with full_disk(), pytest.raises(UserError, match=r"rows\.sqlite: .*free space, then run again"):
        rows.add([row] * 3000, [])
    rows.close()


def test_nothing_usable_is_an_error_and_leaves_no_manifest(tmp_path):
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "other.mp4").write_bytes(b"x")
    source = internvid(tmp_path, [row("nowhere____", "00:00:00.000", "00:00:01.000")])
    manifest = tmp_path / "clips.jsonl"
    with pytest.raises(UserError, match=r"no clip can be used \(missing 1; listed in .*clips.dropped.jsonl"):
        build_manifest(source, manifest, UNPROBED)
    assert not manifest.exists()


def test_a_target_that_cannot_be_written_is_named(tmp_path, clip_path):
    videos = tmp_path / "videos"
    videos.mkdir()
    shutil.copy(clip_path, videos)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        build_manifest(CaptionedFolder(str(videos)), tmp_path / "file" / "clips.jsonl", QUIET)


def test_probing_is_not_done_again_after_a_kill(clip_path, tmp_path, monkeypatch):
    videos = tmp_path / "videos"
    videos.mkdir()
    for name in "abc":
        shutil.copy(clip_path, videos / f"{name}.mp4")
    manifest = tmp_path / "clips.jsonl"
    source = CaptionedFolder(str(videos))

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(manifest_module, "dropped_path", killed)
        with pytest.raises(KeyboardInterrupt):
            build_manifest(source, manifest, QUIET)
    assert not manifest.exists()
    first = (working_folder(manifest) / "clips.jsonl").read_bytes()
    # Same size and time, other content: only who opens the file again would notice.
    for path in videos.iterdir():
        status = path.stat()
        path.write_bytes(b"\0" * status.st_size)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    build_manifest(source, manifest, QUIET)
    assert manifest.read_bytes() == first


MEMORY_SCRIPT = """
import resource, sys
from pathlib import Path
from exvideo_train.clips.manifest import BuildOptions, build_manifest
from exvideo_train.clips.sources.panda70m import Panda70M
from exvideo_train.clips.sources.video_index import build_video_index
if __name__ == "__main__":
    folder = Path(sys.argv[1])
    index = build_video_index(folder / "videos", folder / "index")
    source = Panda70M(str(folder / "M.csv"), index, False)
    build_manifest(source, folder / "clips.jsonl", BuildOptions(False, 1, 60, False))
    kilobytes = [resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    print(sum(kilobytes))
"""


def test_memory_does_not_grow_with_the_rows(tmp_path):
    peaks = []
    for rows in (2000, 40000):
        folder = tmp_path / str(rows)
        (folder / "videos").mkdir(parents=True)
        (folder / "videos" / "x__________.mp4").write_bytes(b"x")
        with open(folder / "M.csv", "w") as stream:
            stream.write("videoID,url,timestamp,caption,matching_score\n")
            for number in range(rows):
                stamp = f"{number // 3600}:{number // 60 % 60:02d}:{number % 60:02d}.000"
                stream.write(f"x__________,u,\"[['{stamp}', '99:00:00.000']]\",\"['{'word ' * 80}']\",[0.5]\n")
        script = folder / "script.py"
        script.write_text(MEMORY_SCRIPT)
        done = subprocess.run(
            [sys.executable, str(script), str(folder)], check=True, capture_output=True, text=True, timeout=120
        )
        peaks.append(int(done.stdout))
        assert sum(1 for _ in read_manifest(folder / "clips.jsonl")) == rows
    # 40,000 rows are 20 MB of text; a piece is 4 MB.
    assert peaks[1] - peaks[0] < 60_000, peaks
