"""Videos made for a test, as fixtures."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from support.videos import clip_of, make_video

from exvideo_train.clips.reader import read_frames
from exvideo_train.clips.record import ClipRecord


@pytest.fixture(scope="session")
def video() -> Callable[..., Path]:
    """`make_video`."""
    return make_video


@pytest.fixture(scope="session")
def clip() -> Callable[..., ClipRecord]:
    """`clip_of`."""
    return clip_of


@pytest.fixture(params=["pyav", "decord"])
def decoder(request) -> str:
    return request.param


@pytest.fixture
def read(decoder) -> Callable[..., torch.Tensor]:
    """`read_frames` with either decoder."""
    return partial(read_frames, decoder=decoder)
