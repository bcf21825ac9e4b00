"""What several files of tests encode once, in real processes."""

import sys

import pytest
from support.encoding import REPOSITORY, SCRIPT, arguments, finish, identity, record_of

from exvideo_train.clips.record import write_manifest


@pytest.fixture(scope="session")
def data(tmp_path_factory, clip_path):
    """A manifest with 6 good clips, 3 captions and several kinds of bad input."""
    folder = tmp_path_factory.mktemp("data")
    good = [record_of(clip_path, 0.4 * n, f"caption {n // 2}") for n in range(6)]
    (folder / "text.mp4").write_text("this is not a video")
    (folder / "empty.mp4").touch()
    (folder / "cut.mp4").write_bytes(clip_path.read_bytes()[:20_000])
    bad = [
        record_of(folder / "missing.mp4", 0, "x"),
        record_of(folder / "text.mp4", 0, "x"),
        record_of(folder / "empty.mp4", 0, "x"),
        record_of(folder / "cut.mp4", 0, "x"),
        record_of(clip_path, 500, "x"),
        record_of(clip_path, 2, "x", 1),
    ]
    # A line that names a clip again must not encode it again.
    write_manifest(folder / "clips.jsonl", [*good[:3], *bad, *good[3:], good[0]])
    write_manifest(folder / "good.jsonl", good)
    return folder, good, bad


@pytest.fixture(scope="session")
def whole(data, tiny_model_5b, tmp_path_factory):
    """The store of an uninterrupted run over all clips, and that run's output."""
    store = tmp_path_factory.mktemp("whole") / "store"
    command = arguments(tiny_model_5b, data[0] / "clips.jsonl", store)
    command[0] = str(REPOSITORY / SCRIPT)
    status, stdout, stderr = finish([sys.executable, *command], store.parent)
    assert status == 0, stdout + stderr
    return store, stdout


@pytest.fixture(scope="session")
def good_identity(whole):
    """What a store of the good clips alone must be: the same files and the same index."""
    return identity(whole[0])
