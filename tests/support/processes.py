"""Ending processes that a test has started, and no others."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psutil


@contextmanager
def ended(process: subprocess.Popen[Any]) -> Iterator[subprocess.Popen[Any]]:
    """The process; when the block is left, it and all its descendants are killed, in whatever group or session."""
    try:
        yield process
    finally:
        end_tree(process)


def end_tree(process: subprocess.Popen[Any]) -> None:
    """Kill a process and its descendants by their ids, and wait for it."""
    try:
        # psutil knows a process by id and start time: an id that has been given to another is not killed.
        tree = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    except psutil.NoSuchProcess:
        tree = []
    if process.poll() is None:
        process.kill()
    for child in tree:
        try:
            child.kill()
        except psutil.NoSuchProcess:
            continue
    process.wait()
