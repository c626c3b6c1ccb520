"""Latents and pixels as files to look at: png, mp4, contact sheets, and curves of a run's log.

Also reads pictures and videos, of other tools as well.
"""

import io
import json
import os
import re
import subprocess
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import numpy
import torch
import torch.nn.functional as F
from PIL import Image, ImageSequence
from torch import Tensor

from models.common import UserError, first_line, reading
from models.weights import needs_extras

backend = os.environ.get("MPLBACKEND", "").partition("module://")[2].partition(".")[0]
if backend and not find_spec(backend):
    del os.environ["MPLBACKEND"]  # a notebook's, which this Python does not have
from matplotlib.figure import Figure  # noqa: E402 - without pyplot: no screen, safe in a thread

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


def pick_frames(frames: numpy.ndarray) -> numpy.ndarray:
    """Five frames at equal distances, with the first and the last; of one frame, that frame."""
    count = 5 if len(frames) > 1 else 1
    return frames[numpy.linspace(0, len(frames) - 1, count).round().astype(int)]


# -- samples of any tool -------------------------------------------------------------------------

VIDEOS = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi")  # read by ffmpeg, others by PIL


def read_video(path: Path) -> tuple[numpy.ndarray, float]:
    """Frames (F, h, w, 3) of a video or picture, RGB, and frames per second; 8 if unknown.

    ffmpeg is that of imageio-ffmpeg, or the one named by IMAGEIO_FFMPEG_EXE.
    """
    if path.suffix.lower() not in VIDEOS:
        with Image.open(path) as file:
            if file.mode.startswith(("I", "F")):
                raise ValueError(f"expected 8 bits per channel, found mode {file.mode}")
            frames = [numpy.asarray(x.convert("RGB")) for x in ImageSequence.Iterator(file)]
            return numpy.stack(frames), 1000 / (file.info.get("duration") or 125)
    with needs_extras("imageio-ffmpeg"):
        import imageio_ffmpeg
    name = f"file:{path}"  # a colon in a name would be that of a protocol
    options = "-map 0:v:0 -fps_mode passthrough -f rawvideo -pix_fmt rgb24 -".split()
    command = [imageio_ffmpeg.get_ffmpeg_exe(), *"-nostdin -v error -xerror -threads 1 -i".split()]
    done = subprocess.run([*command, name, *options], capture_output=True)
    if done.returncode or b"prematurely" in done.stderr:  # a cut mkv or webm
        raise ValueError(done.stderr.decode(errors="replace"))
    reader = imageio_ffmpeg.read_frames(name)
    metadata = next(reader)
    reader.close()
    width, height = metadata["size"]
    frames = numpy.frombuffer(done.stdout, "uint8").reshape(-1, height, width, 3)
    return frames, metadata["fps"] or 8


def shrink(pictures: numpy.ndarray) -> Tensor:
    """Pictures (n, h, w, 3) -> (n, 3, 64, 64), uint8."""
    return F.adaptive_avg_pool2d(torch.tensor(pictures).movedim(3, 1).float(), 64).round().byte()


def flow_lengths(frames: numpy.ndarray) -> Iterator[numpy.ndarray]:
    """Yield the lengths of the optical flow between neighbouring frames, sorted.

    By DIS (Kroeger et al., 2016), on frames whose shorter side is reduced to 240. The unit is
    the shorter side. A length is 0 where moving the pixels removes less than a quarter of the
    difference between the frames: DIS also finds flow in grain.
    """
    with needs_extras("opencv-python-headless"):
        import cv2
    cv2.utils.logging.setLogLevel(0)
    cv2.setNumThreads(1)  # files are measured in parallel
    grays = []
    for frame in frames:
        scale = min(1, 240 / min(frame.shape[:2]))
        small = cv2.resize(frame, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
        grays.append(cv2.cvtColor(small, cv2.COLOR_RGB2GRAY))
    dis = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    difference = lambda a, b: cv2.blur(cv2.absdiff(a, b).astype("float32"), (31, 31))
    for a, b in pairwise(grays):
        flow = dis.calc(a, b, None)  # (h, w, 2): x, y
        ends = flow + numpy.indices(a.shape, "float32")[::-1].transpose(1, 2, 0)
        moved = cv2.remap(b, ends, None, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
        is_motion = difference(a, moved) <= 0.75 * difference(a, b)
        yield numpy.sort(cv2.magnitude(*cv2.split(flow)) * is_motion, axis=None) / min(a.shape)


# -- sheets --------------------------------------------------------------------------------------


def to_png(figure) -> bytes:
    """Save a figure as a png without date or version: equal runs give equal files."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, bbox_inches="tight", metadata={"Software": None})
    return buffer.getvalue()


def plain(text: str) -> str:
    """A name as matplotlib shows it: $ is no formula, and a legend has names that begin with _."""
    return re.sub("^_", " _", text.replace("$", r"\$"))


def contact_sheet(rows: dict[str, numpy.ndarray | Tensor], title: str) -> bytes:
    """Draw pictures (n, h, w, 3) by name, one row per name. Returns a png."""
    columns = max(map(len, rows.values()))
    h, w = next(iter(rows.values())).shape[1:3]
    width, height = (2 * side / max(h, w) for side in (w, h))  # inches of a picture
    inches = width * columns + 0.6, height * len(rows) + 0.6
    figure = Figure(inches, layout="constrained")
    options = dict(squeeze=False, subplot_kw=dict(xticks=[], yticks=[]))
    axes = figure.subplots(len(rows), columns, **options)
    for line, (name, pictures) in zip(axes, rows.items()):
        line[0].set_ylabel(name.replace(" at ", "\nat ").replace(", ", ",\n"), fontsize=7)
        for ax, picture in zip(line, pictures):
            ax.imshow(numpy.asarray(picture))
        for ax in line[len(pictures) :]:
            ax.set_axis_off()
    figure.suptitle(plain(title), fontsize=8)
    return to_png(figure)


def draw_samples(folders: dict[str, dict], pictures: dict[str, list]) -> bytes:
    """Draw the flow over time of folders, and five pictures (h, w, 3) by title. Returns a png.

    folders: what models/metrics.py measured. The line is the median of the videos, the band holds
    half of them.
    """
    figure = Figure((8, 2.5 + 1.2 * len(pictures)), layout="constrained")
    grid = figure.add_gridspec(len(pictures) + 1, 5, height_ratios=[2, *[1] * len(pictures)])
    top = figure.add_subplot(grid[0, :], xlabel="frame", ylabel="flow (px/frame)")
    for title, groups in folders.items():
        videos = [x["flow"] for group in groups.values() for x in group.values()]
        rows = torch.nn.utils.rnn.pad_sequence(videos, True, torch.nan).numpy()  # (n, F - 1)
        if rows.size:
            low, middle, high = numpy.nanpercentile(rows, (25, 50, 75), axis=0)
            top.plot(middle, lw=1, label=plain(title))
            top.fill_between(range(len(middle)), low, high, alpha=0.2, lw=0)
    if top.lines:
        top.legend(fontsize=7)
    else:
        top.set_axis_off()
    for line, (title, row) in enumerate(pictures.items(), 1):
        for column, picture in enumerate(row[:5]):
            ax = figure.add_subplot(grid[line, column], xticks=[], yticks=[])
            ax.imshow(picture)
            if not column:  # a title may be wider than its picture: keep room for its height only
                ax.set_title(" ", fontsize=7)
                text = ax.text(0, 1.05, plain(title), fontsize=7, transform=ax.transAxes)
                text.set_in_layout(False)
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
        note = "decoded, first frame"
        pictures = [decode(x) for x in latents]
    else:
        note = "linear preview of latents, middle frame"
        pictures = latent_preview([x[:, :, x.shape[2] // 2] if is_video else x for x in latents])
    if not is_video:
        note = note.partition(",")[0]
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


def read_curves(log: Path) -> dict[str, dict[str, list[tuple]]]:
    """Key of CURVES -> label -> points (iteration, value). Raises UserError."""
    lines = {key: defaultdict(list) for key in CURVES}
    with reading(log, "start over with --overwrite"):
        for row in map(json.loads, log.read_bytes().splitlines()):
            for key in CURVES:
                if row.get(key) is not None:
                    label = f"phase {row['phase']}, {row['role']}"
                    lines[key][label].append((int(row["iteration"]), float(row[key])))
    return lines


def curves(log: Path) -> bytes:
    """Draw each key of CURVES over iterations, one line per phase and role. Returns a png."""
    lines = read_curves(log)
    figure = Figure((11, 5.5), layout="constrained")
    axes = figure.subplots(2, 3)
    panels = [key for key in CURVES if lines[key]]
    colors = {}  # label -> colour, the same in all panels
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
