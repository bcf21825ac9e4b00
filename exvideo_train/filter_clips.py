"""The command that chooses the clips of a manifest that are fit for an experiment."""

from __future__ import annotations

from pathlib import Path

from exvideo_train.clips.filtering import filter_dropped_path, filter_manifest, journal_path
from exvideo_train.clips.judging import FilterOptions
from exvideo_train.clips.report import ReportBuilder, report_path
from exvideo_train.config.clips import FilterClips
from exvideo_train.entry import run_command
from exvideo_train.errors import UserError

USAGE = """
Choose the clips of a manifest that are long, uncut, moving and unique enough for an experiment.

python data_prep/filter_clips.py +exp=129f manifest=clips.jsonl output=kept.jsonl
python data_prep/filter_clips.py +exp=129f manifest=clips.jsonl output=kept.jsonl filter.max_fps=16 filter.min_motion=2
"""


def run(config: FilterClips) -> None:
    """Filter, print the table, write the report."""
    manifest, output = Path(config.manifest), Path(config.output)
    if output.is_dir():
        raise UserError(f"output={output} is a folder; give a file name such as {output / 'kept.jsonl'}")
    if not config.timeout_seconds > 0:
        raise UserError(f"timeout_seconds={config.timeout_seconds}: must be positive")
    if config.num_workers < 0:
        raise UserError(f"num_workers={config.num_workers}: must be 0 (one a core) or more")
    output.parent.mkdir(parents=True, exist_ok=True)
    options = FilterOptions(config.geometry, config.filter, config.num_workers, config.timeout_seconds)
    builder = ReportBuilder(config.contact_sheet_clips, config.seed)
    try:
        report = filter_manifest(manifest, output, options, builder.see)
    except UserError:
        # Nothing kept is when a person needs the histograms most.
        if builder.num_seen:
            builder.write(report_path(output), options)
            print(f"report:   {report_path(output)}")
        raise
    builder.write(report_path(output), options, report)
    print("\n".join(report.lines()))
    print(f"kept:     {output}\ndropped:  {filter_dropped_path(output)}\nreport:   {report_path(output)}")
    print(f"measures: {journal_path(output)} (kept, so that other thresholds need no decoding)")


def main() -> None:
    run_command(FilterClips, run, "filter_clips", USAGE)


if __name__ == "__main__":
    main()
