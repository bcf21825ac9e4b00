"""The options of the two commands that turn downloads into clips: build_manifest and filter_clips."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Annotated

from omegaconf import MISSING

from exvideo_train.config.experiment import Experiment
from exvideo_train.config.options import Options, Range


class SourceKind(Enum):
    """The kind of data set that a manifest is built from."""

    internvid = "internvid"
    panda70m = "panda70m"
    webdataset = "webdataset"
    folder = "folder"


class VideoLayout(Enum):
    """What a file named by a source video's id holds."""

    auto = "auto"
    whole = "whole"
    cut = "cut"


@dataclass
class BuildManifest(Options):
    source: SourceKind = MISSING
    """internvid (JSON lines), panda70m (CSV), webdataset (video2dataset output: folders or .tar shards), folder
    (name.txt beside name.mp4, or a table given as metadata)."""
    videos: str | None = None
    """Folder of the videos, searched with its subfolders. Required but for source=folder with a table, whose relative
    paths are then relative to the table. Nothing outside this folder is used, nor outside the table's where it is not
    given: a table of absolute paths needs the folder that holds them all, if need be videos=/."""
    follow_links: bool = False
    """Follow links that lead out of the folder, for folders of links that are your own. false counts and lists them:
    in data of others, caption.txt may be a link to any file of yours."""
    metadata: str | None = None
    """The data set's metadata file, or a quoted glob pattern: JSON lines for internvid, CSV for panda70m, CSV or JSON
    lines for folder. Not used by webdataset."""
    manifest: str = MISSING
    """Manifest to write, JSON lines. What did not enter it is listed beside it, in NAME.dropped.jsonl."""
    video_layout: VideoLayout = VideoLayout.auto
    """What a file VIDEO_ID.mp4 holds: the whole source video, or the clip cut out already. auto takes files named
    VIDEO_ID_START_END for cut ones, and others for whole ones unless probing finds them as long as the span and too
    short for its end."""
    path_column: str = "path"
    """Column of the video's path in a table (source=folder)."""
    caption_column: str = "caption"
    """Column of the caption in a table (source=folder)."""
    probe: bool = True
    """Open every video for its rate, size, length and codec, and drop what cannot be opened. false leaves this to
    filter_clips and takes a minute for a million rows."""
    num_workers: Annotated[int, Range(0)] = 0
    """Processes; 0 takes one for each core."""
    timeout_seconds: Annotated[float, Range(above=0)] = 60.0
    """Seconds that probing one video may take before its process is killed and the video dropped."""


@dataclass
class FilterThresholds(Options, group="filter"):
    max_fps: float = 0.0
    """Frames a second at which clips too short for the experiment's rate may be sampled instead; 0 allows none. With
    129 frames, 16 admits 8 s clips. A clip gets the least rate that fits it."""
    max_duration_seconds: float = 0.0
    """Longest span; 0 has no limit."""
    min_source_fps: float = 0.0
    """Least frame rate of the video; 0 asks for at least the sampling rate, below which frames would repeat."""
    min_short_side: int = 0
    """Least length of the shorter side in pixels; 0 takes the experiment's shorter side: nothing is enlarged."""
    min_aspect: float = 1.2
    """Least width/height. A centre crop to 3:2 keeps 80 % of a 1.2:1 picture; upright videos lose more than half."""
    max_aspect: float = 2.4
    """Greatest width/height; cinema scope is 2.39."""
    min_scores: dict[str, float] = field(default_factory=lambda: {"aesthetic": 4.0, "umt": 0.2, "matching": 0.3})
    """Least value of each score of the data set; a clip without a score passes. Scores are aesthetic, umt, matching,
    desirable (Panda-70M's own verdict, 0 or 1)."""
    max_cuts: int = 0
    """Scene cuts allowed inside the frames used: a cut in a clip teaches the model to cut."""
    cut_threshold: float = 3.0
    """How many times a cut's change exceeds that of the frames around it."""
    min_cut_content: float = 15.0
    """Least mean change of a cut in levels 0..255."""
    min_motion: float = 1.5
    """Least mean change between frames a half second apart, in grey levels 0..255; stills with noise are near 1."""
    max_frozen_share: float = 0.3
    """Largest share of half seconds in which the picture does not change at all."""
    max_black_share: float = 0.05
    """Largest share of frames that are black."""
    max_letterbox_share: float = 0.04
    """Largest share of the cropped picture's area that black bars may take."""
    near_duplicate_distance: int = 6
    """Bits of 192 in which the perceptual hashes of two clips may differ and still be duplicates; -1 keeps all."""
    min_caption_words: int = 3
    """Least number of words in the caption; 0 lets empty ones pass."""


@dataclass
class FilterClips(Experiment):
    manifest: str = MISSING
    """Manifest of build_manifest, or of an earlier filtering."""
    output: str = MISSING
    """Manifest of the kept clips. NAME.dropped.jsonl lists the others with reasons, NAME.report.html shows both."""
    filter: FilterThresholds = field(default_factory=FilterThresholds)
    """Thresholds."""
    num_workers: Annotated[int, Range(0)] = 0
    """Processes; 0 takes one for each core."""
    timeout_seconds: Annotated[float, Range(above=0)] = 300.0
    """Seconds that judging one clip may take before its process is killed and the clip dropped."""
    contact_sheet_clips: int = 24
    """Random clips shown in the report, of those kept and of those dropped each."""
