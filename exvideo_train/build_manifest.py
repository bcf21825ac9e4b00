"""The command that turns a data set's metadata and videos into a manifest of clips."""

from __future__ import annotations

import glob
import os
from fnmatch import fnmatch
from pathlib import Path

from exvideo_train.clips.manifest import BuildOptions, build_manifest, clear_working_folder
from exvideo_train.clips.sources.base import Source, metadata_files, videos_folder
from exvideo_train.clips.sources.folder import CaptionedFolder, CaptionTable
from exvideo_train.clips.sources.internvid import InternVid
from exvideo_train.clips.sources.panda70m import Panda70M
from exvideo_train.clips.sources.video_index import VideoIndex, build_video_index
from exvideo_train.clips.sources.webdataset import WebDataset
from exvideo_train.clips.target import dropped_path, hold_target, outputs, working_folder
from exvideo_train.config.clips import BuildManifest, SourceKind, VideoLayout
from exvideo_train.entry import run_command
from exvideo_train.errors import UserError

USAGE = """
Build the manifest of clips from a data set's metadata and its downloaded videos.

python data_prep/build_manifest.py source=internvid metadata=M.jsonl videos=DIR manifest=clips.jsonl
python data_prep/build_manifest.py source=panda70m metadata=M.csv videos=DIR manifest=clips.jsonl probe=false
python data_prep/build_manifest.py source=webdataset videos=DIR manifest=clips.jsonl
python data_prep/build_manifest.py source=folder videos=DIR manifest=clips.jsonl
"""


def run(config: BuildManifest) -> None:
    """Build the manifest and print what became of the rows."""
    manifest = Path(config.manifest)
    options = BuildOptions(config.probe, config.num_workers, config.timeout_seconds)
    with hold_target("manifest", manifest, _inputs(config, manifest)):
        try:
            report = build_manifest(make_source(config, manifest), manifest, options)
        except UserError:
            clear_working_folder(manifest)
            raise
        except OSError as error:
            raise UserError(f"{error.filename or manifest}: {error.strerror}; repair it, then run again") from error
    print("\n".join(report.lines()))
    print(f"manifest: {manifest}\ndropped:  {dropped_path(manifest)}")


def _inputs(config: BuildManifest, manifest: Path) -> dict[str, list[Path]]:
    """Files that are read; of a pattern also what this run would write and the next one read."""
    if not config.metadata or config.source is SourceKind.webdataset:
        return {}
    paths = metadata_files(config.metadata)
    folder, pattern = os.path.split(config.metadata)
    folders = [] if Path(config.metadata).exists() else map(os.path.realpath, glob.glob(folder or "."))
    if os.path.realpath(manifest.parent) in folders:
        paths += [path for path in outputs(manifest) if fnmatch(path.name, pattern)]
    return {"metadata": paths}


def make_source(config: BuildManifest, manifest: Path) -> Source:
    """The source that the options describe.

    Raises:
        UserError: an option is missing or names nothing.
    """
    if config.source is SourceKind.webdataset:
        return WebDataset(_given("videos", config.videos, config), config.follow_links)
    if config.source is SourceKind.folder:
        if config.metadata is None:
            return CaptionedFolder(_given("videos", config.videos, config), config.follow_links)
        columns = config.path_column, config.caption_column
        return CaptionTable(config.metadata, config.videos, *columns, config.follow_links)
    metadata = _given("metadata", config.metadata, config)
    cut = None if config.video_layout is VideoLayout.auto else config.video_layout is VideoLayout.cut
    index = _index(_given("videos", config.videos, config), manifest, config.follow_links)
    return (InternVid if config.source is SourceKind.internvid else Panda70M)(metadata, index, cut)


def _given(option: str, value: str | None, config: BuildManifest) -> str:
    if not value:
        raise UserError(f"source={config.source.name} needs {option}=...; --help says what it is")
    return value


def _index(videos: str, manifest: Path, follow_links: bool) -> VideoIndex:
    folder = videos_folder(videos)
    index = build_video_index(folder, working_folder(manifest) / "index", follow_links)
    if index.num_files == 0:
        raise UserError(f"videos={videos} holds no video file; give the folder of the downloaded videos")
    return index


def main() -> None:
    run_command(BuildManifest, run, "build_manifest", USAGE)


if __name__ == "__main__":
    main()
