"""Claims about pictures: pixels keep their values, and equal runs give equal files."""

import io

import numpy
import pytest
import torch
from PIL import Image

from models import media


def test_pixels_become_bytes_and_a_png_keeps_them():
    pixels = torch.tensor([-2.0, -1, 0, 1, 2]).expand(3, 4, 5)  # outside [-1, 1]: clipped
    frame = media.to_uint8(pixels)
    assert frame.shape == (4, 5, 3) and frame[0, :, 0].tolist() == [0, 0, 128, 255, 255]
    with Image.open(io.BytesIO(media.encode_png(frame))) as image:
        assert (numpy.array(image) == frame).all()


def test_a_video_has_its_frames_and_nearly_its_pixels(tmp_path):
    imageio = pytest.importorskip("imageio.v3", reason="needs models/requirements.txt")
    pytest.importorskip("imageio_ffmpeg")
    ramp = numpy.arange(64, dtype=numpy.uint8)[None, None, :, None] * 3
    times = numpy.arange(5, dtype=numpy.uint8)[:, None, None, None]
    frames = numpy.broadcast_to(ramp, (5, 34, 64, 3)) + times * 10
    (tmp_path / "x.mp4").write_bytes(media.encode_mp4(frames, 16))
    video = imageio.imread(tmp_path / "x.mp4", plugin="FFMPEG")
    assert video.shape == frames.shape
    assert abs(video.astype(float) - frames).mean() < 4
    assert abs(video.astype(float) - frames[::-1]).mean() > 10  # negative control


@pytest.mark.parametrize("shape", [(2, 16, 6, 8), (2, 16, 3, 6, 8)])
def test_a_sheet_of_latents_is_a_png_and_equal_for_equal_latents(shape):
    """With NaN in it, too: a diverged run must not end with its preview."""
    rows = {"student x_0 at t = 0.5": torch.randn(shape), "teacher, 4 steps": torch.randn(shape)}
    assert media.sheet(rows, None) == media.sheet(rows, None)
    rows["student x_0 at t = 0.5"][0] = torch.nan
    for decode in (None, lambda x: x.reshape(len(x), -1)[:, :12].sigmoid().view(-1, 2, 2, 3)):
        with Image.open(io.BytesIO(media.sheet(rows, decode, "title"))) as image:
            assert image.format == "PNG" and image.width > 100
