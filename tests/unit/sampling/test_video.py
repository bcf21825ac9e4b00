"""Video files, read back."""

import av
import numpy as np
import pytest
from PIL import Image

from exvideo_train.errors import UserError
from exvideo_train.sampling.video import compare_videos, read_mp4, side_by_side, write_mp4


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


def test_videos_are_compared_as_they_are_read(tmp_path):
    frames = make_frames()
    videos = {"with it": tmp_path / "a.mp4", "without": tmp_path / "b.mp4"}
    for path, of in zip(videos.values(), (frames, 255 - frames), strict=True):
        write_mp4(path, of, 8)
    compare_videos(videos, 8, tmp_path / "both.mp4", tmp_path / "sheet.png")
    read = {name: np.stack(list(read_mp4(path))) for name, path in videos.items()}
    both = np.stack(list(read_mp4(tmp_path / "both.mp4")))
    assert both.shape == (17, 48, 64 + 4 + 64, 3)
    assert np.abs(both[:, :, :60].astype(float) - read["with it"][:, :, :60]).mean() < 3
    assert np.abs(both[:, :, 72:].astype(float) - read["without"][:, :, 4:]).mean() < 3
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert sheet.shape == (2 * (48 + 32), 6 * 68 - 4, 3)
    assert np.array_equal(sheet[32:80, :64], read["with it"][0])
    assert np.array_equal(sheet[32:80, -64:], read["with it"][-1])
    assert np.array_equal(sheet[112:, -64:], read["without"][-1])


def test_frames_next_to_each_other():
    frames = make_frames()[:2]
    both = side_by_side([frames[0], frames[1]])
    assert both.shape == (48, 132, 3)
    assert np.array_equal(both[:, :64], frames[0])
    assert np.array_equal(both[:, 68:], frames[1])
    assert (both[:, 64:68] == 255).all()
