"""Video files, read back."""

import av
import numpy as np
import pytest
from PIL import Image

from exvideo_train.errors import UserError
from exvideo_train.sampling.video import side_by_side, write_contact_sheet, write_mp4


def make_frames(num_frames=17, height=48, width=64):
    """A colour ramp with a bar that moves one step a frame."""
    frames = np.zeros((num_frames, height, width, 3), dtype=np.uint8)
    frames[..., 0] = np.linspace(20, 230, width).astype(np.uint8)
    frames[..., 1] = np.linspace(230, 20, height).astype(np.uint8)[:, None]
    for index in range(num_frames):
        frames[index, :, 2 * index : 2 * index + 6] = (200, 40, 30)
    return frames


@pytest.mark.parametrize(("fps", "rate"), [(8, 8), (25, 25), (24000 / 1001, 24000 / 1001)])
def test_mp4_holds_the_frames(tmp_path, fps, rate):
    frames, path = make_frames(), tmp_path / "deep" / "video.mp4"
    write_mp4(path, frames, fps, comment="a prompt")
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.pix_fmt) == ("h264", "yuv420p")
        assert abs(float(stream.average_rate) - rate) < 1e-6
        assert container.metadata["comment"] == "a prompt"
        read = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(stream)])
        assert float(stream.duration * stream.time_base) == pytest.approx(17 / rate, rel=1e-3)
    assert read.shape == frames.shape
    error = np.abs(read.astype(float) - frames)
    assert error.mean() < 4
    assert error[:, 20, 50:].mean() < 3  # away from the bar's chroma edges: a wrong colour matrix would show here
    assert [path.name for path in path.parent.iterdir()] == ["video.mp4"]


def test_the_index_stands_before_the_frames(tmp_path):
    write_mp4(tmp_path / "video.mp4", make_frames(), 8)
    content = (tmp_path / "video.mp4").read_bytes()
    assert content.index(b"moov") < content.index(b"mdat")


def test_odd_sizes_are_refused_and_leave_nothing(tmp_path):
    with pytest.raises(UserError, match="47x64"):
        write_mp4(tmp_path / "video.mp4", make_frames(height=47), 8)
    assert not list(tmp_path.iterdir())


def test_side_by_side():
    frames = make_frames()
    both = side_by_side([frames, 255 - frames])
    assert both.shape == (17, 48, 64 + 4 + 64, 3)
    assert np.array_equal(both[:, :, :64], frames)
    assert np.array_equal(both[:, :, 68:], 255 - frames)


def test_contact_sheet_shows_first_and_last_frame(tmp_path):
    frames = make_frames()
    write_contact_sheet(tmp_path / "sheet.png", {"with": frames, "without": 255 - frames}, fps=8, num_columns=3)
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert sheet.shape == (2 * (48 + 32), 3 * 68 - 4, 3)
    assert np.array_equal(sheet[32:80, :64], frames[0])
    assert np.array_equal(sheet[32:80, -64:], frames[-1])
    assert np.array_equal(sheet[112:, -64:], 255 - frames[-1])
