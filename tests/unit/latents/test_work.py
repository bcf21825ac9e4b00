import os
import threading

import pytest

from exvideo_train.clips.record import ClipRecord, make_clip_id
from exvideo_train.latents.work import SILENCE_SECONDS, WorkList


def records(count, captions=None):
    return [
        ClipRecord(make_clip_id("t", str(n), 0, None), "t", f"/videos/{n}.mp4", 0, None, caption)
        for n, caption in enumerate(captions or [f"c{n}" for n in range(count)])
    ]


def test_every_block_is_taken_by_one_owner(tmp_path):
    work = WorkList(tmp_path)
    work.create(records(300), num_encoders=2)
    taken = {name: [] for name in "abcd"}

    def take(owner):
        while (block := WorkList(tmp_path).take(owner)) is not None:
            taken[owner] += [record.clip_id for record in work.records(block)]
            work.finish(block)

    threads = [threading.Thread(target=take, args=(owner,)) for owner in taken]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    everything = [clip_id for ids in taken.values() for clip_id in ids]
    assert sorted(everything) == sorted(record.clip_id for record in records(300))
    assert work.counts() == (0, 0)


def test_blocks_hold_records_unchanged_and_in_order(tmp_path):
    work = WorkList(tmp_path)
    work.create(records(3), num_encoders=1)
    assert [work.records(work.take("a"))[0] for _ in range(3)] == records(3)
    assert work.take("a") is None


def captions_by_block(work):
    blocks = []
    while (block := work.take("a")) is not None:
        blocks.append("".join(record.caption for record in work.records(block)))
    return blocks


@pytest.mark.parametrize(
    ("captions", "blocks"),
    [
        # 32 clips for one encoder: blocks of two.
        ("abcdefghijklmnopqrstuvwxyzABCDEF", ["ab", "cd", "ef", "gh", "ij", "kl", "mn", "op", "qr", "st", "uv", "wx"]),
        ("abbccdeeefggggghhijklmnopqrstuvw", ["abb", "cc", "deee", "fg", "gggg", "hh", "ij", "kl", "mn", "op"]),
        # All of one caption, as of none: nothing is gained, and encoders must end together.
        ("a" * 32, ["aa"] * 14 + ["aaaa"]),
    ],
)
def test_clips_of_one_caption_stay_in_one_block(tmp_path, captions, blocks):
    work = WorkList(tmp_path)
    work.create(records(32, captions), num_encoders=1)
    assert work.num_unsettled() == 32
    found = captions_by_block(work)
    assert found[: len(blocks)] == blocks
    assert "".join(found) == captions


def test_blocks_of_the_dead_are_given_back(tmp_path):
    work = WorkList(tmp_path)
    work.create(records(4), num_encoders=1)
    work.take("dead")
    work.take("dead")
    work.take("alive")
    assert work.counts() == (1, 3)
    assert work.give_back("dead") == 2
    assert work.counts() == (3, 1)


def test_only_silent_owners_lose_their_blocks(tmp_path):
    work = WorkList(tmp_path)
    work.create(records(4), num_encoders=1)
    silent, alive = work.take("silent"), work.take("alive")
    long_ago = alive.stat().st_mtime - SILENCE_SECONDS - 1
    os.utime(silent, (long_ago, long_ago))
    assert work.give_back_silent(tmp_path / "clock") == 1
    assert alive.exists()
    assert not silent.exists()


def test_taking_is_a_sign_of_life(tmp_path):
    work = WorkList(tmp_path)
    work.create(records(1), num_encoders=1)
    block = next(work.todo.rglob("*.jsonl"))
    os.utime(block, (1, 1))
    work.take("new")
    assert work.give_back_silent(tmp_path / "clock") == 0


def test_a_million_clips_make_small_folders(tmp_path):
    work = WorkList(tmp_path)
    work.create(records(5000), num_encoders=400)
    assert max(len(list(folder.iterdir())) for folder in work.todo.iterdir()) <= 1000
    assert work.num_unsettled() == 5000
