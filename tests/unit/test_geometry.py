import pytest

from exvideo_train.errors import UserError
from exvideo_train.geometry import Geometry


def test_published_sizes():
    geometry = Geometry(num_frames=129, height=480, width=720, fps=8.0)
    assert geometry.num_latent_frames == 33
    assert (geometry.latent_height, geometry.latent_width) == (60, 90)
    assert geometry.duration_seconds == 16.0
    assert geometry.name == "129x480x720_8fps"
    assert Geometry(49, 480, 720, 8.0).num_latent_frames == 13


@pytest.mark.parametrize("num_frames", [1, 9, 49, 129, 257])
def test_frame_counts_of_8k_plus_1(num_frames):
    assert Geometry(num_frames, 64, 96, 8).num_latent_frames == (num_frames + 3) // 4


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ((128, 480, 720, 8), ["num_frames=128", "num_frames=121", "num_frames=129"]),
        ((0, 480, 720, 8), ["num_frames=0", "num_frames=1"]),
        ((-7, 480, 720, 8), ["num_frames=-7", "num_frames=1"]),
        ((129, 481, 720, 8), ["height=481", "height=480", "height=496"]),
        ((129, 480, 8, 8), ["width=8", "width=16"]),
        ((129, 0, 720, 8), ["height=0", "height=16"]),
        ((129, 480, 720, 0), ["fps=0", "positive"]),
        ((129, 480, 720, float("nan")), ["fps=nan"]),
    ],
)
def test_bad_values_name_the_field_and_what_to_use(values, words):
    with pytest.raises(UserError) as caught:
        Geometry(*values)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("fps", [8.0, 23.976, 25.0, 29.97])
def test_names_are_read_back(fps):
    geometry = Geometry(49, 64, 96, fps)
    assert Geometry.from_name(geometry.name) == geometry


@pytest.mark.parametrize("name", ["", "49x64x96", "49x64_8fps", "axbxc_8fps", "49x64x96_8fps/..", "48x64x96_8fps"])
def test_other_names_are_refused(name):
    with pytest.raises(UserError):
        Geometry.from_name(name)
