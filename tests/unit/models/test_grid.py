"""Which videos a model takes, and how its latents lie over them."""

from __future__ import annotations

from typing import Any

import pytest

from exvideo_train.errors import UserError
from exvideo_train.geometry import Geometry
from exvideo_train.models.cogvideox.family import GRID
from exvideo_train.models.grid import LatentGrid

# Any number of frames from two on, one a latent; four levels of a UNet below the latents.
FRAMEWISE = LatentGrid(frame_step=1, min_frames=2, frames_per_latent=1, pixels_per_latent=8, pixels_per_patch=64)


def test_cogvideox_at_its_published_sizes() -> None:
    assert GRID.shape_THW(Geometry(129, 480, 720, 8.0)) == (33, 60, 90)
    assert GRID.shape_THW(Geometry(49, 480, 720, 8.0)) == (13, 60, 90)
    assert GRID.num_tokens(Geometry(129, 480, 720, 8.0)) == 44_550


@pytest.mark.parametrize("num_frames", [1, 9, 49, 129, 257])
def test_frame_counts_of_8k_plus_1(num_frames: int) -> None:
    geometry = Geometry(num_frames, 64, 96, 8)
    GRID.check(geometry)
    assert GRID.shape_THW(geometry)[0] == (num_frames + 3) // 4


def test_a_model_of_any_number_of_frames() -> None:
    geometry = Geometry(128, 512, 512, 30)
    FRAMEWISE.check(geometry)
    assert FRAMEWISE.shape_THW(geometry) == (128, 64, 64)
    assert FRAMEWISE.num_tokens(geometry) == 128 * 8 * 8


@pytest.mark.parametrize(
    ("grid", "values", "words"),
    [
        (GRID, (128, 480, 720, 8), ["num_frames=128", "8k+1", "num_frames=121", "num_frames=129"]),
        (GRID, (2, 480, 720, 8), ["num_frames=2", "num_frames=1 ", "num_frames=9"]),
        (GRID, (129, 481, 720, 8), ["height=481", "height=480", "height=496"]),
        (GRID, (129, 480, 8, 8), ["width=8", "width=16", "2 latents a patch"]),
        (FRAMEWISE, (1, 512, 512, 30), ["num_frames=1", "2 frames or more", "num_frames=2"]),
        (FRAMEWISE, (25, 96, 512, 30), ["height=96", "height=64", "height=128", "8 latents a patch"]),
    ],
)
def test_others_are_refused_with_the_nearest(grid: LatentGrid, values: Any, words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        grid.check(Geometry(*values))
    for word in words:
        assert word in str(caught.value)
