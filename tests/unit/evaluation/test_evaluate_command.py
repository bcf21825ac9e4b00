"""The command as users run it, and its report as a parser and a browser see it."""

from __future__ import annotations

import json
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from support.videos import make_video
from support.wandb_file import read_history
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from exvideo_train.config.evaluation import Evaluate
from exvideo_train.errors import UserError
from exvideo_train.evaluation.measures import make_measures
from exvideo_train.evaluation.report import write_report
from exvideo_train.evaluation.run import evaluate_folders

HOSTILE = "<script>document.title='taken'</script>'\"><img src=x onerror=alert(1)> $x^2$ \x1b[2J"
NUM_PAIRS, NUM_FRAMES, FPS = 6, 17, 8


def frames(seed, num_frames=NUM_FRAMES, height=64, width=96):
    """Noise that moves by two pixels a frame."""
    wide = np.random.default_rng(seed).integers(0, 255, (height, width + 2 * num_frames, 3), np.uint8)
    return [wide[:, 2 * index : 2 * index + width] for index in range(num_frames)]


def soft(pictures):
    """Losing detail from frame to frame."""
    import cv2

    return [cv2.GaussianBlur(picture, (0, 0), 0.1 + 0.1 * index) for index, picture in enumerate(pictures)]


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """Folder of a finished run over six pairs, with a seventh that is damaged."""
    root = tmp_path_factory.mktemp("evaluate")
    for variant in ("with", "without, 'it'"):
        folder = root / variant
        folder.mkdir()
        for number in range(NUM_PAIRS):
            pictures = frames(number)
            make_video(folder / f"{number:03d}.mp4", pictures if variant == "with" else soft(pictures), fps=FPS)
        names = [f"{number:03d}.mp4" for number in range(NUM_PAIRS + 1)]
        for name in names:
            record = {"prompt": f"{HOSTILE} {name}", "seed": 6, "variant": variant}
            (folder / name).with_suffix(".json").write_text(json.dumps(record))
        (folder / names[-1]).write_bytes((folder / names[0]).read_bytes())
    damaged = root / "with" / names[-1]
    damaged.write_bytes(damaged.read_bytes()[:-3000])
    options = [f"with={root / 'with'}", f"without={root}/without, 'it'", f"output={root / 'out'}", "base_frames=9"]
    options += ["num_workers=1", "logger=wandb", "logger.tensorboard=true"]
    result = subprocess.run(
        [sys.executable, "-m", "exvideo_train.evaluate", *options],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=root,
    )
    assert result.returncode == 0, result.stderr
    return root, result


class Page(HTMLParser):
    """Every tag with its attributes, and all text outside scripts and styles."""

    def __init__(self, content):
        super().__init__()
        self.tags, self.text, self._inside = [], "", ""
        self.feed(content)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._inside = tag

    def handle_data(self, data):
        if self._inside not in ("script", "style"):
            self.text += data


@pytest.fixture(scope="module")
def page(report):
    return Page((report[0] / "out" / "report.html").read_text(encoding="utf-8"))


def test_the_lost_detail_is_told(report):
    root, result = report
    content = json.loads((root / "out" / "results.json").read_text())
    verdicts = {entry["measure"]: entry["verdict"] for entry in content["comparisons"]["with"]}
    assert {verdicts[name] for name in ("sharpness", "sharpness_kept", "high_band_slope")} == {"better"}
    assert verdicts["cuts"] == "not to be told"
    assert set(content["measures"]) == {measure.name for measure in make_measures(10)}
    video = content["pairs"]["000"]["with"]
    assert (video["num_frames"], video["fps"], video["seed"]) == (NUM_FRAMES, FPS, 6)
    assert len(video["series"]["sharpness"]) == NUM_FRAMES
    assert "sharpness_kept" in result.stdout


def test_wandb_and_tensorboard_get_the_figures_of_the_report(report):
    root, _ = report
    content = json.loads((root / "out" / "results.json").read_text())
    (entry,) = [entry for entry in content["comparisons"]["with"] if entry["measure"] == "sharpness"]
    first = [content["pairs"][name]["with"]["series"]["sharpness"][0] for name in content["pairs"]]
    events = EventAccumulator(str(root / "out" / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    (offline,) = (root / "out" / "wandb").glob("offline-run-*/*.wandb")
    history = read_history(offline)
    for name, value in {
        "measures/with/sharpness": entry["mean"],
        "measures/without/sharpness": entry["baseline_mean"],
        "differences/with/sharpness/difference": entry["difference"],
        "differences/with/sharpness/high": entry["high"],
        "curves/with/sharpness": np.mean(first),
    }.items():
        assert events.Scalars(name)[0].value == pytest.approx(value), name
        assert history[0][name] == pytest.approx(value), name
    curve = events.Scalars("curves/with/luminance")
    assert [point.step for point in (curve[0], curve[-1])] == [0, 1000 * (NUM_FRAMES - 1) // FPS]
    assert history[-1]["curves/seconds"] == (NUM_FRAMES - 1) / FPS
    (verdicts,) = events.Tensors("verdicts/with against without/text_summary")
    assert "| sharpness_kept | better |" in verdicts.tensor_proto.string_val[0].decode()


def test_a_damaged_video_costs_its_pair_and_is_named(report):
    root, result = report
    content = json.loads((root / "out" / "results.json").read_text())
    assert len(content["pairs"]) == NUM_PAIRS
    (line,) = content["left_out"]
    assert str(root / "with" / "006.mp4") in line
    assert line in result.stderr


def test_names_and_prompts_are_text_in_the_report(page):
    assert "<script>document.title='taken'</script>" in page.text
    assert "$x^2$" in page.text
    assert "\x1b" not in page.text
    assert [attributes for tag, attributes in page.tags if tag == "script"] == [{}]
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)


def test_nothing_in_the_report_leaves_it(page):
    addresses = [
        value
        for _, attributes in page.tags
        for name, value in attributes.items()
        if name in ("src", "href", "srcset", "poster", "data", "action")
    ]
    assert len(addresses) > 2 * NUM_PAIRS
    assert all(address.startswith("data:") for address in addresses)


def test_a_full_page_links_its_videos(report):
    root, _ = report
    options = Evaluate(
        variants={"with": str(root / "with"), "without": str(root / "without, 'it'")},
        output=str(root / "links"),
        num_workers=1,
        inline_mib=0.01,
    )
    write_report(root / "links" / "report.html", evaluate_folders(options))
    page = Page((root / "links" / "report.html").read_text(encoding="utf-8"))
    links = [attributes["href"] for tag, attributes in page.tags if tag == "a"]
    assert len(links) == 2 * NUM_PAIRS
    assert "./../without%2C%20%27it%27/000.mp4" in links
    assert "video" not in [tag for tag, _ in page.tags]


UNEQUAL = {
    "size": ({"height": 48}, {}, "64x96 and 48x96", "make both at one size"),
    "length": ({"num_frames": 9}, {}, "17 and 9 frames", "shorten=true"),
    "rate": ({}, {"fps": 16}, "8 and 16 frames a second", "fps=8"),
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sound")
    make_video(folder / "x.mp4", frames(0), fps=FPS)
    return folder


@pytest.mark.parametrize("case", UNEQUAL)
def test_unequal_videos_are_named_with_a_remedy(tmp_path, sound, case):
    picture, encoding, *says = UNEQUAL[case]
    make_video(tmp_path / "x.mp4", frames(0, **picture), **{"fps": FPS, **encoding})
    folders = {"with": str(sound), "without": str(tmp_path)}
    with pytest.raises(UserError) as refusal:
        evaluate_folders(Evaluate(variants=folders, output="unused", num_workers=1))
    for words in (*says, str(sound / "x.mp4"), str(tmp_path / "x.mp4")):
        assert words in str(refusal.value)
    remedy = {"length": {"shorten": True}, "rate": {"fps": 8.0, "shorten": True}}.get(case)
    if remedy:
        result = evaluate_folders(Evaluate(variants=folders, output="unused", num_workers=1, **remedy))
        lengths = {variant: video.track.num_frames for variant, video in result.pairs["x"].items()}
        assert lengths["with"] == lengths["without"] == (9 if case == "length" else 8)
