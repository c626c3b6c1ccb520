"""What toy/claims.py compares: the rows of its tables, how each is trained, what is measured.

Every row is trained by train.py's own loop, with settings that train.py takes. A few rows have a
`variant` besides: it changes which network a role is, or what it starts from, and is made here.
"""

import re
import time
import weakref
from collections import Counter
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Iterator, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import moe
import train
from losses import v_target
from models.draws import normal, stream
from models.files import UserError
from models.meter import Meter
from phases import Phase, step_times
from sample import recorded, rollout, trajectory
from sde import coefficients, diffuse, kernel, like
from toy import figure2, toy2d
from toy.mixtures import TOYS, Mixture, energy, mean_distance

CPU = torch.device("cpu")


class Row(NamedTuple):
    """A method: settings of train.py, and what they cannot say.

    kept    the fake goes on from phase to phase
    shared  one network is the student of all phases, which take turns
    random  the student starts from a network that has seen nothing
    learnt  so it does, and the teacher is a network, fitted where data are, not the exact velocity
    """

    settings: dict
    variant: str = ""


VANILLA = dict(phases=1, truncate="off")
TEACHERS = {"teacher, 40 steps": 40, "teacher, 4 steps": 4}
ROWS = {
    "DMD, 1 step": Row(dict(phases=1, steps=1)),
    "vanilla DMD": Row(VANILLA),
    "DMD2": Row(dict(phases=1)),
    "Phased 4 / 2": Row(dict(phases=2)),
    "Phased 4 / 4": Row(dict(phases=4)),
    "disjoint intervals": Row(dict(phases=2, interval="disjoint")),
    "biased target": Row(dict(phases=2, target="biased")),
    "DMD2, a fake per depth": Row(dict(phases=1, fake_per_depth=True)),
    "Phased, a fake per depth": Row(dict(phases=2, fake_per_depth=True)),
    "fake kept between phases": Row(dict(phases=2), "kept"),
    "one shared network": Row(dict(phases=2), "shared"),
    "vanilla, t = 0.357": Row(VANILLA | dict(fix_t=0.357)),
    "vanilla, t = 0.882": Row(VANILLA | dict(fix_t=0.882)),
    "vanilla, t = 0.1": Row(VANILLA | dict(fix_t=0.1)),
}
DISJOINT = dict(phases=2, interval="disjoint")
FAR = {  # one experiment more on claim 5: a student far from its teacher, a teacher with limits
    "random start": Row(dict(phases=2), "random"),
    "random start, disjoint": Row(DISJOINT, "random"),
    "random start, learnt teacher": Row(dict(phases=2), "learnt"),
    "random start, learnt teacher, disjoint": Row(DISJOINT, "learnt"),
}


def some(*names: str) -> dict[str, Row]:
    """These rows."""
    return {name: ROWS[name] for name in names}


CONDITIONAL = dict(toy="ring", classes="on")
TABLES = {  # name: settings of the distribution, methods
    "ring": (dict(toy="ring"), ROWS | FAR),
    "grid": (dict(toy="grid"), ROWS),
    "conditional": (CONDITIONAL, ROWS),
    "guided": (CONDITIONAL | dict(guidance=(2.0,)), some("DMD2", "Phased 4 / 2")),
    "wide": (dict(toy="wide"), some("vanilla, t = 0.357", "vanilla, t = 0.882")),
}


class Budget(NamedTuple):
    """The same for every row."""

    updates: int = 800  # of the generator, over all phases; five times as many of the fakes
    warmup: int = 400  # fake updates before them, over all phases
    samples: int = 10_000  # behind each number
    fit: int = 1500  # steps of fitting the network that all start from
    matching: int = 2000  # steps of each network of Fig. 2


def config(table: str, row: Row, seed: int, lr: float, budget: Budget) -> train.Config:
    """The settings of a run. Raises UserError where train.py would."""
    settings = TABLES[table][0] | row.settings
    iters, warmup = (n // settings["phases"] for n in budget[:2])
    cfg = train.config(
        **settings, iters=iters, warmup=warmup, lr=lr, seed=seed, eval_samples=budget.samples
    )
    train.validate(cfg)
    return cfg


# -- training ------------------------------------------------------------------------------------


@cache
def start_of(toy: str, classes: str, steps: int) -> dict[str, Tensor]:
    """What all networks of a distribution start from: train.py's own."""
    return toy2d.fit(train.config(toy=toy, classes=classes), lambda each: each, steps)


def training(cfg, variant: str, start: dict, out=Path()) -> Iterator[train.Run]:
    """Train; after every iteration the run in which the whole student is found."""
    run = train.new_run(cfg, start, CPU, out)
    if variant == "shared":
        yield from taking_turns(run, start)
        return
    if variant == "learnt":
        run.meter = Meter(with_teacher(run, start))
        run.roles = run.roles._replace(velocity=run.meter)
    if variant:
        reset = once(run) if variant == "kept" else from_random(run)
        run.roles = run.roles._replace(reset=reset)
    train.begin_phase(run, 1)
    for _ in train.train(run):
        yield run


def once(run: train.Run):
    """A reset that leaves a role alone once it has begun."""
    reset, begun = run.roles.reset, set()

    def first(role):
        if role not in begun:
            reset(role)
        begun.add(role)

    return first


def with_teacher(run: train.Run, start: dict):
    """velocity(role, x_t, t, c) in which the teacher is the fitted network of a toy."""
    asked, fitted = run.roles.velocity, toy2d.network(run.cfg)
    fitted.load_state_dict(start)

    def velocity(role, *where):
        return fitted(*where) if role.startswith("teacher") else asked(role, *where)

    return velocity


def from_random(run: train.Run):
    """A reset that starts a student from random weights, of the seed, and a fake as ever."""
    _, parameters_of, reset = run.roles
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.cfg.seed)
        far = toy2d.network(run.cfg).state_dict()

    @torch.no_grad()
    def far_or_near(role):
        reset(role)
        for name, p in parameters_of(role).items() if role.startswith("student") else ():
            p.copy_(far[name])

    for phase in run.phases:  # looks ask experts of later phases too
        far_or_near(moe.student_role(phase.k))
    return far_or_near


def taking_turns(run: train.Run, start: dict) -> Iterator[train.Run]:
    """One network is every expert: iterations of the phases alternate, each with its own fake.

    One optimizer of the student, as many updates of it as all experts have together.
    """
    cfg = replace(run.cfg, fake_per_depth=True)  # a fake for each phase, under those names
    made = train.PRESETS[cfg.teacher].roles(cfg, run.phases, run.device, run.out, start)
    meter = Meter(made.velocity)
    runs = [replace(run, roles=roles_of(made, meter, phase.k), meter=meter) for phase in run.phases]
    for k, one in enumerate(runs, 1):
        one.optimizers, one.skips = {}, {}
        train.begin_phase(one, k)
        one.optimizers[moe.student_role(k)] = runs[0].optimizers[moe.student_role(1)]
    for _ in range(cfg.warmup + cfg.iters):
        for one in runs:
            train.iteration(one)
            one.i += 1
            yield runs[-1]


def roles_of(made: moe.Roles, meter: Meter, k: int) -> moe.Roles:
    """The roles as phase k sees them where its student is everybody's."""

    def name(role):
        if role.startswith("student"):
            return moe.student_role(1)
        return f"{role}-depth{k}" if role.startswith("fake") else role

    return moe.Roles(
        lambda role, *where: meter(name(role), *where),
        lambda role: made.parameters_of(name(role)),
        lambda role: made.reset(name(role)),
    )


def experts(run: train.Run) -> list:
    """The network of each step, those of phases that are yet to be trained among them."""
    return moe.by_step(run.roles.velocity, run.phases)


# -- measuring -----------------------------------------------------------------------------------


def law(cfg, s: float, n: int, c) -> Tensor:
    """n samples x_s of what a student should make of c: exact, or what the guided teacher makes."""
    if cfg.guidance == (1.0,):
        return toy2d.mixture(cfg).sample_at(s, n, stream("exact", cfg.seed, s or 0), c)
    steps = round(100 * (1 - s))  # no law is known: Euler, in steps of 0.01, from other noise
    times, z = [1 - i / 100 for i in range(steps + 1)], normal((n, 2), cfg.seed, "law", s)
    *_, x_s = trajectory([toy2d.teacher(cfg)] * steps, times, z, c)
    return x_s


def distance(x: Tensor, y: Tensor, c) -> float:
    """Energy distance; where there are classes, its mean over them."""
    return sum(energy(x[rows], y[rows]) for rows in by_class(len(x), c)) / len(by_class(len(x), c))


def by_class(n: int, c) -> list:
    """The rows of each class, or all."""
    if c is None:
        return [slice(n)]
    return [c["class"] == label for label in c["class"].unique()]


def spread(x: Tensor, c) -> float:
    """Mean distance of two samples of a class: diversity, before it is divided by the teacher's."""
    parts = [x[rows] for rows in by_class(len(x), c)]
    return sum(mean_distance(p, p) * len(p) / (len(p) - 1) for p in parts) / len(parts)


def measure(cfg, nets: list, phases: list[Phase]) -> tuple[dict, list[Tensor]]:
    """Numbers of a student, or of a teacher (no phases), and x at its times."""
    n, times = cfg.eval_samples, step_times(len(nets), cfg.shift)
    xs, c = toy2d.draw(cfg, nets, times, n, CPU)
    y = law(cfg, 0.0, n, c)
    found = toy2d.numbers(cfg, xs[-1], c, y)
    found |= {"energy": distance(xs[-1], y, c), "spread": spread(xs[-1], c)}
    found["energy_phases"] = [distance(xs[p.last], law(cfg, p.s, n, c), c) for p in phases]
    found["finished"] = [finished(cfg, xs[p.last], p.s, y, c) for p in phases[:-1]]
    depths = cfg.truncate == "on" and phases
    found["depths"] = [of_depths(cfg, nets, phase) for phase in depths or () if phase.depths > 1]
    return found, xs


def finished(cfg, x: Tensor, s: float, y: Tensor, c, steps: int = 20) -> float:
    """Energy of x_s carried on to t = 0 by the exact teacher: no later expert repairs anything."""
    times = [s * t for t in step_times(steps, 1.0)]
    *_, x_0 = trajectory([toy2d.teacher(cfg)] * steps, times, x, c)
    return distance(x_0, y, c)


@torch.no_grad()
def of_depths(cfg, nets: list, phase: Phase) -> list[float]:
    """Energy of what each truncation depth makes of noise, and, last, of all of them pooled."""
    n = cfg.eval_samples // 2
    c, shape = toy2d.data(cfg)(n, cfg.seed, "depths")
    z, y = normal((n, *shape), cfg.seed, "depths", "z"), law(cfg, phase.s, n, c)
    made, times = [], step_times(cfg.steps, cfg.shift)
    for j in range(1, phase.depths + 1):
        x, t = rollout(nets, times, phase, z, c, torch.full((n,), j))
        made.append(recorded(nets, phase, x, t, c))
    turn = torch.arange(n) % phase.depths
    pooled = torch.stack(made)[turn, torch.arange(n)]
    return [distance(x, y, c) for x in (*made, pooled)]


def peak_memory(run: train.Run) -> float:
    """Megabytes that a generator update adds at its peak. It changes the student."""
    with Peak() as peak:
        train.generator_update(run, "memory")
    return peak.most / 1e6


class Peak(TorchDispatchMode):
    """The most bytes of storage alive at once, of those that come into being inside."""

    now = most = 0

    def __init__(self):
        super().__init__()
        self.known = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        for x in tensors_in(args):  # of before, if it is not known
            self.add(x.untyped_storage(), 0)
        made = function(*args, **(kwargs or {}))
        for x in tensors_in(made):
            self.add(x.untyped_storage(), x.untyped_storage().nbytes())
        return made

    def add(self, storage, size: int) -> None:
        """A storage, unless it is known: views and results in place share theirs."""
        address = storage._cdata
        if address not in self.known:
            self.known.add(address)
            weakref.finalize(storage, self.remove, address, size)
            self.now += size
            self.most = max(self.most, self.now)

    def remove(self, address: int, size: int) -> None:
        """A storage that is gone."""
        self.known.discard(address)
        self.now -= size


def tensors_in(tree) -> list[Tensor]:
    """The tensors among arguments or results."""
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor)]


LOOKS, EARLY = 12, 4  # looks while training; "early" is after a quarter of a phase


class Trained(NamedTuple):
    """A run at its end, and what was seen on the way."""

    run: train.Run
    early: dict[int, dict[str, Tensor]]  # parameters of expert k after a quarter of its phase
    curve: list[tuple[int, float, float]]  # iterations, seconds of training, energy
    asked: dict[str, int]  # samples that networks of a kind were asked for


def trained(cfg, method: Row, start: dict) -> Trained:
    """Train, with a look now and then that counts neither as time nor as evaluations."""
    early, curve, asked, seconds, began = {}, [], Counter(), 0.0, time.perf_counter()
    every = cfg.phases * (cfg.iters + cfg.warmup) // LOOKS
    for i, run in enumerate(training(cfg, method.variant, start), 1):
        if run.i == cfg.iters // EARLY:
            early[run.k] = parameters(run, run.k)
        if i % every == 0:
            seconds += time.perf_counter() - began
            for (role, *_), n in run.meter.take().items():
                asked[re.match("[a-z]+", role)[0]] += n
            curve.append((i, seconds, glance(cfg, run)))
            run.meter.take()
            began = time.perf_counter()
    return Trained(run, early, curve, dict(asked))


def row(table: str, name: str, seed: int, lr: float, budget: Budget) -> dict:
    """Train a row with a seed; its numbers, and x of 3,000 samples at its times."""
    if name in TEACHERS:
        return teacher_row(table, name, seed, budget)
    method = TABLES[table][1][name]
    cfg = config(table, method, seed, lr, budget)
    run, early, curve, asked = trained(cfg, method, start_of(cfg.toy, cfg.classes, budget.fit))
    found, xs = measure(cfg, experts(run), run.phases)
    active = sum(p.numel() for p in run.roles.parameters_of(moe.student_role(1)).values())
    found |= {
        "lr": lr,
        "seconds": curve[-1][1],
        "curve": curve,
        "evaluations": asked,
        "parameters": [active, active * (1 if method.variant == "shared" else cfg.phases)],
        "paths": torch.stack(xs)[:, :3000],
    }
    if name == "Phased 4 / 2":
        found["early"] = [compare_early(run, k, early[k], xs[-1]) for k in (1, 2)]
    return found | {"memory": peak_memory(run)}  # last: it changes the student


def teacher_row(table: str, name: str, seed: int, budget: Budget) -> dict:
    """The exact teacher with so many Euler steps."""
    cfg = config(table, Row(dict(phases=1)), seed, 1e-3, budget)
    found, xs = measure(cfg, [toy2d.teacher(cfg)] * TEACHERS[name], [])
    return found | {"paths": torch.stack(xs)[:, :3000]}


def glance(cfg, run: train.Run, n: int = 2000) -> float:
    """Energy of a few samples of the student so far."""
    xs, c = toy2d.draw(cfg, experts(run), run.times, n, CPU)
    return distance(xs[-1], law(cfg, 0.0, n, c), c)


def parameters(run: train.Run, k: int) -> dict[str, Tensor]:
    """A copy of expert k."""
    found = run.roles.parameters_of(moe.student_role(k))
    return {name: p.detach().clone() for name, p in found.items()}


def compare_early(run: train.Run, k: int, early: dict[str, Tensor], late_x: Tensor) -> dict:
    """Expert k as it was early, all others as they are in the end, from the same noise.

    kept         the part of the samples that end in the mode in which they end now
    kept_inside  the same of those that were within 3 sd of a mode
    moved        how far those that are kept move meanwhile, in sd of a mode
    """
    now, target = parameters(run, k), toy2d.mixture(run.cfg)
    put(run, k, early)
    *_, x = toy2d.draw(run.cfg, experts(run), run.times, len(late_x), CPU)[0]
    put(run, k, now)
    (gap, before), (_, after) = (torch.cdist(y, target.means).min(1) for y in (x, late_x))
    kept, inside = (before == after).double(), gap <= 3 * target.sd
    moved = (x - late_x).norm(dim=1)[before == after].mean().item() / target.sd
    return {
        "kept": kept.mean().item(),
        "kept_inside": kept[inside].mean().item(),
        "moved": moved,
    }


@torch.no_grad()
def put(run: train.Run, k: int, tensors: dict[str, Tensor]) -> None:
    """Make expert k what it was."""
    for name, p in run.roles.parameters_of(moe.student_role(k)).items():
        p.copy_(tensors[name])


def tuning(table: str, name: str, seed: int, lr: float, budget: Budget) -> dict:
    """The energy at the end alone, to choose a rate by; huge where training breaks down."""
    method = TABLES[table][1][name]
    cfg = config(table, method, seed, lr, budget)
    try:
        for run in training(cfg, method.variant, start_of(cfg.toy, cfg.classes, budget.fit)):
            pass
    except UserError:  # not finite
        return {"energy": 1e9}
    return {"energy": glance(cfg, run, 5000)}


def growth(table: str, name: str, seed: int, lr: float, budget: Budget) -> dict:
    """Memory of a generator update for 1, 2, 4 and 8 steps, in as many phases or in one."""
    found = []
    for steps in (1, 2, 4, 8):
        settings = dict(phases=steps) if name == "phased" else VANILLA
        cfg = config("ring", Row(settings | dict(steps=steps)), seed, lr, budget)
        run = train.new_run(cfg, start_of(cfg.toy, cfg.classes, budget.fit), CPU, Path())
        train.begin_phase(run, cfg.phases)
        run.i = 0
        found.append(peak_memory(run))
    return {"memory": found}


def matching(table: str, name: str, seed: int, lr: float, budget: Budget) -> dict:
    """Fig. 2: how far a network of one of its objectives is from the exact velocity in (s, 1).

    error    rms of the trained network; bias: rms of the mean of its target, which is exact
    """
    target, s, where, n = TOYS[table](), figure2.S, ("matching", seed), budget.samples
    net = figure2.fit(name, budget.matching, target, 64, where, 1e-2, lambda each, text: each)
    t = s + (1 - s) * torch.rand(n, generator=stream(*where, "test t"))
    x_s, eps = target.sample_at(s, n, stream(*where, "test")), normal((n, 2), *where, "test eps")
    x_t = diffuse(x_s, s, t, eps)
    with torch.no_grad():
        made = {"error": net(x_t, t), "bias": mean_target(target, name, s, t, x_t)}
    v = target.velocity(x_t, t)
    return {key: (x - v).square().sum(1).mean().sqrt().item() for key, x in made.items()}


def mean_target(target: Mixture, name: str, s: float, t: Tensor, x_t: Tensor) -> Tensor:
    """E[target | x_t] of Eq. 4, of Eq. 11, or of the naive eps - x_s: exact, since both are linear.

    E[x_s | x_t] = alpha_s x_0 + alpha_ts sigma_s^2 / sigma_t^2 (x_t - alpha_t x_0), x_0 its mean
    """
    if name == "a":
        return target.velocity(x_t, t)
    x_0, (alpha_t, sigma_t) = target.denoise(x_t, t)[0], coefficients(t, x_t)
    alpha_s, sigma_s = coefficients(s, x_t)
    alpha_ts, sigma_ts = kernel(s, like(t, x_t))
    x_s = alpha_s * x_0 + alpha_ts * (sigma_s / sigma_t) ** 2 * (x_t - alpha_t * x_0)
    eps = (x_t - alpha_ts * x_s) / sigma_ts
    return v_target(x_s, s, t, eps) if name == "b" else eps - x_s
