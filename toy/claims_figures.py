"""Pictures of toy/claims.py: verdicts, energy over time, paths of particles, and them moving."""

import io
from pathlib import Path
from typing import Callable

import torch
from PIL import Image  # matplotlib needs it, too
from torch import Tensor

from models.files import write
from toy.mixtures import TOYS
from toy.plot import panel, plt, png
from toy.verdicts import Part, interval, mark

SHOWN = ("teacher, 40 steps", "DMD, 1 step", "vanilla DMD", "DMD2", "Phased 4 / 2", "Phased 4 / 4")
CURVES = ("DMD, 1 step", "vanilla DMD", "DMD2", "DMD2, a fake per depth", "Phased 4 / 2",
          "Phased 4 / 4", "one shared network")  # fmt: skip
COLOURS = {  # of a part's own interval, see verdicts.mark
    "yes": "tab:green",
    "no": "tab:red",
    "no difference that matters": "0.5",
    "unclear": "tab:orange",
}
REACH = 3.4  # half the width of a panel of the ring, most of the noise in it


def dots(claims: list[tuple[str, list[Part]]]) -> bytes:
    """Every deciding part of (verdict, parts) with its interval, in units of what matters."""
    rows = [(n, word, p) for n, (word, parts) in enumerate(claims, 1) for p in parts]
    figure, ax = plt.subplots(figsize=(9, 0.2 * len(rows) + 1), layout="constrained")
    ax.axvspan(-1, 1, color="0.94")
    ax.axvline(0, color="0.6", lw=0.8)
    for y, (n, word, part) in enumerate(rows):
        unit, colour = abs(part.matters) or 0.01, COLOURS[mark(part)]
        middle, low, high = (x / unit for x in interval(part.d))
        ax.plot([low, high], [y, y], color=colour, lw=2)
        ax.plot(middle, y, "o", color=colour, ms=4)
        ax.plot(part.matters / unit, y, "|", color="k", ms=7)  # to be above this
        if y == 0 or rows[y - 1][0] != n:
            ax.axhline(y - 0.5, color="0.8", lw=0.6)
            ax.text(1.01, y, word, transform=ax.get_yaxis_transform(), va="center", fontsize=8)
    ax.set_yticks(range(len(rows)), [f"{n}  {p.name}" for n, _, p in rows], fontsize=7)
    ax.set(ylim=(len(rows) - 0.5, -0.5))
    ax.set_xscale("symlog", linthresh=1)
    ax.set_xlabel("difference over seeds, 95 % interval, in units of the smallest that matters")
    handles = [plt.Line2D([], [], color=c, marker="o", label=word) for word, c in COLOURS.items()]
    figure.legend(handles=handles, loc="outside upper center", ncols=4, fontsize=8)
    return png(figure)


def curves(rows: dict[str, list[dict]]) -> bytes:
    """Energy on the ring while training, over seconds of one thread: mean and range of seeds."""
    figure, ax = plt.subplots(figsize=(8, 4.2), layout="constrained")
    for i, (name, cells) in enumerate(rows.items()):
        curve = torch.tensor([cell["curve"] for cell in cells])  # (seeds, looks, 3)
        seconds, found = curve[..., 1].mean(0), curve[..., 2].clamp(min=1e-4)
        ax.plot(seconds, found.mean(0), label=name, color=f"C{i}")
        ax.fill_between(seconds, found.amin(0), found.amax(0), color=f"C{i}", alpha=0.1)
    ax.set(yscale="log", xlabel="seconds of training", ylabel="energy to exact samples (2,000)")
    ax.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    return png(figure)


def ends(x: Tensor) -> Tensor:
    """The mode of the ring where each sample is, (n,)."""
    return torch.cdist(x, TOYS["ring"]().means).argmin(1)


def paths(xs: dict[str, Tensor]) -> bytes:
    """A column a method: its particles' ways, and the noise they begin as; by mode of the end."""
    figure, axes = plt.subplots(
        2, len(xs), figsize=(2.3 * len(xs), 4.8), layout="constrained", squeeze=False
    )
    hue = plt.get_cmap("hsv")
    for (top, bottom), (name, x) in zip(axes.T, xs.items()):
        mode = ends(x[-1])
        panel(top, x[-1][:0], None, 8, REACH)
        for way, end in zip(x[:, :160].movedim(1, 0), mode):
            top.plot(*way.T, color=hue(end.item() / 8), lw=0.4, alpha=0.8)
        panel(bottom, x[0], mode, 8, REACH)
        top.set_title(name, fontsize=9)
    axes[0, 0].set_ylabel("from noise to data")
    axes[1, 0].set_ylabel("which noise ends where")
    return png(figure)


def film(xs: dict[str, Tensor], frames: int = 48, rest: int = 12, n: int = 700) -> bytes:
    """A gif: the particles of each method from t = 1 to 0, then at rest. Steps are straight."""
    pictures = []
    for i in range(frames + rest):
        t = max(0.0, 1 - i / frames)
        figure, axes = plt.subplots(1, len(xs), figsize=(2 * len(xs), 2.3), dpi=80)
        for ax, (name, x) in zip(axes, xs.items()):
            panel(ax, at(x, t)[:n], ends(x[-1])[:n], 8, REACH)
            ax.set_title(name, fontsize=8)
        figure.suptitle(f"t = {t:.2f}", x=0.01, ha="left", fontsize=8)
        figure.tight_layout(pad=0.3)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png")
        plt.close(figure)
        pictures.append(Image.open(buffer).convert("P", palette=Image.Palette.ADAPTIVE, colors=64))
    gif, (first, *others) = io.BytesIO(), pictures
    first.save(gif, format="GIF", save_all=True, append_images=others, duration=90, loop=0)
    return gif.getvalue()


def at(x: Tensor, t: float) -> Tensor:
    """x (n, 2) at time t of particles x (times, n, 2) whose times are even."""
    where = (1 - t) * (len(x) - 1)
    i = min(int(where), len(x) - 2)
    return torch.lerp(x[i], x[i + 1], where - i)


def draw(verdicts: list, found: dict, ways: Callable[[str], Tensor], out: Path) -> None:
    """All four, into a folder. ways(row) -> x (times, n, 2) on the ring."""
    xs = {name: ways(name) for name in SHOWN}
    write(out / "claims.png", dots(verdicts))
    write(out / "time.png", curves({name: found["ring"][name] for name in CURVES}))
    write(out / "paths.png", paths(xs))
    write(out / "paths.gif", film({name: xs[name] for name in SHOWN if name != "DMD, 1 step"}))
