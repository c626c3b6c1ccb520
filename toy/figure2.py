"""Fig. 2 of the paper: learn the velocity on (0.5, 1] without clean samples, correctly and naively.

    python toy/figure2.py          about 2 minutes on two cores; writes out/figure2/figure2.png

The data are four points on a line. Three networks learn the velocity from scratch:
(a) from clean samples, Eq. 4 on (0, 1];  (b) only from samples x_s at s = 0.5, Eq. 13 on (0.5, 1];
(c) from the same samples with the naive target eps - x_s. (b) agrees with (a), (c) does not.
"""

import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # run as a script

import torch
from torch import Tensor
from tqdm import tqdm

from losses import flow_matching, subinterval_matching
from models.cli import Parser, exit_status
from models.common import UserError, normal, stream, write_file
from models.media import Figure, to_png
from models.runs import own_folder
from phases import trajectory
from sde import diffuse
from toy.mixtures import Mixture
from toy.toy2d import MLP

POINTS = Mixture(torch.tensor([[-1.0], [0.0], [1.0], [2.0]]), 0.0, torch.zeros(4, dtype=torch.long))
END = 0.5  # s, the end of the subinterval
SOLVER_STEPS, NUM_PATHS = 100, 200


def naive(v: Tensor, x_s: Tensor, s: float, t: Tensor, eps: Tensor) -> Tensor:
    """Eq. 4 with x_s in place of x_0: correct at s = 0 only."""
    return flow_matching(v, x_s, eps)


# name: (s of the samples, loss)
OBJECTIVES = {"a": (0.0, naive), "b": (END, subinterval_matching), "c": (END, naive)}


def fit(
    name: str, steps: int, data=POINTS, width=512, key=("figure2",), lr=1e-3, progress=tqdm
) -> MLP:
    """Train a network of 4 layers from scratch on one of the objectives."""
    s, loss_per_sample = OBJECTIVES[name]
    batch = 512
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = MLP(dim=data.means.shape[1], width=width, layers=4)
    optimizer = torch.optim.Adam(net.parameters(), lr, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for i in progress(range(steps), f"({name}) on ({s:g}, 1]"):
        x_s = data.sample_at(s, batch, stream(*key, i, "x_s"))
        t = 1 - (1 - s) * torch.rand(batch, generator=stream(*key, i, "t"))  # in (s, 1]
        eps = normal(x_s.shape, *key, i, "eps")
        loss = loss_per_sample(net(diffuse(x_s, s, t, eps), t), x_s, s, t, eps).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return net


@torch.no_grad()
def solve(net: Callable, end: float) -> Tensor:
    """Euler paths x (times, NUM_PATHS) from t = 1 to end, from the same noise for every network."""
    times = [1 - i / SOLVER_STEPS for i in range(round(SOLVER_STEPS * (1 - end)) + 1)]
    z = normal((NUM_PATHS, 1), "figure2", "z")
    return torch.stack(list(trajectory([net] * (len(times) - 1), times, z)))[..., 0]


def draw_figure(paths: dict[str, Tensor]):
    """The paths of (a); every sixth path of (b) and (c) over (a); their mean distance from (a)."""
    figure = Figure((13, 3.4), layout="constrained")
    axes = figure.subplots(1, 4)
    axes[0].plot(torch.linspace(1, 0, len(paths["a"])), paths["a"], color="0.3", lw=0.4)
    axes[0].set(title="(a) Eq. 4, clean samples", xlim=(1, 0), xlabel="t")
    a = paths["a"][: len(paths["b"])]
    t = torch.linspace(1, END, len(a))
    titles = {"b": "(b) Eq. 13, samples at s = 0.5", "c": "(c) naive target"}
    for ax, name, color in zip(axes[1:], "bc", ("tab:blue", "tab:red")):
        ax.plot(t, a[:, ::6], color="0.8", lw=3)
        ax.plot(t, paths[name][:, ::6], color=color, lw=0.8)
        ax.set(title=f"{titles[name]}; (a) grey", xlim=(1, END), xlabel="t")
        axes[3].plot(t, (paths[name] - a).abs().mean(1), color=color, label=f"({name})")
    axes[3].set(title="mean distance from (a)", xlim=(1, END), xlabel="t")
    axes[3].legend()
    return figure


def main() -> None:
    """Train the three networks, draw the figure, print the distances."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--steps", type=int, default=2000, help="training steps per network (default 2000)")
    add("--out", type=Path, default=Path("out/figure2"), help="folder (default out/figure2)")
    args = parser.parse_args()
    if not 1 <= args.steps <= 10**6:
        raise UserError(f"--steps: expected 1 to a million, got {args.steps}")
    with own_folder(args.out):
        paths = {name: solve(fit(name, args.steps), OBJECTIVES[name][0]) for name in OBJECTIVES}
        write_file(args.out / "figure2.png", to_png(draw_figure(paths)))
        a = paths["a"][: len(paths["b"])]
        exact = solve(POINTS.velocity, END)
        b, c = ((paths[name] - a).abs().mean().item() for name in "bc")
        print(f"distance of (a) from exact paths {(a - exact).abs().mean():.4f}")
        print(f"distance b {b:.4f} c {c:.4f}\nfolder: {args.out}")


if __name__ == "__main__":
    sys.exit(exit_status("figure2.py", main))
