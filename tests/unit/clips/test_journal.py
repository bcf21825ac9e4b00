"""The journal of what was found out: kept, valid for one stamp, and clear about a full disk."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import pytest
from support.disk import full_disk

from exvideo_train.clips.journal import Journal
from exvideo_train.errors import UserError


def test_what_was_noted_is_found_until_the_file_changes(tmp_path: Path) -> None:
    with Journal(tmp_path / "j.sqlite") as journal:
        journal.put("a", "1", "content")
    with Journal(tmp_path / "j.sqlite") as journal:
        assert journal.get("a", "1", str) == "content"
        assert journal.get("a", "2", str) is None
        assert journal.get("b", "1", str) is None


def leave_on_a_full_disk(path: Path, error: Exception | None = None) -> None:
    """Note something, then leave the journal when its file can no longer grow."""
    with ExitStack() as disk, Journal(path) as journal:
        journal.put("a", "1", "x" * 100_000)
        disk.enter_context(full_disk())
        if error is not None:
            raise error


def test_disk_that_is_full_at_the_end_is_named(tmp_path: Path) -> None:
    path = tmp_path / "j.sqlite"
    with pytest.raises(UserError, match=f"cannot use {path}: .*free space"):
        leave_on_a_full_disk(path)
    with Journal(path) as again:
        assert again.get("a", "1", str) is None


def test_an_error_under_way_is_not_hidden_by_a_full_disk(tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="the first"):
        leave_on_a_full_disk(tmp_path / "j.sqlite", KeyError("the first"))
