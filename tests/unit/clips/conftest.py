"""Videos made for a test, as fixtures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from support.videos import clip_of, make_video, read_number

from exvideo_train.clips.record import ClipRecord


@pytest.fixture(scope="session")
def video() -> Callable[..., Path]:
    """`make_video`."""
    return make_video


@pytest.fixture(scope="session")
def clip() -> Callable[..., ClipRecord]:
    """`clip_of`."""
    return clip_of


@pytest.fixture(scope="session")
def number_in() -> Callable[[np.ndarray], int]:
    """`read_number`."""
    return read_number
