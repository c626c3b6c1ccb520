"""Claims about pictures: pixels keep their values, and equal runs give equal files."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image

from models import media
from models.common import UserError


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
    frames = (
        numpy.broadcast_to(ramp, (5, 34, 64, 3))
        + numpy.arange(5, dtype=numpy.uint8)[:, None, None, None] * 10
    )
    (tmp_path / "x.mp4").write_bytes(media.encode_mp4(frames, 16))
    video = imageio.imread(tmp_path / "x.mp4", plugin="FFMPEG")
    assert video.shape == frames.shape
    assert abs(video.astype(float) - frames).mean() < 4
    assert abs(video.astype(float) - frames[::-1]).mean() > 10  # negative control


def test_a_disk_without_space_is_one_line(monkeypatch):
    writer = pytest.importorskip("imageio_ffmpeg", reason="needs models/requirements.txt")
    monkeypatch.setattr(writer, "count_frames_and_secs", lambda path: (3, 0.2))
    with pytest.raises(UserError, match="3 of 5 frames were written"):
        media.encode_mp4(numpy.zeros((5, 32, 32, 3), numpy.uint8), 16)


def test_picked_frames_begin_and_end_with_those_of_the_video():
    frames = numpy.arange(81)
    assert media.pick_frames(frames).tolist() == [0, 20, 40, 60, 80]
    assert media.pick_frames(frames[:1]).tolist() == [0]


@pytest.mark.slow
def test_a_notebooks_backend_needs_not_be_installed():
    """`!python train.py` inherits the variable from the notebook."""
    environment = os.environ | {"MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    code = "from models import media; print(len(media.to_png(media.Figure())))"
    options = dict(cwd=Path(__file__).parent.parent, env=environment, capture_output=True)
    done = subprocess.run([sys.executable, "-c", code], **options, text=True)
    assert done.returncode == 0 and int(done.stdout) > 100, done.stderr


@pytest.mark.parametrize("shape", [(2, 16, 6, 8), (2, 16, 3, 6, 8)])
def test_a_sheet_of_latents_is_a_png_and_equal_for_equal_latents(shape):
    """With NaN in it, too: a diverged run must not end with its preview."""
    rows = {"student x_0 at t = 0.5": torch.randn(shape), "teacher, 4 steps": torch.randn(shape)}
    assert media.sheet(rows, None) == media.sheet(rows, None)
    rows["student x_0 at t = 0.5"][0] = torch.nan
    for decode in (None, lambda x: x.reshape(len(x), -1)[:, :12].sigmoid().view(-1, 2, 2, 3)):
        with Image.open(io.BytesIO(media.sheet(rows, decode, "title"))) as image:
            assert image.format == "PNG" and image.width > 100


def test_curves_show_losses_and_previews(tmp_path, monkeypatch):
    """Rows of previews as points; keys without a number are no line."""
    row = {"phase": 1, "iteration": 0}
    rows = [row | {"role": "fake1", "loss": 2.0, "grad_norm": None}]
    rows += [row | {"role": "fake1", "loss": 1.5, "iteration": 1, "grad_norm": 3.0}]
    rows += [row | {"role": "student1", "distance": 1.0}, row | {"role": "preview", "energy": 0.1}]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = {}

    def collect(figure):
        for ax in figure.axes:
            lines.update({ax.get_title(): [line.get_xydata() for line in ax.lines]})
        return b""

    monkeypatch.setattr(media, "to_png", collect)
    media.curves(tmp_path / "log.jsonl")
    assert lines["loss of the fakes"][0].tolist() == [[0, 2], [1, 1.5]]
    assert lines["gradient norm"][0].tolist() == [[1, 3]]
    assert len(lines["energy distance (toys)"]) == 1 and sum(map(len, lines.values())) == 4


@pytest.mark.parametrize("content", ["{", "[1]", '{"loss": 1, "iteration": 0}', "\xe9"])
def test_a_damaged_log_is_one_line(tmp_path, content):
    (tmp_path / "log.jsonl").write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError, match="log.jsonl .*start over with --overwrite"):
        media.curves(tmp_path / "log.jsonl")
