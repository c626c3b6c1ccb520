"""Phased DMD: distil a teacher into a few-step student, phase by phase.

    python train.py                                    the toy: a ring of 8 modes, a minute on a CPU
    python train.py --phases 1 --out out/dmd2          the same steps as one phase, which is DMD2
    python train.py --points FILE.csv                  your own points as the data
    python train.py --resume                           go on with what is in the output folder
"""

import copy
import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Callable, Iterator

import torch
from torch import Tensor
from tqdm import tqdm

import losses
import moe
import phases as ph
from models.weights import UserError, cannot_write, read_json, read_tensors, write, write_json, write_tensors
from sample import normal, rollout, stream
from sde import diffuse, unshift
from toy import toy2d


def setting(default, help: str, choices=None, low=None, above=None, high=None):
    """A field of Config, with all that the command line needs to know of it."""
    return field(default=default, metadata=dict(help=help, choices=choices, low=low, above=above, high=high))


ON_OFF = ("on", "off")


@dataclass(frozen=True)
class Config:
    """The settings of a run: one flag each. Rates are per update, times are in [0, 1]."""

    teacher: str = setting("toy2d", "preset")
    toy: str = setting("ring", "distribution of toy2d", choices=tuple(toy2d.TOYS))
    points: str = setting("", "csv or npy file, n x d with n <= 2000: your own data in place of --toy")
    bandwidth: float = setting(0.0, "sd of a component of --points, in deviations of the data; 0: automatic", low=0)
    classes: str = setting("off", "condition on the class", choices=ON_OFF)
    guidance: float = setting(1.0, "classifier-free guidance scale of the teacher, with --classes on", low=0)
    phases: int = setting(2, "K, must divide --steps; 1 is DMD2", low=1)
    steps: int = setting(4, "N, network evaluations of a sample", low=1, high=1000)
    shift: float = setting(1.0, "S of the times, t = S u / (1 + (S - 1) u)", above=0)
    interval: str = setting("nested", "re-noise in (s, 1), or in the phase's own (s, start)", choices=("nested", "disjoint"))
    fix_t: float = setting(0.0, "re-noise at this t alone (Fig. 11); 0: over the interval", low=0, high=1)
    target: str = setting("unbiased", "of the fake: Eq. 11, or the naive one of Fig. 2(c)", choices=("unbiased", "biased"))
    truncate: str = setting("on", "record one step (SGTS), or every step of the phase", choices=ON_OFF)
    depths: str = setting("mixed", "truncation depth: all in each batch, or one drawn for it (the paper)", choices=("mixed", "drawn"))
    weight: str = setting("xs", "of the generator's gradient; paper is Eq. 10", choices=("paper", "xs", "x0", "normalised", "one"))
    boundary: str = setting("clip", "a high-noise phase's draws below the teacher's boundary", choices=("clip", "inside"))
    iters: int = setting(800, "generator updates a phase", low=1)
    fake_updates: int = setting(5, "fake updates for each generator update", low=1)
    fake_per_depth: bool = setting(False, "a fake for every truncation depth (ours, not the paper's)")
    reuse_rollouts: bool = setting(False, "the fake updates of an iteration share one rollout")
    warmup: int = setting(200, "fake updates before a phase's first generator update", low=0)
    batch: int = setting(256, "samples of an update", low=1)
    micro_batch: int = setting(0, "samples of one pass; 0: the whole batch", low=0)
    lr: float = setting(1e-3, "of the generator (AdamW)", above=0)
    fake_lr: float = setting(2e-3, "of the fake (AdamW)", above=0)
    lr_decay: float = setting(0.5, "part of a phase, at its end, in which both rates fall to 0", low=0, high=1)
    seed: int = setting(0, "of all that is drawn", low=0)
    save_every: int = setting(200, "iterations between two states for --resume", low=1)
    max_skips: int = setting(0, "non-finite updates in a row to skip before stopping", low=0)
    eval_samples: int = setting(10_000, "samples behind each number of metrics.json", low=2)


MARGIN = 0.02  # kept from both ends of a re-noising interval, in u; the paper gives none


@dataclass(frozen=True)
class Preset:
    """A teacher: what Config starts from, and the functions that know what its samples are."""

    settings: dict
    boundary_t: float | None  # where the teacher's low-noise expert begins, if it has two
    network: Callable  # network(cfg) -> the network that student and fake are
    teacher: Callable  # teacher(cfg) -> v_real = teacher(x_t, t, c), guidance included
    start: Callable  # start(cfg, bar) -> tensors that student and fake start from
    data: Callable  # data(cfg) -> batch(n, *where) -> (c, c_null, shape of a sample)
    evaluate: Callable  # evaluate(cfg, student, phases) -> numbers
    picture: Callable  # picture(cfg, student, phases) -> png


PRESETS = {
    "toy2d": Preset({}, None, toy2d.network, toy2d.teacher, toy2d.start, toy2d.data, toy2d.evaluate, toy2d.picture),
}


# -- the loop ------------------------------------------------------------------------------------


@dataclass
class Run:
    """A run between two iterations: all that changes is the roles' tensors and the counters."""

    cfg: Config
    phases: list[ph.Phase]
    roles: moe.Roles
    batch: Callable  # of the preset's data
    device: torch.device
    k: int = 1  # phase
    i: int = 0  # next iteration of it; negative while the fake warms up
    optimizers: dict[str, torch.optim.Optimizer] = field(default_factory=dict)
    skips: dict[str, int] = field(default_factory=dict)  # non-finite updates in a row, by role

    @property
    def phase(self) -> ph.Phase:
        return self.phases[self.k - 1]

    @property
    def student(self) -> list[Callable]:
        return moe.by_step(self.roles.velocity, self.phases)

    @property
    def times(self) -> tuple[float, ...]:
        return ph.step_times(self.cfg.steps, self.cfg.shift)


def begin_phase(run: Run, k: int) -> None:
    """Phase k: its expert and its fakes start from the teacher, not from the phase before."""
    run.k, run.i = k, -run.cfg.warmup
    fakes = moe.fake_roles(run.phase, run.cfg.fake_per_depth)
    for role in (moe.student_role(k), *fakes):
        run.roles.reset(role)
    rates = dict.fromkeys(fakes, run.cfg.fake_lr) | {moe.student_role(k): run.cfg.lr}
    run.optimizers = {role: adamw(run.roles.parameters_of(role), lr) for role, lr in rates.items()}


def adamw(parameters: dict, lr: float) -> torch.optim.Optimizer:
    """AdamW as in the paper, betas (0, 0.999); the rate here is the one before its decay."""
    optimizer = torch.optim.AdamW(parameters.values(), lr, betas=(0.0, 0.999), weight_decay=0.0, fused=True)
    optimizer.defaults["base"] = lr
    return optimizer


def train(run: Run) -> Iterator[dict]:
    """The whole method. Yields what to log after each iteration; `run` is whole at every yield."""
    while True:
        while run.i < run.cfg.iters:
            row = iteration(run)
            run.i += 1
            yield row
        if run.k == len(run.phases):
            return
        begin_phase(run, run.k + 1)


def iteration(run: Run) -> dict:
    """Fakes first, so that they know the samples that the generator is judged on (A1)."""
    updates = 1 if run.i < 0 else run.cfg.fake_updates
    fakes = [fake_update(run, update) for update in range(updates)]
    row = {"phase": run.k, "iteration": run.i, "fake": fakes[-1]}
    return row if run.i < 0 else row | {"generator": generator_update(run, updates)}


def fake_update(run: Run, update: int) -> dict:
    """One step of the fake on samples of the present generator, Eq. 13."""
    source = 0 if run.cfg.reuse_rollouts else update
    total = 0.0
    for m, n in micro_batches(run.cfg):
        with torch.no_grad():
            x_s, c, depth = simulate(run, source, m, n)
        loss = fake_loss(run, update, m, x_s, c, depth) * (n / run.cfg.batch)
        loss.backward()
        total += loss.detach()
    return apply(run, "fake", total)


def fake_loss(run: Run, update: int, m: int, x_s: Tensor, c, depth: Tensor) -> Tensor:
    """Score matching of the fake inside (s, 1), at the times of the phase."""
    part, t, eps = renoise(run, update, m, x_s)
    v_fake = fake_of(run, part, depth)(diffuse(x_s, run.phase.s, t, eps), t, c)
    match = losses.subinterval_matching if run.cfg.target == "unbiased" else losses.biased_matching
    return match(v_fake, x_s, run.phase.s, t, eps)


def generator_update(run: Run, update: int) -> dict:
    """One step of the generator down the reverse KL at a random t, Eq. 10."""
    total = distance = 0.0
    for m, n in micro_batches(run.cfg):
        x_s, c, depth = simulate(run, update, m, n)
        with torch.no_grad():
            part, t, eps = renoise(run, update, m, x_s)
            x_t = diffuse(x_s, run.phase.s, t, eps)
            v_real = run.roles.velocity("teacher", x_t, t, c)
            v_fake = fake_of(run, part, depth)(x_t, t, c)
            gradient = losses.dmd_gradient(x_s, x_t, run.phase.s, t, v_real, v_fake, run.cfg.weight)
            distance += losses.mean((v_real - v_fake) ** 2) * (n / run.cfg.batch)
        loss = losses.distribution_matching(x_s, gradient) * (n / run.cfg.batch)
        loss.backward()
        total += loss.detach()
    return apply(run, moe.student_role(run.k), total) | {"distance": distance.sqrt().item()}


def simulate(run: Run, update: int, m: int, n: int):
    """n samples x_{t_k} of the student, their conditions and truncation depths."""
    where = run.cfg.seed, run.k, run.i, update
    c, _, shape = run.batch(n, *where, m)
    z = normal((n, *shape), *where, m, "z").to(run.device)
    u = torch.rand((), generator=stream(*where, "depth")).item()  # without m: all processes agree
    depth = ph.truncation_depths(run.phase, n, u, run.cfg.depths == "mixed")
    x_s = rollout(run.student, run.times, run.phase, z, c, depth, run.cfg.truncate == "on")
    return x_s, c, depth


def renoise(run: Run, update: int, m: int, x_s: Tensor):
    """The teacher's expert, the times t (B,) and the noise eps (B, ...) of one pass."""
    where = run.cfg.seed, run.k, run.i, update
    part = ph.pick_part(run.phase, torch.rand((), generator=stream(*where, "expert")).item())
    t = ph.renoise_times(part, torch.rand(len(x_s), generator=stream(*where, m, "t")), run.cfg.shift)
    return part, t.to(x_s.device), normal(x_s.shape, *where, m, "eps").to(x_s.device)


def fake_of(run: Run, part: ph.Part, depth: Tensor) -> Callable:
    """The fake beside the teacher's expert; where there is one a depth, each row asks its own."""
    ask = run.roles.velocity
    if not run.cfg.fake_per_depth:
        return lambda x_t, t, c: ask(moe.fake_role(part.expert), x_t, t, c)
    roles = [moe.fake_role(part.expert, j) for j in range(1, run.phase.depths + 1)]
    return moe.by_depth([lambda x_t, t, c, role=role: ask(role, x_t, t, c) for role in roles], depth)


def micro_batches(cfg: Config) -> list[tuple[int, int]]:
    """(index, size) of the passes that make up one batch."""
    size = cfg.micro_batch or cfg.batch
    return [(m, min(size, cfg.batch - start)) for m, start in enumerate(range(0, cfg.batch, size))]


def apply(run: Run, name: str, loss: Tensor) -> dict:
    """Step the optimizers of a role that have gradients, unless something is not finite."""
    mine = {role: opt for role, opt in run.optimizers.items() if role.startswith(name)}
    parameters = [p for opt in mine.values() for p in opt.param_groups[0]["params"] if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
    finite = bool(torch.isfinite(loss) & torch.isfinite(norm))  # the one wait for the device
    for optimizer in mine.values():
        group = optimizer.param_groups[0]
        group["lr"] = optimizer.defaults["base"] * rate(run.cfg, run.i)
        if finite:
            optimizer.step()
        optimizer.zero_grad()
    run.skips[name] = 0 if finite else run.skips.get(name, 0) + 1
    if run.skips[name] > run.cfg.max_skips:
        raise UserError(
            f"phase {run.k}, iteration {run.i}: loss {loss.item():.3g} and gradient norm {norm.item():.3g} of {name} "
            "are not finite; the last state is kept: lower its rate, or allow --max-skips"
        )
    return {"loss": loss.item(), "grad_norm": norm.item()}


def rate(cfg: Config, i: int) -> float:
    """Factor of both learning rates: 1, then linear to 0 over the last lr_decay of a phase."""
    return min(1.0, (cfg.iters - i) / max(1.0, cfg.iters * cfg.lr_decay))
