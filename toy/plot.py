"""What the toys' pictures share."""

from torch import Tensor

from models.pictures import plt, png  # noqa: F401, also of the toys' pictures


def panel(ax, x: Tensor, colour: Tensor | None, colours: int, reach: float) -> None:
    """Points of x (n, d), first two axes (one: a histogram), coloured by `colour` (n,) or grey."""
    ax.set_xticks([])
    ax.set_yticks([])
    ax.set_xlim(-reach, reach)
    if x.shape[1] == 1:
        ax.hist(x[:, 0].numpy(), bins=80, range=(-reach, reach), color="tab:blue")
        return
    colours = dict(c="0.4") if colour is None else dict(c=colour, cmap="hsv", vmin=0, vmax=colours)
    ax.scatter(x[:, 0], x[:, 1], s=1.5, alpha=0.5, linewidths=0, **colours)
    ax.set_ylim(-reach, reach)
    ax.set_aspect("equal")


def reach_of(x: Tensor) -> float:
    """Half the width of a panel that shows nearly all of x."""
    return 1.2 * x.abs().max(1).values.quantile(0.99).item()
