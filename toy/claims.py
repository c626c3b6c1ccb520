"""Test nine claims of the paper where the answers can be computed, with error bars over seeds.

    python toy/claims.py             every method on every toy; hours on two cores
    python toy/claims.py --quick     the same in miniature
    python toy/claims.py --digits    the methods on digits, half of the preset's updates

A row per claim: one word (holds, does not hold, too small to matter, unclear) and the part that
decides it. Each run leaves a file in --out/runs and is not repeated: delete them after a change of
the code.
"""

import copy
import math
import multiprocessing
import re
import signal
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from functools import cache, partial
from itertools import product, repeat
from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parent.parent))  # run as a script

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from tqdm import tqdm

import train
from losses import v_target
from models import cli, common
from models.common import normal, stream
from models.media import Figure, to_png
from models.runs import environment
from moe import chunked
from phases import rollout
from sde import diffuse, transition
from toy import digits, toy2d
from toy.mixtures import TOYS, mean_distance, mode_coverage

CPU = torch.device("cpu")
VANILLA = dict(phases=1, truncate=False)
METHODS = {  # settings of train.py; they cannot express "one shared network", see train_method
    "DMD, 1 step": dict(phases=1, steps=1),
    "vanilla DMD": VANILLA,
    "DMD2, truncated fake": dict(phases=1, fake_rollout="truncated"),
    "DMD2, complete fake": dict(phases=1, fake_rollout="complete"),
    "DMD2, a fake per depth": dict(phases=1, fake_rollout="per-depth"),
    "Phased 4 / 2, truncated fake": dict(phases=2, fake_rollout="truncated"),
    "Phased 4 / 2, complete fake": dict(phases=2, fake_rollout="complete"),
    "Phased 4 / 2, a fake per depth": dict(phases=2, fake_rollout="per-depth"),
    "Phased 4 / 4": dict(phases=4),  # one step per phase: the three fakes are one
    "disjoint intervals": dict(phases=2, interval="disjoint"),
    "biased target": dict(phases=2, target="biased"),
    "one shared network, truncated fake": dict(phases=2, fake_rollout="truncated"),
    "one shared network": dict(phases=2),
    "vanilla, t = 0.1": VANILLA | dict(fix_t=0.1),
    "vanilla, t = 0.357": VANILLA | dict(fix_t=0.357),
}
FAKES = "truncated fake", "complete fake", "a fake per depth"
SQUARE = [f"{name}, {fake}" for name in ("DMD2", "Phased 4 / 2") for fake in FAKES]
SQUARE += ["Phased 4 / 4"]
PHASED = "Phased 4 / 2, complete fake"
MIDDLE = "vanilla, t = 0.357"
FEWER = [*SQUARE, "biased target", "disjoint intervals"]
FEWER += ["one shared network, truncated fake", "one shared network"]
MAIN, MATCHING = ("ring", "grid", "conditional"), ("matching ring", "matching grid")
TABLES = {  # name: settings of the distribution, methods, seeds
    "ring": (dict(toy="ring"), [name for name in METHODS if name != "DMD, 1 step"], 5),
    "grid": (dict(toy="grid"), FEWER, 3),
    "conditional": (dict(toy="ring", classes=True), FEWER, 3),
    "spirals": (dict(toy="spirals"), SQUARE, 3),
    "memory": (dict(toy="ring"), ("vanilla", "phased"), 2),
    "matching ring": (dict(toy="ring"), ("Eq. 11", "naive"), 5),
    "matching grid": (dict(toy="grid"), ("Eq. 11", "naive"), 5),
    "digits": (dict(teacher="mnist"), ["DMD, 1 step", *FEWER[:9]], 5),
}
# of digits: the best of 1e-4, 3e-4 and 1e-3 for one other seed (commit 7c78d84); else the preset's
DIGIT_RATES = {
    "DMD, 1 step": 1e-3,
    "DMD2, truncated fake": 1e-4,
    "DMD2, a fake per depth": 1e-3,
    "Phased 4 / 4": 1e-3,
}


# 97.5 % quantiles of Student's t with 1, 2, ... degrees of freedom
T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
T_975 += (2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093)


class Part(NamedTuple):
    """A comparison. The claim says that the difference is above min_effect on average."""

    name: str
    differences: list[float]  # paired; one per seed
    min_effect: float

    def __str__(self) -> str:
        numbers = "{:+.2g} [{:+.2g}, {:+.2g}]".format(*interval(self.differences))
        return f"{self.name}: {numbers}, limit {self.min_effect:g}"

    def margin(self) -> float:
        """Distance of the interval to the limit, in half widths: it has no unit."""
        middle, low, high = interval(self.differences)
        return (low - self.min_effect) / max(high - middle, 1e-9)


def interval(values: list[float]) -> tuple[float, float, float]:
    """Mean over seeds, and the ends of its 95 % confidence interval."""
    half = T_975[len(values) - 2] * stdev(values) / math.sqrt(len(values))
    return mean(values), mean(values) - half, mean(values) + half


def part_verdict(part: Part) -> str:
    """The verdict of one part, by where its confidence interval lies."""
    _, low, high = interval(part.differences)
    limit = abs(part.min_effect)
    if low > part.min_effect:
        return "holds"
    if high < -limit:  # an opposite effect
        return "does not hold"
    return "too small to matter" if -limit < low and high < limit else "unclear"


VERDICTS = "does not hold", "unclear", "too small to matter", "holds"  # worst first


def decide(parts: list[Part]) -> Part:
    """The part whose verdict is that of the claim: the worst one."""
    return min(parts, key=lambda part: (VERDICTS.index(part_verdict(part)), part.margin()))


CLAIMS = {
    "1": "the subinterval target is unbiased and the naive one is not (Fig. 2)",
    "2": "truncation lowers the diversity of DMD2, Phased DMD keeps more (Table 3), truncated fake",
    "2c": "the same with a complete fake",
    "3": "Phased DMD is closer to the teacher than DMD2, 4 phases closer than 2 (Tables 2, 6), "
    "truncated fake",
    "3c": "the same with a complete fake",
    "4": "the biased target harms distillation, not only scores (A2)",
    "5": "nested intervals beat disjoint ones (Fig. 10)",
    "6": "noise that is large beside the distance of modes makes DMD converge (Fig. 11, other t)",
    "7": "training the last expert longer changes detail and keeps structure (Fig. 8)",
    "8": "the memory of a phase does not grow with N, that of vanilla does (Fig. 1)",
    "9": "the gain is not due to the student's parameters (one network for both phases; two "
    "fakes), truncated fake",
    "9c": "the same with a complete fake",
}
ENERGY, KEPT, MOVED = 0.001, "part that keeps its mode", "distance of those that do, in sd"
DIGITS, FRECHET = ("digits",), 0.5
DMD2, DMD2_COMPLETE, PHASED_TRUNCATED = SQUARE[0], SQUARE[1], SQUARE[3]
COMPARISONS = (  # claim, tables, greater, smaller, metric, smallest difference that matters
    ("1", MATCHING, "naive", "Eq. 11", "bias", 0.05),
    ("1", MATCHING, 0.001, "Eq. 11", "bias", 0.0),
    ("2", ("ring",), "vanilla DMD", DMD2, "coverage", 0.05),
    ("2", (*MAIN, "spirals"), PHASED_TRUNCATED, DMD2, "coverage", 0.05),
    ("2", DIGITS, PHASED_TRUNCATED, DMD2, "coverage", 0.01),
    ("2c", (*MAIN, "spirals"), PHASED, DMD2_COMPLETE, "coverage", 0.05),
    ("2c", DIGITS, PHASED, DMD2_COMPLETE, "coverage", 0.01),
    ("3", (*MAIN, "spirals"), DMD2, PHASED_TRUNCATED, "energy", ENERGY),
    ("3", (*MAIN, "spirals"), PHASED_TRUNCATED, "Phased 4 / 4", "energy", ENERGY),
    ("3", DIGITS, DMD2, PHASED_TRUNCATED, "frechet", FRECHET),
    ("3c", (*MAIN, "spirals"), DMD2_COMPLETE, PHASED, "energy", ENERGY),
    ("3c", (*MAIN, "spirals"), PHASED, "Phased 4 / 4", "energy", ENERGY),
    ("3c", DIGITS, DMD2_COMPLETE, PHASED, "frechet", FRECHET),
    ("4", MAIN, "biased target", PHASED, "energy", ENERGY),
    ("4", DIGITS, "biased target", PHASED, "frechet", FRECHET),
    ("5", MAIN, "disjoint intervals", PHASED, "energy", ENERGY),
    ("5", DIGITS, "disjoint intervals", PHASED, "frechet", FRECHET),
    ("6", ("ring",), "vanilla, t = 0.1", MIDDLE, "energy", ENERGY),
    ("7", MAIN, PHASED, 0.95, KEPT, 0.0),
    ("7", MAIN, PHASED, 0, MOVED, 0.2),
    ("8", ("memory",), "vanilla", "phased", "growth", 1.0),
    ("8", ("memory",), 1.05, "phased", "growth", 0.0),
    ("9", MAIN, DMD2, "one shared network, truncated fake", "energy", ENERGY),
    ("9c", MAIN, DMD2_COMPLETE, "one shared network", "energy", ENERGY),
)
METRICS = "energy", "energy of x_(t_1)", "precision", "spread", "coverage", "pairwise distance"
DEPTHS = "depth 1", "depth 2", "depth 3", "depth 4", "all depths"


def list_parts(claim: str, results: dict) -> list[Part]:
    """The parts of a claim, one per comparison and table, from results[table][method] = runs."""
    parts = []
    for _, tables, greater, smaller, metric, limit in (c for c in COMPARISONS if c[0] == claim):
        for table in tables:
            runs = results.get(table, {})
            if any(isinstance(x, str) and x not in runs for x in (greater, smaller)):
                continue  # not trained
            # a number in the place of a method is compared with each run
            a, b = ([r[metric] for r in runs.get(x, ())] or repeat(x) for x in (greater, smaller))
            name = f"{table}: {greater} - {smaller}, {metric}"
            parts.append(Part(name, [x - y for x, y in zip(a, b)], limit))
    return parts


# -- training ------------------------------------------------------------------------------------


class Job(NamedTuple):
    """One run. Its result is the JSON file Job.file."""

    table: str
    name: str
    seed: int
    lr: float
    scale: int = 1  # divides the updates, and the samples of a toy

    def file(self, out: Path) -> Path:
        return out / "runs" / (re.sub(r"[^\w.]+", "-", "_".join(map(str, self))) + ".json")


@cache
def start_tensors(toy: str, classes: str) -> dict[str, Tensor]:
    """Tensors that all networks of a toy start from, fitted as train.py does."""
    return toy2d.fit_start(train.make_config(toy=toy, classes=classes))


def new_run(job: Job, **settings) -> train.Run:
    """A run of the job's method before its first phase, without a folder."""
    settings = TABLES[job.table][0] | METHODS.get(job.name, {}) | settings
    warmup = 100 if job.table == "digits" else 400  # fake updates, over all phases
    per_phase = {"iters": 800, "warmup": warmup}
    settings |= {name: n // job.scale // settings["phases"] for name, n in per_phase.items()}
    settings |= dict(seed=job.seed, lr=job.lr, eval_samples=10_000 // job.scale)
    cfg = train.make_config(**settings)
    train.validate(cfg)
    roles = None  # as the preset makes them
    if job.table != "digits":
        start = start_tensors(cfg.toy, cfg.classes)
        roles = toy2d.roles_from(cfg, train.phases_of(cfg), CPU, start)
    return train.make_run(cfg, CPU, Path(), roles)


def train_method(job: Job) -> Iterator[train.Run]:
    """Train. Yields the run after every iteration.

    One shared network: it is the expert of every phase, with one optimizer. The phases take turns
    at each iteration, and each has its own fake, in a run of its own.
    """
    run = new_run(job)
    if not job.name.startswith("one shared network"):
        train.begin_phase(run, 1)
        for _ in train.train(run):
            yield run
        return
    student = run.roles.student[1]
    runs = [run, *(new_run(job) for _ in run.phases[1:])]
    for k, run in enumerate(runs, 1):
        shared = {j: replace(student, name=f"student{j}") for j in run.roles.student}
        run.roles.student.update(shared)
        train.begin_phase(run, k)
        run.optimizers[f"student{k}"] = runs[0].optimizers["student1"]
    for _ in range(run.cfg.warmup + run.cfg.iters):
        for run in runs:
            train.run_iteration(run)
            run.i += 1
        yield run


def run_toy(job: Job) -> dict:
    """Train a method on a toy and measure it."""
    for run in train_method(job):
        if run.i == run.cfg.iters // 4:
            early = copy.deepcopy(run.roles.student[run.k].velocity)
    cfg = run.cfg
    mixture = toy2d.load_mixture(run.cfg)
    xs, c = toy2d.sample_nets(cfg, run.nets, run.times, cfg.eval_samples, CPU)
    exact = lambda s: mixture.sample_at(s, len(xs[0]), stream("exact", cfg.seed, s or 0), c)
    modes, precision, spread = mode_coverage(xs[-1], mixture)
    coverage = modes / mode_coverage(exact(0.0), mixture)[0]
    metrics = {"lr": job.lr, "precision": precision, "spread": spread, "coverage": coverage}
    metrics["energy"], metrics["pairwise distance"] = compare(xs[-1], exact(0.0), c)
    for name, x in sample_depths(run, xs[0], c).items():
        metrics[name] = compare(x, exact(0.0), c)[0]
    if len(run.phases) > 1:
        x = xs[run.phases[0].end]
        s = run.phases[0].s
        metrics["energy of x_(t_1)"] = compare(x, exact(s), c)[0]
    return metrics | (compare_early(run, early) if job.name == PHASED else {})


@torch.no_grad()
def sample_depths(run: train.Run, z: Tensor, c: dict | None) -> dict[str, Tensor]:
    """Samples of each truncation depth of the last phase, and of all depths in equal parts.

    Users draw the last depth. It has the noise z, the others have noise of their own.
    """
    phase = run.phase
    nets = [chunked(net, 1000) for net in run.nets]
    x = {}
    for depth in range(1, phase.num_steps + 1):
        own = z if depth == phase.num_steps else normal(z.shape, "depths", run.cfg.seed, depth)
        x[f"depth {depth}"] = rollout(nets, run.times, phase, own, c, depth)
    turns = torch.arange(len(z)) // digits.CLASSES % phase.num_steps  # every class in every depth
    return x | {"all depths": torch.stack([*x.values()])[turns, torch.arange(len(z))]}


def compare(x: Tensor, y: Tensor, c: dict | None) -> tuple[float, float]:
    """Energy distance of x and y, and mean distance within x over that within y; by class."""
    groups = [slice(None)] if c is None else [c["class"] == i for i in c["class"].unique()]
    between = mean(mean_distance(x[group], y[group]) for group in groups)
    within_x, within_y = (mean(mean_distance(z[group]) for group in groups) for z in (x, y))
    return 2 * between - within_x - within_y, within_x / within_y


def compare_early(run: train.Run, early: torch.nn.Module) -> dict:
    """How samples change while the last expert trains; early: this expert at a quarter of it."""
    mixture = toy2d.load_mixture(run.cfg)
    n = run.cfg.eval_samples
    nets = [early if net is run.roles.student[run.k] else net for net in run.nets]
    x, late = (
        toy2d.sample_nets(run.cfg, each, run.times, n, CPU)[0][-1] for each in (nets, run.nets)
    )
    distance, mode = torch.cdist(x, mixture.means).min(1)
    kept = mode == toy2d.nearest_mode(late, mixture)
    moved = (x - late).norm(dim=1)[kept].mean() / mixture.sd
    share = {KEPT: kept, KEPT + ", of those within 3 sd": kept[distance <= 3 * mixture.sd]}
    return {name: x.double().mean().item() for name, x in share.items()} | {MOVED: moved.item()}


def run_memory(job: Job) -> dict:
    """Growth of what autograd saves for one student update, from 1 step to 8 steps."""
    total = []
    for steps in (1, 8):
        settings = dict(phases=steps) if job.name == "phased" else VANILLA
        run = new_run(job, **settings, steps=steps)
        saved = []
        train.begin_phase(run, len(run.phases))
        save = lambda x, saved=saved: saved.append(x) or len(saved) - 1
        with saved_tensors_hooks(save, saved.__getitem__):
            train.update_student(run, 0)
        storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in saved}
        total.append(sum(storages.values()))
    return {"growth": total[1] / total[0]}


def run_matching(job: Job) -> dict:
    """Rms distance of the mean of a target from the exact velocity, over t in (0.5, 1).

    Eq. 11 and the naive eps - x_s are linear in x_s and eps, and E[eps | x_t] = -sigma_ts score.
    """
    mixture = TOYS[job.table.split()[1]]().double()
    key = ("matching", job.seed)
    s = 0.5
    n = 10_000
    t = s + (1 - s) * torch.rand(n, generator=stream(*key, "test t")).double()
    x_s = mixture.sample_at(s, n, stream(*key, "test"))
    eps = normal((n, 2), *key, "test eps")
    x_t = diffuse(x_s, s, t, eps)
    alpha_ts, sigma_ts = transition(s, t, x_s)
    eps = -sigma_ts * mixture.score(x_t, t)
    x_s = (x_t - sigma_ts * eps) / alpha_ts
    target = v_target(x_s, s, t, eps) if job.name == "Eq. 11" else eps - x_s
    return {"bias": (target - mixture.velocity(x_t, t)).square().sum(1).mean().sqrt().item()}


def run_digits(job: Job) -> dict:
    """Train a method on digits and measure it; see digits.measure."""
    classifier = digits.load_classifier()
    reference = digits.load_reference()
    labels = digits.cycle_labels(10_000)
    *_, run = train_method(job)
    z = normal((len(labels), *digits.SHAPE), "claims", job.seed, "z")
    measured = {}
    for name, x in sample_depths(run, z, digits.conditions(labels)).items():
        found = digits.classify(classifier, digits.to_pixels(x))
        measured[name] = digits.measure(*found, labels, reference)
    last = measured[f"depth {run.phase.num_steps}"]  # what users draw
    distances = {name: metrics["frechet"] for name, metrics in measured.items()}
    return last | distances | {"lr": job.lr}


KINDS = dict(memory=run_memory, matching=run_matching, digits=run_digits)


def run_job(job: Job, out: Path) -> None:
    """Run a job on one thread and write its result."""
    torch.set_num_threads(1)
    try:
        result = KINDS.get(job.table.split()[0], run_toy)(job)
    except common.UserError as error:  # diverged
        raise common.UserError(f"{job.file(out).stem}: {error}") from None
    common.write_json(job.file(out), environment("cpu", 1, 1) | result)


def run_jobs(jobs: list[Job], args) -> list[dict]:
    """The results of the jobs; those that exist are read. One process per core."""
    todo = [job for job in jobs if not job.file(args.out).exists()]
    ignore = signal.SIGINT, signal.SIG_IGN  # Ctrl-C is handled by the parent
    with multiprocessing.get_context("spawn").Pool(None, signal.signal, ignore) as pool:
        done = pool.imap_unordered(partial(run_job, out=args.out), todo)
        list(tqdm(done, "training", len(todo), disable=None))
    return [common.read_json(job.file(args.out), "delete it and run again") for job in jobs]


def format_table(methods: dict, metrics: tuple[str, ...]) -> str:
    """Markdown: a row per method, mean and half of the 95 % interval of each metric."""
    rows = ["| method | " + " | ".join(metrics) + " |", "|---" * (len(metrics) + 1) + "|"]
    for name, runs in methods.items():
        found = [interval([run[x] for run in runs]) if x in runs[0] else () for x in metrics]
        cells = [f"{x[0]:.4g} ± {x[2] - x[0]:.2g}" if x else "-" for x in found]
        rows.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def write_report(jobs: list[Job], args) -> None:
    """Run the jobs, then print, draw and write what their results mean."""
    results = defaultdict(lambda: defaultdict(list))
    for job, result in zip(jobs, run_jobs(jobs, args)):
        results[job.table][job.name].append(result)
    claims = []
    rows = ["| | claim | verdict | the part that decides |", "|---|---|---|---|"]
    for n, sentence in CLAIMS.items():
        parts = list_parts(n, results)
        if parts:
            worst = decide(parts)
            rows.append(f"| {n} | {sentence} | {part_verdict(worst)} | {worst} |")
            lines = [f"{part}: {part_verdict(part)}" for part in parts]
            found = dict(claim=n, verdict=part_verdict(worst), decides=str(worst), parts=lines)
            claims.append(found)
    digit_metrics = "accuracy", "frechet", "coverage", "diversity", "lr"
    names = [table for table in results if table not in ("memory", *MATCHING)]
    tables = []
    for table in names:
        for metrics in (digit_metrics if table == "digits" else METRICS, DEPTHS):
            tables.append(f"{table}\n\n" + format_table(results[table], metrics))
    text = "\n\n".join(["\n".join(rows), *tables])
    print(text)
    how = {"claims": claims, "results": results}
    common.write_json(args.out / "claims.json", environment("cpu", 1, 1) | how)
    common.write_file(args.out / "claims.md", text.encode())
    common.write_file(args.out / "depths.png", plot_depths(results))


def plot_depths(results: dict) -> bytes:
    """Plot the distance to the data of each truncation depth, and of all depths together."""
    table, distance = ("digits", "Fréchet") if "digits" in results else ("ring", "energy")
    figure = Figure((5.2, 3.6), layout="constrained")
    ax = figure.subplots()
    for i, name in enumerate((*SQUARE[:3], PHASED)):
        runs = results[table].get(name, [{}])
        keys = [key for key in DEPTHS if key in runs[0]]
        x = [DEPTHS.index(key) + 1 + i / 8 for key in keys]
        ends = [interval([run[key] for run in runs]) for key in keys]
        # the axis is logarithmic: intervals end at a tenth of the mean
        ax.vlines(x, [max(low, y / 10) for y, low, _ in ends], [high for *_, high in ends], f"C{i}")
        ax.plot(x, [y for y, *_ in ends], f"C{i}o", label=name)
    ax.set(title=table, yscale="log", xlabel="truncation depth", ylabel=f"{distance} distance")
    ax.set_xticks(range(1, 6), ["1", "2", "3", "4", "all"])
    ax.legend(fontsize=8)
    return to_png(figure)


def main() -> None:
    """Run what is missing, then print what it means."""
    parser = cli.Parser(__doc__)
    mode = partial(parser.add_mutually_exclusive_group().add_argument, dest="mode")
    mode = partial(mode, action="store_const", default="")
    mode("--quick", const="quick", help="a fifth of the training, 3 seeds")
    mode("--digits", const="digits", help="digits instead of toys")
    add = parser.add_argument
    add("--seeds", type=int, help="at most so many: 0, 1, ... (default 5 or 3, see TABLES)")
    add("--tables", nargs="+", choices=TABLES, metavar="NAME", help=f"of {', '.join(TABLES)}")
    add("--out", type=Path, help="folder (default out/claims, out/claims-quick, ...)")
    args = parser.parse_args()
    if args.seeds is None:
        args.seeds = 3 if args.mode == "quick" else 10
    if not 2 <= args.seeds <= 20:
        raise common.UserError(f"--seeds: expected 2 to 20, got {args.seeds}")
    folder = "claims" if not args.mode else f"claims-{args.mode}"
    args.out = args.out or Path("out") / folder
    toys = [table for table in TABLES if table != "digits"]
    tables = args.tables or (["digits"] if args.mode == "digits" else toys)
    scale = {"quick": 5, "digits": 2}.get(args.mode, 1)
    jobs = []
    for seed, table in product(range(args.seeds), tables):
        _, methods, seeds = TABLES[table]
        rates = DIGIT_RATES if table == "digits" else {}
        lr = 3e-4 if table == "digits" else 1e-3
        if seed < seeds:
            jobs += [Job(table, name, seed, rates.get(name, lr), scale) for name in methods]
    write_report(jobs, args)


if __name__ == "__main__":
    advice = "run the same command again to continue"
    sys.exit(cli.exit_status("claims.py", main, restart_advice=advice))
