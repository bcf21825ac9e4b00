"""The command that chooses the clips of a manifest that are fit for an experiment."""

from __future__ import annotations

from pathlib import Path

from exvideo_train.clips.filter_page import FilterPage
from exvideo_train.clips.filtering import filter_manifest
from exvideo_train.clips.judging import FilterOptions
from exvideo_train.clips.target import dropped_path, hold_target, measures_path, report_path
from exvideo_train.config.clips import FilterClips
from exvideo_train.entry import run_command

USAGE = """
Choose the clips of a manifest that are long, uncut, moving and unique enough for an experiment.

python data_prep/filter_clips.py +exp=129f manifest=clips.jsonl output=kept.jsonl
python data_prep/filter_clips.py +exp=129f manifest=clips.jsonl output=kept.jsonl filter.max_fps=16 filter.min_motion=2
"""


def run(config: FilterClips) -> None:
    """Filter and print the table."""
    manifest, output = Path(config.manifest), Path(config.output)
    options = FilterOptions(config.geometry, config.filter, config.num_workers, config.timeout_seconds)
    page = FilterPage(config.contact_sheet_clips, config.seed)
    with hold_target("output", output, {"manifest": [manifest]}):
        report = filter_manifest(manifest, output, options, page)
    print("\n".join(report.lines()))
    print(f"kept:     {output}\ndropped:  {dropped_path(output)}\nreport:   {report_path(output)}")
    print(f"measures: {measures_path(output)} (kept, so that other thresholds need no decoding)")


def main() -> None:
    run_command(FilterClips, run, "filter_clips", USAGE)


if __name__ == "__main__":
    main()
