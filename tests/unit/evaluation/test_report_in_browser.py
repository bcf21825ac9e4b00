"""The report in a real headless Chromium.

Needs Playwright (``pip install -e '.[browser]' -c constraints.txt``, as ``make setup`` does) and a ``chromium`` on the
path (Debian: ``apt-get install chromium``, as ``.ci/run`` does). Skipped without, unless ``EXVIDEO_TEST_BROWSER=1``.
"""

from __future__ import annotations

import os
import shutil
import time

import numpy as np
import pytest
from support.videos import make_video

from exvideo_train.config.evaluation import Evaluate
from exvideo_train.evaluation.folders import VideoFile
from exvideo_train.evaluation.measures import make_measures, measure_track
from exvideo_train.evaluation.reading import Reading, read_frames
from exvideo_train.evaluation.report import write_report
from exvideo_train.evaluation.run import Evaluation, Measured
from exvideo_train.evaluation.track import track_video

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
NUM_FRAMES, FPS, BASE_FRAMES = 13, 8, 5
HOSTILE = "<script>document.title='taken'</script><img src=http://127.0.0.1:9/x onerror=\"document.title='taken'\">"


def the_browser():
    """Playwright; without it or Chromium the report goes untested, which is said loudly."""
    try:
        from playwright import sync_api
    except ImportError:
        missing = "Playwright is not installed: pip install -e '.[browser]' -c constraints.txt"
    else:
        if CHROMIUM is not None:
            return sync_api
        missing = "no chromium on the path: apt-get install chromium"
    reason = f"NOT TESTED: keys, players, layout and content security policy of report.html, as {missing}"
    if os.environ.get("EXVIDEO_TEST_BROWSER") == "1":
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    playwright = the_browser()
    folder = tmp_path_factory.mktemp("report")
    measures = make_measures(10.0)
    pair = {}
    for number, variant in enumerate(("with", "without")):
        frames = [np.full((64, 96, 3), 20 * index + number, np.uint8) for index in range(NUM_FRAMES)]
        path = make_video(folder / f"{variant}.mp4", frames, fps=FPS)
        track = track_video(read_frames(str(path), Reading(0.0, None, 99)), 0.25)
        pair[variant] = Measured(VideoFile(path, "x", HOSTILE, 6), track, measure_track(track, measures))
    options = Evaluate(variants={"with": "a", "without": "b"}, output=str(folder), base_frames=BASE_FRAMES)
    write_report(folder / "report.html", Evaluation(options, measures, {"x": pair}, [], {"with": []}, []))
    with playwright.sync_playwright() as runner:
        browser = runner.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        opened = browser.new_page(viewport={"width": 1000, "height": 800})
        opened.requests, opened.errors = [], []
        opened.on("request", lambda request: opened.requests.append(request.url))
        opened.on("pageerror", lambda error: opened.errors.append(str(error)))
        opened.goto((folder / "report.html").as_uri())
        yield opened
        browser.close()


def seconds_shown(page):
    """Where each video stands, once all have arrived. Polled from here: the page's policy allows no evaluated text."""
    state = "[...document.querySelectorAll('video')].map(v => v.readyState < 2 || v.seeking ? -1 : v.currentTime)"
    deadline = time.monotonic() + 60
    while (shown := page.evaluate(state)).count(-1) and time.monotonic() < deadline:
        time.sleep(0.05)
    return shown


def test_keys_move_both_videos_by_a_frame(page):
    scrubber, output = page.locator(".scrubber"), page.locator("output")
    scrubber.focus()
    page.keyboard.press("Home")
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    assert seconds_shown(page) == pytest.approx([3.5 / FPS] * 2)
    assert output.text_content() == f"frame 4 of {NUM_FRAMES}, 0.38 s, latent frame 2"
    page.keyboard.press("End")
    assert seconds_shown(page) == pytest.approx([(NUM_FRAMES - 0.5) / FPS] * 2)
    assert "latent frame 4, beyond the base's 5 frames" in output.text_content()
    assert scrubber.get_attribute("aria-valuetext") == output.text_content()


def test_play_goes_on_by_itself_to_the_end_and_stops(page):
    page.locator(".scrubber").focus()
    page.keyboard.press("Home")
    page.keyboard.press("Tab" if page.locator(".play:focus").count() else "Shift+Tab")
    page.keyboard.press("Enter")
    deadline = time.monotonic() + 60
    while page.locator(".play").text_content() == "Pause" and time.monotonic() < deadline:
        time.sleep(0.1)
    assert page.locator(".scrubber").input_value() == str(NUM_FRAMES - 1)
    assert len(set(seconds_shown(page))) == 1


def test_nothing_runs_and_nothing_leaves(page):
    assert page.title() == "Evaluation: with, without"
    assert HOSTILE in page.locator(".prompt").text_content()
    outside = [url for url in page.requests if not url.startswith(("data:", "blob:"))]
    assert len(outside) == 1  # the page itself
    assert not page.errors


def test_fits_a_phone_and_prints_contact_sheets(page):
    page.set_viewport_size({"width": 380, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= 380
    page.emulate_media(media="print")
    assert not page.locator(".videos").is_visible()
    assert page.locator(".sheet").first.is_visible()
    page.emulate_media(media="screen")
