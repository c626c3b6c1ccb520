"""Fig. 2 of the paper: score matching inside (0.5, 1] without clean samples, right and wrong.

    python toy/figure2.py          about 2 minutes on two cores; writes out/figure2/figure2.png

Data are four points on a line. Three networks learn the velocity from scratch:
(a) with clean samples, Eq. 4 on (0, 1];  (b) from samples x_s at s = 0.5 alone, Eq. 13 on (0.5, 1];
(c) the same with the naive target eps - x_s. (b) must lie on (a), (c) must not.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # run as a script from the project's root

import torch
from tqdm import tqdm

from losses import flow_matching, subinterval_matching
from models.mlp import MLP
from models.flags import Parser
from models.folder import make
from models.files import UserError, write
from models.draws import normal, stream
from sample import trajectory
from sde import diffuse
from toy.mixtures import Mixture
from toy.plot import plt, png

POINTS = Mixture(torch.tensor([[-1.0], [0.0], [1.0], [2.0]]), 0.0, torch.zeros(4, dtype=torch.long))
S = 0.5  # where the subinterval ends
SOLVER_STEPS, TRAJECTORIES = 100, 200


def plain(v, x_s, s, t, eps):
    """Eq. 4 with x_s in the place of x_0: right at s = 0, naive above, || v - (eps - x_s) ||^2."""
    return flow_matching(v, x_s, eps)


# name: (where samples are taken, loss)
OBJECTIVES = {"a": (0.0, plain), "b": (S, subinterval_matching), "c": (S, plain)}


def fit(name: str, steps: int, data=POINTS, width=512, where=("figure2",), lr=1e-3, bar=tqdm):
    """The 4-layer MLP, of width 512, trained from scratch on one of the three objectives."""
    (s, objective), batch = OBJECTIVES[name], 512
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = MLP(dim=data.means.shape[1], width=width, layers=4)
    optimizer = torch.optim.Adam(net.parameters(), lr, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for i in bar(range(steps), f"({name}) on ({s:g}, 1]"):
        x_s = data.sample_at(s, batch, stream(*where, i, "x_s"))
        t = 1 - (1 - s) * torch.rand(batch, generator=stream(*where, i, "t"))  # (s, 1]
        eps = normal(x_s.shape, *where, i, "eps")
        loss = objective(net(diffuse(x_s, s, t, eps), t), x_s, s, t, eps).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return net


def paths(net, end: float) -> torch.Tensor:
    """Euler from t = 1 to end, from the same noise for every network: (times, TRAJECTORIES)."""
    times = [1 - i / SOLVER_STEPS for i in range(round(SOLVER_STEPS * (1 - end)) + 1)]
    z = normal((TRAJECTORIES, 1), "figure2", "z")
    with torch.no_grad():
        return torch.stack(list(trajectory([net] * (len(times) - 1), times, z)))[..., 0]


def figure(found: dict[str, torch.Tensor]):
    """(a) to the end; every sixth path of (b) and of (c) over (a); how far they are from (a)."""
    fig, axes = plt.subplots(1, 4, figsize=(13, 3.4), layout="constrained")
    colours = {"b": "tab:blue", "c": "tab:red"}
    n = len(found["b"])  # times inside [S, 1]
    axes[0].plot(torch.linspace(1, 0, len(found["a"])), found["a"], color="0.3", lw=0.4)
    axes[0].set(title="(a) Eq. 4, clean samples", xlim=(1, 0), xlabel="t")
    titles = {"b": "(b) Eq. 13, samples at s = 0.5", "c": "(c) naive target"}
    for ax, name in zip(axes[1:], colours):
        ax.plot(torch.linspace(1, S, n), found["a"][:n, ::6], color="0.8", lw=3)
        ax.plot(torch.linspace(1, S, n), found[name][:, ::6], color=colours[name], lw=0.8)
        ax.set(title=f"{titles[name]}; (a) grey", xlim=(1, S), xlabel="t")
        gap = (found[name] - found["a"][:n]).abs().mean(1)
        axes[3].plot(torch.linspace(1, S, n), gap, color=colours[name], label=f"({name})")
    axes[3].set(title="mean distance from (a)", xlim=(1, S), xlabel="t")
    axes[3].legend()
    return fig


def main() -> int:
    parser = Parser(__doc__)
    parser.add_argument(
        "--steps", type=int, default=2000, help="training steps of each network (default 2000)"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("out/figure2"), help="folder (default out/figure2)"
    )
    args = parser.parse_args()
    if not 1 <= args.steps <= 10**6:
        raise UserError("--steps must be from 1 to a million")
    make(args.out)  # before the work, not after it
    nets = {name: fit(name, args.steps) for name in OBJECTIVES}
    found = {name: paths(net, OBJECTIVES[name][0]) for name, net in nets.items()}
    write(args.out / "figure2.png", png(figure(found)))
    a, exact = found["a"][: len(found["b"])], paths(POINTS.velocity, S)
    distance = {name: (found[name] - a).abs().mean().item() for name in "bc"}
    print(f"(a) lies {(a - exact).abs().mean():.4f} from exact paths; see {args.out}/figure2.png")
    print(f"distance b {distance['b']:.4f} c {distance['c']:.4f}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        print(f"figure2.py: {error}", file=sys.stderr)
        sys.exit(2)
