"""What a run of a large teacher looks like: contact sheets of latents, and curves of its log."""

import io
import json
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no screen needed
import matplotlib.pyplot as plt
import torch
from torch import Tensor


def png(figure) -> bytes:
    """The figure as the bytes of a png, without dates or versions: equal runs give equal files."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, bbox_inches="tight", metadata={"Software": None})
    plt.close(figure)
    return buffer.getvalue()


def frame(x: Tensor) -> Tensor:
    """The middle frame of latents (n, C, F, h, w); pictures (n, C, h, w) are one already."""
    return x[:, :, x.shape[2] // 2] if x.ndim == 5 else x


def preview(rows: list[Tensor]) -> list[Tensor]:
    """Latents (n, C, h, w) each -> RGB (n, h, w, 3) in [0, 1], by the same linear map for all.

    The three channels are the directions in which the last row's pixels vary most: shapes can be
    seen, colours mean nothing. Decode the latents to see those.
    """
    rows = [row.nan_to_num(0, 0, 0) for row in rows]  # a broken run is shown grey
    pixels = rows[-1].movedim(1, -1).flatten(0, -2).double()  # (n h w, C)
    mean = pixels.mean(0)
    *_, axes = torch.linalg.svd(pixels - mean, full_matrices=False)
    axes = axes[:3] * axes[:3].sum(1, keepdim=True).sign()  # a sign of their own would flicker
    colours = [(row.movedim(1, -1).double() - mean) @ axes.T for row in rows]
    spread = 2.5 * colours[-1].flatten(0, -2).std(0)
    return [(0.5 + c / (2 * spread + 1e-12)).clamp(0, 1) for c in colours]


def sheet(rows: dict[str, Tensor], decode: Callable | None, title: str = "") -> bytes:
    """Latents by name -> a png with a row each; decode(x) -> RGB (n, h, w, 3), or a preview."""
    latents = [x.float().cpu() for x in rows.values()]
    shown = preview([frame(x) for x in latents]) if decode is None else map(decode, latents)
    how = "decoded, first frame" if decode else "linear preview of latents, middle frame"
    how = how if latents[0].ndim == 5 else how.split(",")[0]
    return grid(dict(zip(rows, shown)), f"{title}, {how}" if title else how)


def grid(rows: dict[str, Tensor], title: str) -> bytes:
    """Pictures (n, h, w, 3) by name -> a png with a row each."""
    held = list(rows.values())
    columns, (h, w) = max(map(len, held)), held[0].shape[1:3]
    wide, high = (2 * n / max(h, w) for n in (w, h))  # inches
    size = (wide * columns + 0.6, high * len(rows) + 0.6)
    figure, axes = plt.subplots(
        len(rows), columns, figsize=size, squeeze=False, layout="constrained"
    )
    for line, (name, pictures) in zip(axes, rows.items()):
        line[0].set_ylabel(name.replace(" at ", "\nat ").replace(", ", ",\n"), fontsize=7)
        for ax in line:
            ax.set(xticks=[], yticks=[])
        for ax, picture in zip(line, pictures):
            ax.imshow(picture.numpy())
        for ax in line[len(pictures) :]:
            ax.set_axis_off()
    figure.suptitle(title, fontsize=8)
    return png(figure)


# -- the log -------------------------------------------------------------------------------------

CURVES = {  # key of a log row -> title of its panel
    "loss": "loss of the fakes",
    "distance": "distance v_real - v_fake",
    "grad_norm": "gradient norm",
    "x_std": "sd of x at the phase's end",
    "diversity": "diversity over seeds",
    "energy": "energy (toys)",
}


def curves(log: Path) -> bytes:
    """A png with a panel for each of CURVES, a line a role and phase, over iterations."""
    lines = defaultdict(list)
    for text in log.read_text().splitlines():
        row = json.loads(text)
        for key in CURVES:
            student = row.get("role", "").startswith("student")
            if row.get(key) is not None and not (
                key == "loss" and student
            ):  # that one says nothing
                lines[key, f"phase {row['phase']}, {row['role']}"].append(
                    (row["iteration"], row[key])
                )
    shown = [key for key in CURVES if any(key == of for of, _ in lines)]
    figure, axes = plt.subplots(2, 3, figsize=(11, 5.5), layout="constrained")
    for ax in axes.flat[len(shown) :]:
        ax.set_axis_off()
    for ax, key in zip(axes.flat, shown):
        ax.set_title(CURVES[key], fontsize=9)
        for (of, name), points in lines.items():
            if of == key:
                ax.plot(
                    *zip(*points), "o-" if name.endswith("look") else "-", lw=0.8, ms=3, label=name
                )
        ax.legend(fontsize=6)
        if key == "grad_norm":
            ax.set_yscale("log")
    return png(figure)
