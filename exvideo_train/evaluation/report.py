"""``report.html``: one file that opens from disk and asks for nothing outside itself.

Prompts, file names and variants' names come from anywhere and are text. A content security policy holds that twice: it
lets no request leave, and runs no script but the one whose hash it names.
"""

from __future__ import annotations

import base64
import hashlib
import html
import os
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

import exvideo_train
from exvideo_train.evaluation.charts import contact_sheet, curve_chart, data_uri, style_of
from exvideo_train.evaluation.measures import Measure
from exvideo_train.evaluation.page import SCRIPT, STYLE
from exvideo_train.evaluation.run import RESULTS, Evaluation, Measured, verdict_words
from exvideo_train.evaluation.statistics import Comparison
from exvideo_train.evaluation.track import SERIES
from exvideo_train.files import atomic_write_text
from exvideo_train.terminal import escaped

# What browsers play.
_PLAYED = {".mp4": "video/mp4", ".m4v": "video/mp4", ".webm": "video/webm"}
_SERIES_TITLES = {
    "sharpness": "sharpness, levels²",
    "high_band": "share of energy in the high band",
    "luminance": "luminance, levels",
    "saturation": "saturation, levels",
    "change": "change from frame to frame, levels",
    "motion": "motion, diagonals a second",
}
assert set(_SERIES_TITLES) == set(SERIES)


def write_report(path: Path, evaluation: Evaluation) -> None:
    """Write the page, whole or not at all."""
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = (
        "default-src 'none'; img-src data:; media-src data:; style-src 'unsafe-inline'; "
        f"script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    )
    variants = ", ".join(evaluation.options.variants)
    parts = [
        "<!doctype html>\n<html lang=en><head><meta charset=utf-8>",
        f'<meta http-equiv=Content-Security-Policy content="{policy}">',
        "<meta name=viewport content='width=device-width, initial-scale=1'>",
        f"<title>Evaluation: {_text(variants)}</title><style>{STYLE}</style></head><body><main>",
        f"<h1>Evaluation: {_text(variants)}</h1>",
        *_verdicts(evaluation),
        *_curves(evaluation),
        *_pairs(evaluation, path.parent),
        *_reference(evaluation),
        *_left_out(evaluation),
        *_settings(evaluation),
        f"</main><script>{SCRIPT}</script></body></html>",
    ]
    atomic_write_text(path, "\n".join(parts) + "\n")


def _text(value: object) -> str:
    """Text from anywhere, as text."""
    return html.escape(escaped(str(value)))


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def _figure(alternative: str, address: str, caption: str) -> str:
    return f"<figure><img alt='{_text(alternative)}' src='{address}'><figcaption>{_text(caption)}</figcaption></figure>"


def _verdicts(evaluation: Evaluation) -> Iterable[str]:
    by_name = {measure.name: measure for measure in evaluation.measures}
    for variant, comparisons in evaluation.comparisons.items():
        baseline = evaluation.options.baseline
        yield f"<h2>{_text(variant)} against {_text(baseline)}: {len(evaluation.pairs)} pairs</h2>"
        yield (
            "<div class=wide><table><thead><tr><th scope=col>measure<th scope=col>verdict"
            f"<th scope=col>{_text(variant)}<th scope=col>{_text(baseline)}<th scope=col>difference"
            "<th scope=col>95 % interval<th scope=col>p<th scope=col>pairs<th scope=col>real videos</thead><tbody>"
        )
        for comparison in comparisons:
            yield _verdict_row(by_name[comparison.measure], comparison, evaluation.reference)
        yield "</tbody></table></div>"
        missing = [by_name[name].title for name in by_name if name not in {entry.measure for entry in comparisons}]
        if missing:
            yield f"<p>Not measured, as no pair is long enough or has what it takes: {_text(', '.join(missing))}.</p>"
    yield (
        f"<p>{len(evaluation.measures)} measures are tested, each by itself: of twenty that do not differ, one is "
        f"expected to look as if it did. All numbers are in <code>{RESULTS}</code> beside this page.</p>"
    )


def _verdict_row(measure: Measure, comparison: Comparison, reference: list[Measured]) -> str:
    real = [value for video in reference if (value := video.values[measure.name]) is not None]
    interval = f"{_number(comparison.low)} to {_number(comparison.high)}" if comparison.low is not None else "–"
    cells = [
        _number(comparison.mean),
        _number(comparison.baseline_mean),
        f"{comparison.difference:+.4g}",
        interval,
        _number(comparison.p_value),
        str(comparison.num_pairs),
        _number(sum(real) / len(real)) if real else "–",
    ]
    kind = comparison.verdict.split()[0]
    return (
        f"<tr><th scope=row>{_text(measure.title)}<small>{_text(measure.unit)}; good: {measure.better.value}; "
        f"{_text(measure.source)}</small><td class={kind}>{_text(verdict_words(comparison))}"
        + "".join(f"<td>{_text(cell)}" for cell in cells)
    )


def _curves(evaluation: Evaluation) -> Iterable[str]:
    tracks = evaluation.tracks()
    yield "<h2>Over time</h2><p>Mean of all videos; the band is one standard deviation to either side.</p><p class=key>"
    for number, variant in enumerate(tracks):
        color, dashes = style_of(number)
        drawn = {"-": "solid", "--": "dashed", "-.": "double", ":": "dotted"}[dashes]
        yield f"<span><i style='border-top:3px {drawn} {color}'></i> {_text(variant)}</span>"
    yield "</p><div class=charts>"
    for series in SERIES:
        title = _SERIES_TITLES[series]
        yield _figure(f"{title} over time", curve_chart(series, tracks), title)
    yield "</div>"


def _pairs(evaluation: Evaluation, folder: Path) -> Iterable[str]:
    options = evaluation.options
    yield (
        "<h2>Videos</h2><p>The slider moves all videos of a row; arrow keys go by a frame, Page Up and Page Down by "
        "more, Home and End to the ends.</p>"
    )
    room = options.inline_mib * (1 << 20)
    for number, (name, pair) in enumerate(evaluation.pairs.items()):
        first = next(iter(pair.values()))
        room, videos = _videos(pair, folder, room)
        yield f"<section class=pair aria-labelledby=pair{number}><h3 id=pair{number}>{_text(name)}</h3>"
        if first.file.prompt:
            seed = "" if first.file.seed is None else f" <small>seed {first.file.seed}</small>"
            yield f"<p class=prompt>{_text(first.file.prompt)}{seed}</p>"
        yield f"<div class=videos>{videos}</div>"
        track = first.track
        base = options.base_frames if 0 < options.base_frames < track.num_frames else 0
        mark = f"<span class=mark style='left:{100 * (base - 1) / (track.num_frames - 1):.2f}%'></span>" if base else ""
        yield (
            f"<div class=controls><button type=button class=play>Play</button><div class=slide>{mark}"
            f"<input type=range class=scrubber min=0 max={track.num_frames - 1} value=0 data-fps={track.fps:.6g} "
            f"data-base={base} data-latent={options.frames_a_latent} aria-label='frame of {_text(name)}'></div>"
            "<output></output></div>"
        )
        for variant, video in pair.items():
            yield f"<p class=label>{_text(variant)}</p><div class=sheet>"
            for seconds, picture in contact_sheet(video.track):
                label = f"{seconds:.1f} s"
                yield _figure(f"{variant} at {label}", picture, label)
            yield "</div>"
        yield "</section>"


def _videos(pair: dict[str, Measured], folder: Path, room: float) -> tuple[float, str]:
    """The pair's players, or links where a browser cannot play them or the page is full; the room that is left."""
    sizes = [video.file.path.stat().st_size for video in pair.values()]
    plays = all(video.file.path.suffix.lower() in _PLAYED for video in pair.values())
    if not plays or sum(sizes) > room:
        links = []
        for variant, video in pair.items():
            address = Path(os.path.relpath(video.file.path.resolve(), folder.resolve())).as_posix()
            links.append(f"<p class=label>{_text(variant)}: {_link(address)}</p>")
        why = "the page holds no more of them (inline_mib)" if plays else "browsers do not play them"
        return room, f"<p>Videos outside this page, as {why}:</p>" + "".join(links)
    players = []
    for variant, video in pair.items():
        kind = _PLAYED[video.file.path.suffix.lower()]
        source = data_uri(video.file.path.read_bytes(), kind)
        players.append(
            f"<figure><video muted playsinline preload=auto src='{source}' aria-label='{_text(variant)}'></video>"
            f"<figcaption>{_text(variant)}</figcaption></figure>"
        )
    return room - sum(sizes), "".join(players)


def _link(address: str) -> str:
    from urllib.parse import quote

    # A relative address that begins with ./ can be taken for no scheme.
    return f"<a href='./{quote(address, errors='surrogateescape')}'>{_text(address)}</a>"


def _reference(evaluation: Evaluation) -> Iterable[str]:
    if not evaluation.reference:
        return
    yield f"<h2>Real videos: {len(evaluation.reference)}</h2>"
    for video in evaluation.reference[:12]:
        yield f"<p class=label>{_text(video.file.path.name)}</p><div class=sheet>"
        for seconds, picture in contact_sheet(video.track):
            yield _figure(f"at {seconds:.1f} s", picture, f"{seconds:.1f} s")
        yield "</div>"


def _left_out(evaluation: Evaluation) -> Iterable[str]:
    if evaluation.left_out:
        yield f"<h2>Left out: {len(evaluation.left_out)}</h2><ul>"
        yield from (f"<li>{_text(line)}</li>" for line in evaluation.left_out)
        yield "</ul>"


def _settings(evaluation: Evaluation) -> Iterable[str]:
    yield "<h2>Settings</h2><table><tbody>"
    for name, value in asdict(evaluation.options).items():
        items = value.items() if isinstance(value, dict) else [("", value)]
        for key, item in items:
            yield f"<tr><th scope=row>{_text(f'{name}.{key}' if key else name)}<td class=setting>{_text(item)}"
    yield f"<tr><th scope=row>version<td class=setting>{exvideo_train.__version__}</tbody></table>"
