import pytest

from exvideo_train.errors import UserError
from exvideo_train.geometry import Geometry


def test_published_size():
    geometry = Geometry(num_frames=129, height=480, width=720, fps=8.0)
    assert geometry.duration_seconds == 16.0
    assert geometry.name == "129x480x720_8fps"


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ((0, 480, 720, 8), ["num_frames=0", "from 1"]),
        ((100_000, 480, 720, 8), ["num_frames=100000", "99993"]),
        ((-7, 480, 720, 8), ["num_frames=-7"]),
        ((129, 0, 720, 8), ["height=0", "from 1"]),
        ((129, 480, 20_000, 8), ["width=20000", "16384"]),
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


@pytest.mark.parametrize("name", ["", "49x64x96", "49x64_8fps", "axbxc_8fps", "49x64x96_8fps/..", "0x64x96_8fps"])
def test_other_names_are_refused(name):
    with pytest.raises(UserError):
        Geometry.from_name(name)
