"""Pixels -> the bytes of files that people look at: mp4, png, a contact sheet."""

import io
import tempfile
from pathlib import Path

import numpy
import torch
from PIL import Image
from torch import Tensor

from models.files import UserError, first_line
from models.pictures import grid
from models.weights import needs_extras


def to_bytes(pixels: Tensor) -> numpy.ndarray:
    """Pixels (3, ..., h, w) in [-1, 1] -> uint8 (..., h, w, 3)."""
    return ((pixels.float() + 1) * 127.5).round().clamp(0, 255).byte().movedim(0, -1).cpu().numpy()


def png(frame: numpy.ndarray) -> bytes:
    """A picture (h, w, 3) as a png."""
    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, "png")
    return buffer.getvalue()


def mp4(frames: numpy.ndarray, fps: int) -> bytes:
    """A video (F, h, w, 3) as an mp4 (H.264, 4:2:0, nearly lossless), h and w even. UserError."""
    with needs_extras("imageio-ffmpeg"):
        import imageio_ffmpeg
    height, width = frames.shape[1:3]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "video.mp4"
        try:
            writer = imageio_ffmpeg.write_frames(
                str(path), (width, height), fps=fps, quality=9, macro_block_size=2,
                ffmpeg_log_level="quiet",
            )  # fmt: skip
            writer.send(None)
            for frame in frames:
                writer.send(numpy.ascontiguousarray(frame))
            writer.close()  # ffmpeg fails in silence: count what is there
            found, _ = imageio_ffmpeg.count_frames_and_secs(str(path))
        except (OSError, RuntimeError) as error:
            raise UserError(f"cannot make a video in {folder} ({first_line(error)}); is the disk "
                            "full? TMPDIR names another folder") from error  # fmt: skip
        if found != len(frames):
            raise UserError(f"{folder} took {found} of {len(frames)} frames; is the disk full?")
        return path.read_bytes()


def few(frames: numpy.ndarray, count: int = 5) -> numpy.ndarray:
    """Some frames (count, h, w, 3) of a video at equal distances, first and last among them."""
    return frames[numpy.linspace(0, len(frames) - 1, min(count, len(frames))).round().astype(int)]


def contact(rows: list[tuple[str, numpy.ndarray]], title: str) -> bytes:
    """Frames (n, h, w, 3) by name as a png, a row each."""
    return grid({name: torch.from_numpy(frames) for name, frames in rows}, title)
