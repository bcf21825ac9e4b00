"""Which videos are found in folders of any origin, and which belong together. The files need not be videos for that."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from exvideo_train.errors import UserError
from exvideo_train.evaluation.folders import find_videos, pair_videos


def touch(folder: Path, *names: str) -> Path:
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).write_bytes(b"")
    return folder


def sampled(folder: Path, **videos: tuple) -> Path:
    """Videos as sampling leaves them: stem -> (prompt, seed)."""
    touch(folder, *(f"{stem}.mp4" for stem in videos))
    for stem, (prompt, seed) in videos.items():
        (folder / f"{stem}.json").write_text(json.dumps({"prompt": prompt, "seed": seed, "variant": folder.name}))
    return folder


def paired(**folders: Path) -> tuple[dict, list[str]]:
    return pair_videos({name: find_videos(name, folder, name) for name, folder in folders.items()})


def test_files_pair_by_name_whatever_their_suffix_and_the_rest_is_told(tmp_path):
    one = touch(tmp_path / "a", "x.mp4", "y.mp4", "z.webm", "notes.txt", ".hidden.mp4")
    two = touch(tmp_path / "b", "y.mkv", "x.mp4")
    pairs, left_over = paired(one=one, two=two)
    assert {name: (pair["one"].path.name, pair["two"].path.name) for name, pair in pairs.items()} == {
        "x": ("x.mp4", "x.mp4"),
        "y": ("y.mp4", "y.mkv"),
    }
    assert left_over == [f"{one}/z.webm: one alone has it"]


def test_samples_pair_by_prompt_and_seed_and_not_by_name(tmp_path):
    with_it = sampled(tmp_path / "a", one=("sea", 6), two=("hill", 7))
    without = sampled(tmp_path / "b", one=("hill", 7), two=("sea", 8))
    pairs, left_over = paired(one=with_it, two=without)
    (pair,) = pairs.values()
    assert (pair["one"].prompt, pair["one"].seed, pair["two"].path.name) == ("hill", 7, "one.mp4")
    assert len(left_over) == 2  # the sea of another seed is another video


def test_an_output_folder_of_sampling_holds_every_variant(tmp_path):
    for variant in ("with_adapter", "without_adapter", "side_by_side"):
        sampled(tmp_path / variant, **{"sea-1": ("sea", 6), "sea-2": ("sea", 6)})
    pairs, left_over = pair_videos({name: find_videos(name, tmp_path, name) for name in ("with", "without")})
    assert pairs["sea-1"]["with"].path == tmp_path / "with_adapter" / "sea-1.mp4"
    assert pairs["sea-1"]["without"].path == tmp_path / "without_adapter" / "sea-1.mp4"
    assert len(pairs) == 2  # of equal prompts the first goes with the first
    assert not left_over
    with pytest.raises(UserError, match="holds no video"):
        find_videos("variants.other", tmp_path, "other")


def test_a_record_of_another_program_says_nothing(tmp_path):
    touch(tmp_path / "a", "x.mp4")
    (tmp_path / "a" / "x.json").write_text('{"prompt": 3, "boxes": []}')
    (video,) = find_videos("with", tmp_path / "a", "with")
    assert (video.stem, video.prompt, video.seed) == ("x", "", None)


REFUSED = {
    "no folder": (lambda folder: folder / "none", "no such folder"),
    "empty folder": (lambda folder: folder, "holds no video"),
    "no JSON": (lambda folder: _record(folder, "{"), "a.json: cannot be read"),
    "prompt of numbers": (lambda folder: sampled(folder, a=(3, 6)), "prompt=3"),
    "seed of text": (lambda folder: sampled(folder, a=("a", "6")), "seed='6'"),
    "record is a folder": (lambda folder: touch(touch(folder, "a.mp4") / "a.json").parent, "not a regular file"),
}


def _record(folder: Path, text: str) -> Path:
    (touch(folder, "a.mp4") / "a.json").write_text(text)
    return folder


@pytest.mark.parametrize("case", REFUSED)
def test_refused_folders_are_named(tmp_path, case):
    make, says = REFUSED[case]
    with pytest.raises(UserError) as refusal:
        find_videos("with", make(tmp_path), "with")
    assert says in str(refusal.value)
    assert str(tmp_path) in str(refusal.value)


def test_links_out_of_the_folder_are_followed_only_on_request(tmp_path):
    one, two = touch(tmp_path / "a"), touch(tmp_path / "b", "x.mp4")
    (one / "x.mp4").symlink_to(two / "x.mp4")
    with pytest.raises(UserError, match=r"a/x\.mp4 is a link out of the folder; follow_links=true"):
        find_videos("with", one, "with")
    assert [video.stem for video in find_videos("with", one, "with", follow_links=True)] == ["x"]


def test_no_counterparts_and_two_of_one_name(tmp_path):
    one, two = touch(tmp_path / "a", "x.mp4"), touch(tmp_path / "b", "y.mp4")
    with pytest.raises(UserError, match=r"no two videos belong together by file name.*x\.mp4.*y\.mp4"):
        paired(one=one, two=two)
    touch(one, "x.webm")
    with pytest.raises(UserError, match="have one name"):
        paired(one=one, two=two)
