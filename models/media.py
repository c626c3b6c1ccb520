"""Latents and pixels as files to look at: png, mp4, contact sheets, and curves of a run's log."""

import io
import json
import tempfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot as plt
import numpy
import torch
from PIL import Image
from torch import Tensor

from models.common import UserError, first_line, reading
from models.weights import needs_extras

plt.switch_backend("Agg")  # needs no screen

# -- pixels --------------------------------------------------------------------------------------


def to_uint8(pixels: Tensor) -> numpy.ndarray:
    """Pixels (3, ..., h, w) in [-1, 1] -> uint8 (..., h, w, 3)."""
    return ((pixels.float() + 1) * 127.5).round().clamp(0, 255).byte().movedim(0, -1).cpu().numpy()


def encode_png(frame: numpy.ndarray) -> bytes:
    """Encode one picture (h, w, 3) as a png."""
    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, "png")
    return buffer.getvalue()


def encode_mp4(frames: numpy.ndarray, fps: int) -> bytes:
    """Encode a video (F, h, w, 3) with even h and w as H.264, nearly lossless. Raises UserError."""
    with needs_extras("imageio-ffmpeg"):
        import imageio_ffmpeg
    height, width = frames.shape[1:3]
    options = dict(fps=fps, quality=9, macro_block_size=2, ffmpeg_log_level="quiet")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "video.mp4"
        try:
            writer = imageio_ffmpeg.write_frames(str(path), (width, height), **options)
            writer.send(None)  # starts the generator
            for frame in frames:
                writer.send(numpy.ascontiguousarray(frame))
            writer.close()
            # ffmpeg reports no error when the disk is full, so count what it wrote
            count, _ = imageio_ffmpeg.count_frames_and_secs(str(path))
            if count != len(frames):
                raise OSError(f"{count} of {len(frames)} frames were written")
        except (OSError, RuntimeError) as error:
            advice = "free disk space, or set TMPDIR to another folder"
            line = f"cannot make a video in {folder} ({first_line(error)}); {advice}"
            raise UserError(line) from error
        return path.read_bytes()


def pick_frames(frames: numpy.ndarray, count: int = 5) -> numpy.ndarray:
    """At most `count` frames of a video at equal distances, with the first and the last."""
    return frames[numpy.linspace(0, len(frames) - 1, min(count, len(frames))).round().astype(int)]


# -- sheets --------------------------------------------------------------------------------------


def to_png(figure) -> bytes:
    """Save a figure as a png without date or version: equal runs give equal files. Closes it."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, bbox_inches="tight", metadata={"Software": None})
    plt.close(figure)
    return buffer.getvalue()


def contact_sheet(rows: dict[str, numpy.ndarray | Tensor], title: str) -> bytes:
    """Draw pictures (n, h, w, 3) by name, one row per name. Returns a png."""
    columns, (h, w) = max(map(len, rows.values())), next(iter(rows.values())).shape[1:3]
    width, height = (2 * side / max(h, w) for side in (w, h))  # inches of a picture
    size = width * columns + 0.6, height * len(rows) + 0.6
    options = dict(figsize=size, squeeze=False, layout="constrained")
    options["subplot_kw"] = dict(xticks=[], yticks=[])
    figure, axes = plt.subplots(len(rows), columns, **options)
    for line, (name, pictures) in zip(axes, rows.items()):
        line[0].set_ylabel(name.replace(" at ", "\nat ").replace(", ", ",\n"), fontsize=7)
        for ax, picture in zip(line, pictures):
            ax.imshow(numpy.asarray(picture))
        for ax in line[len(pictures) :]:
            ax.set_axis_off()
    figure.suptitle(title, fontsize=8)
    return to_png(figure)


def latent_preview(rows: list[Tensor]) -> list[Tensor]:
    """Latents (n, C, h, w) each -> RGB (n, h, w, 3) in [0, 1], by one linear map for all rows.

    The channels are the three directions in which the last row varies most. Shapes can be seen;
    colours mean nothing.
    """
    rows = [row.nan_to_num(0, 0, 0) for row in rows]  # a diverged run is shown grey
    pixels = rows[-1].movedim(1, -1).flatten(0, -2).double()  # (n h w, C)
    mean = pixels.mean(0)
    *_, axes = torch.linalg.svd(pixels - mean, full_matrices=False)
    axes = axes[:3] * axes[:3].sum(1, keepdim=True).sign()  # the sign of an SVD is arbitrary
    colours = [(row.movedim(1, -1).double() - mean) @ axes.T for row in rows]
    spread = 2.5 * colours[-1].flatten(0, -2).std(0)
    return [(0.5 + c / (2 * spread + 1e-12)).clamp(0, 1) for c in colours]


def sheet(rows: dict[str, Tensor], decode: Callable | None, title: str = "") -> bytes:
    """Draw latents by name, one row per name. Returns a png.

    decode(x) -> RGB (n, h, w, 3) in [0, 1] of the first frame; None: a linear preview of the
    middle frame.
    """
    latents = [x.float().cpu() for x in rows.values()]
    is_video = latents[0].ndim == 5
    if decode:
        pictures, note = [decode(x) for x in latents], "decoded" + ", first frame" * is_video
    else:
        frames = [x[:, :, x.shape[2] // 2] if is_video else x for x in latents]
        note = "linear preview of latents" + ", middle frame" * is_video
        pictures = latent_preview(frames)
    return contact_sheet(dict(zip(rows, pictures)), f"{title}, {note}" if title else note)


# -- the log -------------------------------------------------------------------------------------

CURVES = {  # key of a log row -> title of its panel; a preset has at most six of them
    "loss": "loss of the fakes",
    "distance": "distance v_real - v_fake",
    "grad_norm": "gradient norm",
    "x_rms": "RMS of x at the end of the phase",
    "latent_distance": "latent distance of samples",
    "energy": "energy distance (toys)",
    "frechet": "Frechet distance (digits)",
}


def curves(log: Path) -> bytes:
    """Draw each key of CURVES over iterations, one line per phase and role. Returns a png."""
    lines = {key: defaultdict(list) for key in CURVES}  # key -> label -> points
    with reading(log, "start over with --overwrite"):
        for row in map(json.loads, log.read_bytes().splitlines()):
            for key in CURVES:
                if row.get(key) is not None:
                    label = f"phase {row['phase']}, {row['role']}"
                    lines[key][label].append((int(row["iteration"]), float(row[key])))
    figure, axes = plt.subplots(2, 3, figsize=(11, 5.5), layout="constrained")
    panels, colors = [key for key in CURVES if lines[key]], {}
    for ax in axes.flat[len(panels) :]:
        ax.set_axis_off()
    for ax, key in zip(axes.flat, panels):
        ax.set_title(CURVES[key], fontsize=9)
        for label, points in lines[key].items():
            style = "o-" if label.endswith("preview") else "-"
            color = colors.setdefault(label, f"C{len(colors)}")
            ax.plot(*zip(*points), style, lw=0.8, ms=3, label=label, color=color)
        ax.legend(fontsize=6)
        if key == "grad_norm":
            ax.set_yscale("log")
    figure.supxlabel("iteration of the phase; below 0 the fake warms up", fontsize=9)
    return to_png(figure)
