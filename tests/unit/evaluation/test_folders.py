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


def sampled(folder: Path, samples: list, settings: object = None) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "samples.json").write_text(json.dumps({"settings": settings or {"seed": 6}, "samples": samples}))
    return folder


def sample(prompt: str, files: dict, **more: object) -> dict:
    return {"prompt": prompt, "files": files, **more}


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


def test_samples_pair_by_prompt_and_seed_and_not_by_number(tmp_path):
    with_it = sampled(
        tmp_path / "a", [sample("sea", {"video": "000.mp4"}), sample("hill", {"video": "001.mp4"}, seed=7)]
    )
    without = sampled(
        tmp_path / "b", [sample("hill", {"video": "000.mp4"}, seed=7), sample("sea", {"video": "001.mp4"}, seed=8)]
    )
    pairs, left_over = paired(one=with_it, two=without)
    (pair,) = pairs.values()
    assert (pair["one"].prompt, pair["one"].seed, pair["two"].path.name) == ("hill", 7, "000.mp4")
    assert len(left_over) == 2  # the sea of another seed is another video


def test_one_folder_of_compared_samples_holds_both_variants(tmp_path):
    files = {"with_adapter": "000_with_adapter.mp4", "without_adapter": "000_without_adapter.mp4"}
    files |= {"side_by_side": "000_side_by_side.mp4", "contact_sheet": "000_frames.png"}
    folder = sampled(tmp_path / "a", [sample("sea", files), sample("sea", {**files, "with_adapter": "001.mp4"})])
    pairs, left_over = pair_videos({name: find_videos(name, folder, name) for name in ("with", "without")})
    assert pairs["000"]["with"].path.name == "000_with_adapter.mp4"
    assert pairs["000"]["without"].path.name == "000_without_adapter.mp4"
    assert len(pairs) == 2  # of equal prompts the first goes with the first
    assert not left_over
    with pytest.raises(UserError, match="none of them called other"):
        find_videos("variants.other", folder, "other")


REFUSED = {
    "no folder": (lambda folder: folder / "none", "no such folder"),
    "empty folder": (lambda folder: folder, "holds no video"),
    "no JSON": (lambda folder: _index(folder, "{"), "samples.json: not what"),
    "a list": (lambda folder: _index(folder, "[]"), "samples.json: not what"),
    "no settings": (lambda folder: _index(folder, '{"samples": []}'), "samples.json: not what"),
    "files of numbers": (lambda folder: sampled(folder, [sample("a", {"video": 3})]), "file 3 is no plain name"),
    "another folder": (lambda folder: sampled(folder, [sample("a", {"video": "../../a.mp4"})]), "no plain name"),
    "from the root": (lambda folder: sampled(folder, [sample("a", {"video": "/etc/passwd"})]), "no plain name"),
    "prompt of numbers": (lambda folder: sampled(folder, [sample(3, {"video": "a.mp4"})]), "prompt=3"),
    "seed of text": (lambda folder: sampled(folder, [sample("a", {"video": "a.mp4"}, seed="6")]), "seed='6'"),
    "no variant": (lambda folder: sampled(folder, [sample("a", {})]), "no variant"),
    "index is a folder": (lambda folder: touch(folder / "samples.json").parent, "not a regular file"),
}


def _index(folder: Path, text: str) -> Path:
    (folder / "samples.json").write_text(text)
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
