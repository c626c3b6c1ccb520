"""DMD2 with two kinds of fake beside Phased DMD on the ring: the same noise and number of updates.

    python toy/compare.py          two minutes; writes out/compare/compare.png

Rows: the exact teacher with 40 steps, then students of 4 steps: DMD2 (one phase) whose fake learns
from truncated rollouts, DMD2 whose fake learns from complete ones, and Phased DMD (two phases). A
sample has the colour of the mode where its path ends. Energy is the distance to exact samples at
the same t, 0 if the distributions are equal.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # run as a script

import torch
from tqdm import tqdm

import train
from models.cli import Parser, exit_status
from models.common import UserError, stream, write_file
from models.media import Figure, to_png
from models.runs import own_folder
from phases import step_times
from toy.mixtures import energy, mode_coverage
from toy.toy2d import (
    exact_teacher,
    fit_start,
    load_mixture,
    nearest_mode,
    plot_points,
    roles_from,
    sample_nets,
)

SHOWN = 5000  # samples in a panel
UPDATES, WARMUP = 800, 400  # of the student and of the fake, over all phases
CPU, TIMES, SAMPLES = torch.device("cpu"), (1.0, 0.75, 0.5, 0.25, 0.0), 10_000


STUDENTS = {  # the row's name: settings of train.py
    "DMD2, 4 steps\ntruncated fake": dict(phases=1, fake_rollout="truncated"),
    "DMD2, 4 steps\ncomplete fake": dict(phases=1),
    "Phased DMD\n4 steps, 2 phases": dict(phases=2),
}


def train_student(settings: dict, seed: int, start: dict, out: Path) -> train.Run:
    """A student of four steps, trained with these settings."""
    phases = settings["phases"]
    settings = settings | dict(iters=UPDATES // phases, warmup=WARMUP // phases, seed=seed)
    cfg = train.make_config(**settings)
    run = train.make_run(cfg, CPU, out, roles_from(cfg, train.phases_of(cfg), CPU, start))
    train.begin_phase(run, 1)
    for _ in tqdm(train.train(run), "training", UPDATES + WARMUP, disable=None):
        pass
    return run


def figure(rows: dict[str, tuple[list, set]], mixture, seed: int) -> bytes:
    """A png. rows: name -> (x at each of TIMES, the times at which the method matches p(x_t))."""
    fig = Figure((11.5, 10), layout="constrained")
    axes = fig.subplots(len(rows), 5)
    limits = (2.6, 2.4, 2.4, 2.5, 2.6)
    for line, (name, (xs, matched)) in zip(axes, rows.items()):
        colors = nearest_mode(xs[-1], mixture)
        modes, precision, _ = mode_coverage(xs[-1], mixture)
        for i, (ax, x, t) in enumerate(zip(line, xs, TIMES)):
            plot_points(ax, x[:SHOWN], colors[:SHOWN], len(mixture.means), limits[i])
            exact = mixture.sample_at(t, len(x), stream("exact", seed, t or 0))  # as train.py
            text = "noise" if t == 1 else f"energy {max(energy(x, exact), 0):.4f}"
            if t == 0:
                text += f"\n{modes:.1f} of 8 modes, {100 * precision:.0f} % in a mode"
            ax.set_xlabel(text, fontsize=9)
            is_match = t in matched
            color = "tab:green" if is_match else "0.7"
            ax.spines[:].set(linewidth=3 if is_match else 0.8, color=color)
            if line[0] is axes[0, 0]:
                ax.set_title(f"t = {t:g}", fontsize=10)
        line[0].set_ylabel(name, fontsize=11)
    fig.suptitle(
        "Green frame: training matches the student's samples to the data, diffused to this t.  "
        "Energy: distance to that data, 0 is best.\n"
        "Colour: the mode where a sample ends.  Same noise in every row, 800 updates per student.",
        fontsize=10,
    )
    return to_png(fig)


def main() -> None:
    """Train the students and draw the picture."""
    parser = Parser(__doc__)
    parser.add_argument("--seed", type=int, default=0, help="seed of all runs (default 0)")
    parser.add_argument("--out", type=Path, default=Path("out/compare"), help="folder")
    args = parser.parse_args()
    if args.seed < 0:
        raise UserError(f"--seed: expected at least 0, got {args.seed}")
    with own_folder(args.out):
        torch.set_num_threads(1)  # a second thread only waits at this size
        cfg = train.make_config(seed=args.seed)
        start = fit_start(cfg, lambda steps: tqdm(steps, "fitting", disable=None))
        mixture = load_mixture(cfg)
        teacher, _ = sample_nets(
            cfg, [exact_teacher(cfg)] * 40, step_times(40, cfg.shift), SAMPLES, CPU
        )
        rows = {"exact teacher\n40 steps": (teacher[::10], set())}
        for name, settings in STUDENTS.items():
            run = train_student(settings, args.seed, start, args.out)
            xs, _ = sample_nets(run.cfg, run.nets, run.times, SAMPLES, CPU)
            rows[name] = xs, {phase.s for phase in run.phases}
        write_file(args.out / "compare.png", figure(rows, mixture, args.seed))
        print(f"picture: {args.out / 'compare.png'}")


if __name__ == "__main__":
    sys.exit(exit_status("compare.py", main))
