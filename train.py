"""Phased DMD: distil a teacher into a few-step student, phase by phase.

python train.py                                    the toy: a ring of 8 modes, 40 s on a CPU
python train.py --phases 1 --out out/one-phase     the same steps as one phase, DMD2
python train.py --points FILE.csv                  your own points as the data
python train.py --teacher wan22-tiny               all that wan22 does, with random small networks
python train.py --teacher wan22 --dry-run          gigabytes and days of the real one
python train.py --resume                           go on with what is in the output folder
"""

import argparse
import difflib
import math
import shlex
import sys
import time
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Callable, Iterator

import torch
from torch import Tensor
from tqdm import tqdm

import losses
import moe
import phases as ph
from models import export, large, parallel, sampling
from models.adamw import AdamW
from models.draws import normal, uniform
from models.flags import (
    Parser,
    add_flags,
    check,
    closed_pipe,
    given,
    is_out_of_memory,
    pick_device,
    plain,
    setting,
)
from models.folder import (
    Log,
    Stop,
    contents,
    environment,
    hashes,
    keep_newest,
    settle,
    watch,
)
from models.files import Interrupted, UserError, read_json, write, write_json, write_tensors
from models.meter import Meter
from models.pictures import curves
from sample import recorded, rollout, times_of, trajectory
from sde import diffuse, v_to_x0
from toy import digits, toy2d


ON_OFF, KINDS = ("on", "off"), ("lora", "full")


# fmt: off
@dataclass(frozen=True)
class Config:
    """The settings of a run: one flag each. Defaults are the paper's where it gives them."""

    teacher: str = setting("toy2d", "preset")
    toy: str = setting("ring", "distribution of toy2d", choices=tuple(toy2d.TOYS))
    points: str = setting("", "csv or npy, n x d, n <= 2000: your own data in place of --toy")
    bandwidth: float = setting(0.0, "sd around each point, in sd of the data; 0: automatic",
                               low=0, high=10)
    classes: str = setting("off", "toys: condition on the class", choices=ON_OFF)
    guidance: tuple = setting((1.0,), "guidance scale of the teacher: of all its experts, or two "
                              "numbers, high-noise low-noise", kind=float, low=0, high=100)
    weights: tuple = setting((), "folder of published weights, or a path an expert (high noise "
                             "first), or `random`; none: weights/NAME", kind=str)
    teacher_lora: tuple = setting((), "LoRA to merge into the teacher, one an expert", kind=str)
    prompts: str = setting("", "embeddings of models.text, or a text file, one prompt a line")
    images: str = setting("", "image to video: first frames of models.vae")
    size: tuple = setting((), "pixels, [FRAMESx]HEIGHTxWIDTH[:PROBABILITY], one or more", kind=str)
    frames: int = setting(1, "of a video, 4n + 1", low=1, high=10_001)

    phases: int = setting(2, "K, must divide --steps; 1 is DMD2", low=1, high=1000)
    steps: int = setting(4, "N, network evaluations of a sample", low=1, high=1000)
    shift: float = setting(5.0, "S of the times, t = S u / (1 + (S - 1) u)",
                            low=0.01, high=100)
    interval: str = setting("nested", "re-noise in (s, 1), or (s, start of the phase)",
                            choices=("nested", "disjoint"))
    t_margin: float = setting(0.02, "kept from both ends of the interval, in u", low=0, high=0.4)
    fix_t: float = setting(0.0, "re-noise at this t alone (Fig. 11); 0: anywhere",
                            low=0, high=0.999)
    boundary: str = setting("clip", "of teachers of two experts: phase 1's draws below it",
                            choices=("clip", "inside"))
    truncate: str = setting("on", "record one step (SGTS), or every step of the phase",
                            choices=ON_OFF)
    depths: str = setting("drawn", "truncation depth: one drawn for a batch, or all in each",
                          choices=("drawn", "mixed"))
    target: str = setting("unbiased", "of the fake: Eq. 11, or the naive one of Fig. 2(c)",
                          choices=("unbiased", "biased"))
    weight: str = setting("paper", "of the generator's gradient; paper is Eq. 10",
                          choices=("paper", "xs", "x0", "normalised", "one"))

    iters: int = setting(400, "generator updates a phase", low=1, high=10**9)
    fake_updates: int = setting(5, "fake updates for each generator update", low=1, high=1000)
    fake_per_depth: bool = setting(False, "a fake for every truncation depth (not in the paper)")
    reuse_rollouts: bool = setting(False, "the fake updates of an iteration share one rollout")
    warmup: int = setting(0, "fake updates before a phase's first generator update",
                          low=0, high=10**9)
    batch: int = setting(64, "samples of an update", low=1, high=10**6)
    micro_batch: int = setting(0, "samples of one pass; 0: the whole batch", low=0, high=10**6)
    generator: str = setting("lora", "the student's experts: adapters, or all parameters",
                             choices=KINDS)
    fake: str = setting("full", "the fakes: adapters, or all parameters", choices=KINDS)
    rank: int = setting(64, "of adapters", low=1, high=4096)
    alpha: float = setting(8.0, "of adapters, which add alpha / rank up down x", above=0, high=4096)
    lr: float = setting(5e-5, "of the generator (AdamW); 2e-6 where it is full", above=0, high=1)
    fake_lr: float = setting(4e-7, "of the fake (AdamW); 5e-5 where it is lora", above=0, high=1)
    lr_decay: float = setting(0.0, "last part of a phase, in which rates fall to 0", low=0, high=1)

    dtype: str = setting("bf16", "inside large networks; all else is float32",
                         choices=("bf16", "float32"))
    checkpointing: str = setting("on", "compute blocks again in backward: less memory",
                                 choices=ON_OFF)
    record: str = setting("auto", "the generator's recorded step: first, kept while teacher and "
                          "fake are asked, or last, once more: least memory",
                          choices=("auto", "first", "last"))
    offload: str = setting("none", "to pinned host memory: the expert that is not at work, or all "
                           "blocks but two", choices=("none", "expert", "blocks"))
    compile: bool = setting(False, "torch.compile the blocks")

    seed: int = setting(0, "of all that is drawn", low=0, high=2**63)
    save_every: int = setting(200, "iterations between two states for --resume", low=1, high=10**9)
    sample_every: int = setting(0, "iterations between two looks: picture, numbers, curves; 0: no",
                                low=0, high=10**9)
    keep: int = setting(0, "students kept of those looks, the newest", low=0, high=10**6)
    max_skips: int = setting(20, "non-finite updates in a row to skip before stopping",
                             low=0, high=10**9)
    eval_samples: int = setting(10_000, "samples behind each number of metrics.json; of large "
                                "teachers: noises for one prompt", low=2, high=10**6)
# fmt: on


@dataclass(frozen=True)
class Preset:
    """A teacher: what Config starts from, and the functions that know what its samples are.

    All of them raise UserError where settings or files are wrong.
    """

    settings: dict
    check: Callable  # check(cfg), without a look at files
    files: Callable  # files(cfg) -> every file that a run reads, each looked at
    boundary: Callable  # boundary(cfg) -> t where the low-noise expert begins, None if there is one
    start: Callable  # start(cfg, out, watch, device) -> tensors that roles start from, {} if none
    roles: Callable  # roles(cfg, phases, device, out, start) -> moe.Roles
    data: Callable  # data(cfg, out) -> batch(n, *where) -> (c, shape)
    report: Callable  # report(run, look) -> numbers, png
    record: Callable  # record(cfg, held, device) -> first or last, for --record auto
    plan: Callable  # plan(cfg, phases, held, device, rate) -> text for --dry-run
    speed: Callable  # speed(run, calls of Meter, seconds) -> numbers for the log
    closing: Callable  # closing(run, fake_lag) -> what to say at the end of a phase
    base: Callable  # base(cfg) -> the files of its networks, each looked at
    settled: Callable  # settled(cfg, flags of sample.py) -> cfg
    ask: Callable  # ask(cfg, flags, out, run's folder, device) -> cfg, conditions, shape, names
    sampler: Callable  # sampler(cfg, experts, wear, device, folder, offload) -> velocity
    present: Callable  # present(cfg, c, xs, flags, names, device) -> numbers, (file name, bytes)
    device: str = "auto"  # that --device auto means
    threads: int = 0  # of the CPU while training; 0 leaves torch's own choice
    samples: int = 4  # of sample.py


def base_roles(cfg: Config, phases: list[ph.Phase], device, out: Path, start: dict) -> moe.Roles:
    """Roles on the frozen networks of a large teacher."""
    expert = partial(moe.expert_of, phases=phases, boundary_t=large.boundary(cfg))
    names = moe.run_roles(phases, cfg.fake_per_depth)
    return moe.shared_networks(*large.parts(cfg, device, out, expert, names))


TOY = dict(  # what a mixture in the plane needs in place of the paper's settings
    shift=1.0, weight="xs", depths="mixed", warmup=200, batch=256, generator="full", lr=1e-3,
    fake_lr=2e-3, lr_decay=0.5, max_skips=0,
)  # fmt: skip
LARGE = dict(fake="lora", micro_batch=1, sample_every=50, save_every=50, keep=2, eval_samples=4)
VIDEO = dict(frames=81, size=("480x832:0.4", "832x480:0.4", "720x1280:0.1", "1280x720:0.1"))
PICTURE = dict(size=("720x1280",))
QWEN = dict(shift=3.0, guidance=(4.0,), size=(
    "1328x1328", "1664x928", "928x1664", "1472x1104", "1104x1472", "1584x1056", "1056x1584",
))  # fmt: skip
TINY = dict(iters=4, batch=4, micro_batch=2, sample_every=2, save_every=2, rank=4, fake_updates=2)
DIGITS = dict(  # small enough for float32, and for no need to save memory
    guidance=(2.0,), size=("32x32",), shift=3.0, weight="one", iters=400, fake_updates=3,
    reuse_rollouts=True, warmup=50, micro_batch=64, generator="full", lr=3e-4, fake_lr=1e-3,
    lr_decay=0.5, max_skips=0, dtype="float32", checkpointing="off", record="first",
)  # fmt: skip
CLIP = dict(frames=9, size=("48x64", "64x48"))


def toy(**settings) -> Preset:
    """A row of an exact distribution. One thread: at this size a second one only waits."""
    return Preset(
        settings, toy2d.check, toy2d.files, lambda cfg: None, toy2d.start, toy2d.roles,
        toy2d.data, toy2d.report, lambda *_: "first", toy2d.plan, lambda *_: {},
        toy2d.closing, toy2d.files, toy2d.settled, toy2d.ask, toy2d.sampler, toy2d.present,
        "cpu", threads=1, samples=10_000,
    )  # fmt: skip


def base(**settings) -> Preset:
    """A row of a large teacher, or of a small one of its architecture."""
    return Preset(
        settings, large.check, large.files, large.boundary, large.start, base_roles,
        large.data, large.report, large.record, large.plan_of, large.speed, large.closing,
        large.base_files, sampling.settled, sampling.ask, sampling.sampler, sampling.present,
    )  # fmt: skip


def mnist(**settings) -> Preset:
    """The row of a large teacher, but for what a picture is worth. One thread, as for toys."""
    return replace(
        base(**settings), check=digits.check, files=digits.files, report=digits.report,
        settled=digits.settled, ask=digits.ask, present=digits.present, device="cpu", threads=1,
        samples=1000,
    )  # fmt: skip


# fmt: off
PRESETS = {
    "toy2d":           toy(**TOY),
    "mnist":           mnist(**DIGITS),
    "wan21-1.3b":      base(**LARGE, **VIDEO, guidance=(6.0,)),
    "wan21":           base(**LARGE, **PICTURE, guidance=(5.0,)),
    "wan22":           base(**LARGE, **VIDEO, guidance=(4.0, 3.0)),
    "wan22-i2v":       base(**LARGE, **VIDEO, guidance=(3.5, 3.5)),
    "wan22-5b":        base(**LARGE, frames=81, size=("704x1280",), guidance=(5.0,)),
    "qwen-image":      base(**LARGE, **QWEN),
    "wan21-tiny":      base(**LARGE | TINY, **CLIP, guidance=(5.0,)),
    "wan22-tiny":      base(**LARGE | TINY, **CLIP, guidance=(4.0, 3.0)),
    "wan22-i2v-tiny":  base(**LARGE | TINY, **CLIP, guidance=(3.5, 3.5)),
    "qwen-image-tiny": base(**LARGE | TINY | QWEN | dict(size=("64x96", "96x64"))),
}
# fmt: on
RATES = {"lora": (5e-5, 5e-5), "full": (2e-6, 4e-7)}  # of generator and fake, by kind


def config(teacher: str = "toy2d", **given) -> Config:
    """The settings of a preset, changed where given."""
    settings = PRESETS[teacher].settings | {"teacher": teacher} | given
    cfg = Config(**settings)
    rates = {"lr": RATES[cfg.generator][0], "fake_lr": RATES[cfg.fake][1]}
    return replace(cfg, **{name: x for name, x in rates.items() if name not in settings})


# -- the loop ------------------------------------------------------------------------------------


@dataclass
class Run:
    """A run between two iterations: all that changes is the roles' tensors and the counters."""

    cfg: Config
    phases: list[ph.Phase]
    held: list[moe.Held]  # what each phase has in memory
    roles: moe.Roles
    batch: Callable  # of the preset's data
    device: torch.device
    out: Path  # the run's folder
    meter: Meter  # of what the networks are asked
    record_last: bool  # which of the two ways to spend memory
    k: int = 1  # phase
    i: int = 0  # next iteration of it; negative while the fake warms up
    optimizers: dict = field(default_factory=dict)
    skips: dict[str, int] = field(default_factory=dict)  # non-finite updates in a row, by role

    @property
    def phase(self) -> ph.Phase:
        return self.phases[self.k - 1]

    @property
    def trained(self) -> list[str]:
        """What a state has to hold: the student's experts so far, and the fakes of the phase."""
        return self.held[self.k - 1].frozen + self.held[self.k - 1].trained

    @property
    def student(self) -> list[Callable]:
        """The networks of the student's steps so far, those of phases 1 to k."""
        return moe.by_step(self.roles.velocity, self.phases[: self.k])

    @property
    def finished(self) -> bool:
        return self.k == len(self.phases) and self.i == self.cfg.iters

    @property
    def times(self) -> tuple[float, ...]:
        return ph.step_times(self.cfg.steps, self.cfg.shift)


def begin_phase(run: Run, k: int) -> None:
    """Phase k: its expert and its fakes start from the teacher, not from the phase before."""
    run.k, run.i, run.optimizers = k, -run.cfg.warmup, {}  # old moments go before new ones come
    student, *fakes = run.held[k - 1].trained
    for role in (student, *fakes):
        run.roles.reset(role)
    rates = dict.fromkeys(fakes, run.cfg.fake_lr) | {student: run.cfg.lr}
    run.optimizers = {role: AdamW(run.roles.parameters_of(role), lr) for role, lr in rates.items()}
    run.meter.forget_peak(run.device)  # of loading


def train(run: Run) -> Iterator[list[dict]]:
    """The whole method. Yields log rows after each iteration; `run` is whole at every yield."""
    while True:
        while run.i < run.cfg.iters:
            rows = iteration(run)
            run.i += 1
            yield rows
        if run.k == len(run.phases):
            return
        begin_phase(run, run.k + 1)


def iteration(run: Run) -> list[dict]:
    """Fakes first, so that they know the samples that the generator is judged on (A1)."""
    updates = 1 if run.i < 0 else run.cfg.fake_updates
    rollouts = fake_rollouts(run, updates)
    rows = [fake_update(run, update, rollouts) for update in range(updates)]
    return rows if run.i < 0 else [*rows, generator_update(run, updates)]


def fake_rollouts(run: Run, updates: int) -> Iterator[tuple]:
    """The samples of every pass of an iteration's fake updates, without gradient."""
    own = 1 if run.cfg.reuse_rollouts else updates  # updates with a rollout of their own
    passes = [(update, first, n) for update in range(own) for first, n in micro_batches(run.cfg)]
    # small networks take all in one go: the generator does not change between these updates
    made = []
    for group in [[one] for one in passes] if run.cfg.micro_batch else [passes]:
        with torch.no_grad():
            samples = simulate(run, group)
        yield from samples
        made += samples if own < updates else []
    for _ in range(updates - own):
        yield from made


def fake_update(run: Run, update: int, rollouts: Iterator[tuple]) -> dict:
    """One step of the fake on samples of the present generator: Eq. 8, inside (s, 1) Eq. 13."""
    part, total, by_t = draw_part(run, update), 0.0, 0.0
    for first, n in micro_batches(run.cfg):
        each, t = fake_loss(run, part, update, first, *next(rollouts))
        loss = each.mean() * (n / run.cfg.batch)
        loss.backward()
        total += loss.detach()
        by_t += t_bins(each.detach(), t)
    total, (sums, counts) = parallel.total(total, by_t)
    return apply(run, moe.fake_role(part.expert), {"loss": total}, {"loss_by_t": sums / counts})


def fake_loss(run: Run, part: ph.Part, update, first: int, x_s: Tensor, c, depth) -> tuple:
    """Score matching of the fake inside (s, 1): a loss (B,), and the times t (B,) of the phase."""
    t, eps = renoise(run, part, update, first, x_s)
    v_fake = fake_of(run, part, depth)(diffuse(x_s, run.phase.s, t, eps), t, c)
    match = losses.subinterval_matching if run.cfg.target == "unbiased" else losses.biased_matching
    return match(v_fake, x_s, run.phase.s, t, eps), t


def t_bins(each: Tensor, t: Tensor, bins: int = 5) -> Tensor:
    """Sums of (B,) numbers and their counts, by t in equal parts of [0, 1]: (2, bins)."""
    inside = (t[:, None] * bins).clamp(max=bins - 1).floor() == torch.arange(bins, device=t.device)
    return torch.stack([each, torch.ones_like(each)]) @ inside.float()


def generator_update(run: Run, update: int) -> dict:
    """One step of the generator down the reverse KL at a random t, Eq. 10."""
    part, total, square, moments = draw_part(run, update), 0.0, 0.0, 0.0
    for first, n in micro_batches(run.cfg):
        x, t_j, c, depth = approach(run, [(update, first, n)])
        with torch.set_grad_enabled(not run.record_last):
            x_s = recorded(run.student, run.phase, x, t_j, c)
        with torch.no_grad():
            t, eps = renoise(run, part, update, first, x_s)
            x_t = diffuse(x_s, run.phase.s, t, eps)
            v_real = run.roles.velocity(moe.teacher_role(part.expert), x_t, t, c)
            v_fake = fake_of(run, part, depth)(x_t, t, c)
            gradient = losses.dmd_gradient(x_s, x_t, run.phase.s, t, v_real, v_fake, run.cfg.weight)
            square += losses.mean((v_real - v_fake) ** 2).mean() * (n / run.cfg.batch)
            moments += torch.stack([x_s.mean(), x_s.square().mean()]) * (n / run.cfg.batch)
        if run.record_last:  # the gradient is known: no other network while this graph lives
            x_s = recorded(run.student, run.phase, x, t_j, c)
        loss = losses.distribution_matching(x_s, gradient).mean() * (n / run.cfg.batch)
        loss.backward()
        total += loss.detach()
    total, square, (mean, second) = parallel.total(total, square, moments)
    about = {"x_mean": mean, "x_std": (second - mean**2).clamp(min=0).sqrt()}
    return apply(run, moe.student_role(run.k), {"loss": total, "distance": square.sqrt()}, about)


def simulate(run: Run, passes: list[tuple]) -> list[tuple]:
    """For each pass (update, first, n): n samples x_{t_k}, their conditions, truncation depths."""
    x, t_j, c, depth = approach(run, passes)
    x_s = recorded(run.student, run.phase, x, t_j, c)
    ends = torch.tensor([n for *_, n in passes]).cumsum(0).tolist()
    rows = [slice(end - n, end) for end, (*_, n) in zip(ends, passes)]
    return [(x_s[row], moe.select(c, row), depth[row]) for row in rows]


def approach(run: Run, passes: list[tuple]) -> tuple:
    """All passes' samples before their recorded step: x, its times, conditions, depths."""
    zs, cs, depths = [], [], []
    for update, first, n in passes:
        where = run.cfg.seed, run.k, run.i, update
        c, shape = run.batch(n, *where, first)
        cs.append(moe.move(c, run.device))
        zs.append(draw(run, normal, shape, update, first, n, "z").to(run.device))
        r = uniform((), *where, "depth").item()  # without `first`: all processes agree
        rows, mixed = range(first, first + n), run.cfg.depths == "mixed"
        depths.append(ph.truncation_depths(run.phase, rows, r, mixed, run.cfg.batch))
    z, c, depth = torch.cat(zs), moe.concatenate(cs), torch.cat(depths)
    truncate = run.cfg.truncate == "on"
    x, t_j = rollout(run.student, run.times, run.phase, z, c, depth, truncate)
    return x, t_j, c, depth


def draw(run: Run, numbers: Callable, shape, update, first: int, n: int, purpose: str) -> Tensor:
    """`numbers` (n, *shape) of the samples from `first` on: passes of any size see the same.

    Each sample has a stream of its own, but for a batch in one pass: toys would only make streams.
    """
    where = run.cfg.seed, run.k, run.i, update
    if not run.cfg.micro_batch:
        return numbers((n, *shape), *where, first, purpose)
    return torch.stack([numbers(shape, *where, first + j, purpose) for j in range(n)])


def draw_part(run: Run, update) -> ph.Part:
    """The teacher's expert of an update; without m, so that all processes agree."""
    return ph.pick_part(run.phase, uniform((), run.cfg.seed, run.k, run.i, update, "expert").item())


def renoise(run: Run, part: ph.Part, update, first: int, x_s: Tensor) -> tuple[Tensor, Tensor]:
    """The times t (B,) and the noise eps (B, ...) of one pass."""
    numbers = lambda kind, shape, why: draw(run, kind, shape, update, first, len(x_s), why)
    t = ph.renoise_times(part, numbers(uniform, (), "t"), run.cfg.shift)
    return t.to(x_s.device), numbers(normal, x_s.shape[1:], "eps").to(x_s.device)


def fake_of(run: Run, part: ph.Part, depth: Tensor) -> Callable:
    """The fake beside the teacher's expert; where there is one a depth, each row asks its own."""
    ask = run.roles.velocity
    if not run.cfg.fake_per_depth:
        return partial(ask, moe.fake_role(part.expert))
    roles = [moe.fake_role(part.expert, j) for j in range(1, run.phase.depths + 1)]
    return moe.by_depth([partial(ask, role) for role in roles], depth)


def micro_batches(cfg: Config) -> list[tuple[int, int]]:
    """(first sample, size) of the passes of one batch: of those that are run here."""
    size = cfg.micro_batch or cfg.batch
    passes = [(first, min(size, cfg.batch - first)) for first in range(0, cfg.batch, size)]
    return parallel.deal(passes)


def apply(run: Run, name: str, values: dict[str, Tensor], about: dict[str, Tensor]) -> dict:
    """Step the optimizers of a role that have gradients, unless one of values is not finite.

    Returns the log's row: values, and what else is worth knowing (empty bins are None there).
    """
    mine = [opt for role, opt in run.optimizers.items() if role.split("-")[0] == name]
    mine = [opt for opt in mine if any(p.grad is not None for p in opt.parameters.values())]
    grads = [p.grad for opt in mine for p in opt.parameters.values() if p.grad is not None]
    values["grad_norm"] = parallel.norm(grads)
    all_of = [x.flatten() for x in (*values.values(), *about.values())]
    numbers = torch.cat(all_of).tolist()  # the one wait for the device
    finite = all(map(math.isfinite, numbers[: len(values)]))
    run.skips[name] = 0 if finite else run.skips.get(name, 0) + 1
    if run.skips[name] > run.cfg.max_skips:
        raise UserError(
            f"phase {run.k}, iteration {run.i}: {dict(zip(values, numbers))} of {name} is not "
            "finite; start over with --overwrite and lower rates, or allow --max-skips"
        )
    for optimizer in mine:
        if finite:
            optimizer.step(rate(run.cfg, run.i))
        for p in optimizer.parameters.values():
            p.grad = None
    row = {"phase": run.k, "iteration": run.i, "role": name, "skipped": not finite}
    row["seconds_update"] = round(run.meter.lap(), 5)  # the device is done: numbers are here
    shown = iter(x if math.isfinite(x) else None for x in numbers)
    for key, x in (values | about).items():
        row[key] = [next(shown) for _ in x] if x.ndim else next(shown)
    return row


def rate(cfg: Config, i: int) -> float:
    """Factor of both learning rates: 1, then linear to 0 over the last lr_decay of a phase."""
    return min(1.0, (cfg.iters - i) / max(1.0, cfg.iters * cfg.lr_decay))


def fake_lag(run: Run, batches: int = 16, updates: int = 20) -> tuple[float, float]:
    """The fake's loss on fresh samples now, and after 20 more updates of a copy: is A1 true?

    At the fake's full rate, so that a lagging fake can catch up; one that has arrived only jitters.
    The same draws for both losses, so that their noise cancels. The run is as it was before.
    """
    tensors = {name: tensor.clone() for name, tensor in tensors_of(run).items()}
    counters = counters_of(run)
    run.i = 0  # where both rates are whole

    def loss() -> float:
        passes = [(f"lag{j}", 0, run.cfg.batch) for j in range(batches)]
        with torch.no_grad():
            found = [
                fake_loss(run, draw_part(run, update), update, first, *sample)[0].mean()
                for (update, first, _), sample in zip(passes, simulate(run, passes))
            ]
        return torch.stack(found).mean().item()

    now = loss()
    for j in range(updates):
        with torch.no_grad():
            more = simulate(
                run, [(f"lag more {j}", first, n) for first, n in micro_batches(run.cfg)]
            )
        fake_update(run, f"lag more {j}", iter(more))
    later = loss()
    restore(run, tensors, counters)
    return now, later


@torch.no_grad()
def look(run: Run) -> tuple[dict[str, Tensor], list[Tensor]]:
    """One condition, eval_samples noises: what the student so far makes of them, and is told.

    Rows by name: x at the end of each phase, and the x_0 that its last step, and, of the x_{t_k}
    re-noised, teacher and fake believe in; when all is done the teacher's own few steps too. And
    x at every step. Networks get micro_batch samples at a time.
    """
    n, where, phase = run.cfg.eval_samples, (run.cfg.seed, "look"), run.phase
    c, shape = run.batch(1, *where, 0)
    c = moe.move(moe.select(c, torch.zeros(n, dtype=torch.long)), run.device)
    z, eps = (normal((n, *shape), *where, name).to(run.device) for name in ("z", "eps"))
    few = lambda nets: [moe.in_passes(net, run.cfg.micro_batch or n) for net in nets]
    *_, before, x_s = xs = list(trajectory(few(run.student), run.times[: phase.last + 1], z, c))
    rows = {f"student, t = {p.s:.3g}": xs[p.last] for p in run.phases[: run.k]}
    last = times_of(phase.t[-2], x_s)
    rows["student x_0"] = v_to_x0(before, last, few(run.student)[-1](before, last, c))
    part = ph.pick_part(phase, 0.5)
    t = ph.renoise_times(part, torch.full((n,), 0.5), run.cfg.shift).to(run.device)
    x_t = diffuse(x_s, phase.s, t, eps)
    deepest = phase.depths if run.cfg.fake_per_depth else None  # the law that is sampled
    fake = partial(run.roles.velocity, moe.fake_role(part.expert, deepest))
    teacher = partial(run.roles.velocity, moe.teacher_role(part.expert))
    for name, net in zip(("teacher x_0", "fake x_0"), few([teacher, fake])):
        rows[f"{name} at t = {t[0]:.2f}"] = v_to_x0(x_t, t, net(x_t, t, c))
    if run.finished:
        boundary_t = PRESETS[run.cfg.teacher].boundary(run.cfg)
        experts = [moe.expert_at(t, boundary_t) for t in run.times[:-1]]
        nets = few([partial(run.roles.velocity, moe.teacher_role(e)) for e in experts])
        *_, rows[f"teacher, {len(nets)} steps"] = trajectory(nets, run.times, z, c)
    return rows, xs


# -- state ---------------------------------------------------------------------------------------


def tensors_of(run: Run) -> dict[str, Tensor]:
    """Everything trained so far, by role: parameters, and second moments of the phase."""
    tensors = {
        f"{role}/{name}": p
        for role in run.trained
        for name, p in run.roles.parameters_of(role).items()
    }
    moments = {
        f"{role}.second/{name}": v
        for role, opt in run.optimizers.items()
        for name, v in opt.second.items()
    }
    return {name: tensor.detach() for name, tensor in (tensors | moments).items()}


def counters_of(run: Run) -> dict:
    """The rest of the state: with the draws a function of these, nothing else is needed."""
    steps = {role: opt.steps for role, opt in run.optimizers.items()}
    return {"phase": run.k, "iteration": run.i, "steps": steps, "skips": dict(run.skips)}


def restore(run: Run, tensors: dict[str, Tensor], counters: dict) -> None:
    """Put the run where tensors_of and counters_of were taken. Raises UserError."""
    begin_phase(run, counters["phase"])
    run.i, run.skips = counters["iteration"], dict(counters["skips"])
    for role, steps in counters["steps"].items():
        run.optimizers[role].steps = steps
    for name, tensor in tensors_of(run).items():
        if name not in tensors or tensors[name].shape != tensor.shape:
            raise UserError(
                f"the state of {run.out} does not hold {name}; start over with --overwrite"
            )
        parallel.put(tensor, tensors[name])


def save_state(run: Run, log_bytes: int, seconds: float) -> None:
    """The state of before or of now, never half of each."""
    about = counters_of(run) | {
        "kind": "state",
        "log_bytes": log_bytes,
        "seconds": seconds,
        "settings": plain(run.cfg),
    }
    name = f"phase{run.k}-{run.i:06}"
    parallel.write_state(run.out / "state", name, tensors_of(run), about)


def load_state(run: Run) -> tuple[int, float]:
    """Go on from the folder's state, or from the first phase. Returns log_bytes, seconds."""
    folder = run.out / "state"
    if (folder / "state.safetensors").exists():
        raise UserError(f"{folder} is of another version; start over with --overwrite")
    if not parallel.once((folder / "state.json").exists):
        return 0, 0.0
    tensors, about = parallel.read_state(folder, plain(run.cfg), "start over with --overwrite")
    restore(run, tensors, about)
    return about["log_bytes"], about["seconds"]


# -- the command ---------------------------------------------------------------------------------


def prepare(args, cfg: Config, stop: Stop) -> Run:
    """A run as its folder has it, or a new one: config, starting tensors, networks."""
    preset, out, device = PRESETS[cfg.teacher], args.out, torch.device(args.device)

    def begin() -> dict:
        if args.overwrite or "config.json" not in contents(out):
            config = {
                "settings": plain(cfg),
                "environment": environment(args.device),
                "files": hashes(preset.files(cfg)),
            }
            write_json(out / "config.json", config)
        return preset.start(cfg, out, lambda steps, text: watch(steps, text, stop), device)

    start = parallel.once(begin)
    if len(set(parallel.gather(preset.boundary(cfg)))) > 1:
        raise UserError("nodes read unlike weights; give all the same")
    stop.check()
    run = new_run(cfg, start, device, out)
    begin_phase(run, 1)
    return run


def new_run(cfg: Config, start: dict[str, Tensor], device: torch.device, out: Path) -> Run:
    """A run whose networks are there, all roles at `start`, before its first phase begins."""
    preset, phases = PRESETS[cfg.teacher], phases_of(cfg)
    roles = preset.roles(cfg, phases, device, out, start)
    meter = Meter(roles.velocity)
    roles = roles._replace(velocity=meter)
    held = moe.held(phases, cfg.fake_per_depth, preset.boundary(cfg))
    auto = cfg.record == "auto"  # by one GPU's memory, for all
    way = parallel.once(lambda: preset.record(cfg, held, device)) if auto else cfg.record
    batch = preset.data(cfg, out)
    return Run(cfg, phases, held, roles, batch, device, out, meter, way == "last")


def phases_of(cfg: Config) -> list[ph.Phase]:
    """The phases of the settings; raises UserError where they make none."""
    try:
        return ph.make_phases(
            cfg.steps,
            cfg.phases,
            cfg.shift,
            cfg.interval,
            cfg.t_margin,
            PRESETS[cfg.teacher].boundary(cfg),
            cfg.boundary,
            cfg.fix_t,
        )
    except ValueError as error:
        raise UserError(str(error)) from None


def drive(run: Run, began: float, stop: Stop) -> float:
    """Train to the end with bars, log, looks and states. Returns its begin, breaks left out."""
    size, before = load_state(run)
    began -= before
    log, bar = Log(run.out / "log.jsonl", size), None
    lap = time.time()
    for rows in train(run):
        if bar is None or rows[0]["iteration"] == -run.cfg.warmup:
            bar = new_bar(run)
        seconds, lap = time.time() - began, timed(run, rows, lap)
        log.write([row | {"seconds": round(seconds, 3)} for row in rows])
        bar.update()
        bar.set_postfix(short(rows), refresh=False)
        last, stopping = run.i == run.cfg.iters, parallel.any_of(stop.signal)
        if due(run, run.cfg.sample_every):
            take_look(run, log)
        if last or stopping or due(run, run.cfg.save_every):
            save_state(run, log.sync(), time.time() - began)
        if stopping:
            raise Interrupted(stopping)
        if last:
            bar.close()
            print(parallel.once(lambda: PRESETS[run.cfg.teacher].closing(run, fake_lag)))
        lap = time.time()
        run.meter.restart()  # looks and states are of no iteration
    return began


def due(run: Run, every: int) -> bool:
    """Whether something that is done at every so many iterations, and at the last, is due."""
    return every > 0 and run.i > 0 and (run.i % every == 0 or run.i == run.cfg.iters)


def timed(run: Run, rows: list[dict], lap: float) -> float:
    """Adds to an iteration's last row how fast it was. Returns the time of now."""
    now = time.time()
    calls, seconds = run.meter.take(), now - lap
    speed = {
        "seconds_iteration": round(seconds, 4),
        "samples_per_second": round(len(rows) * run.cfg.batch / seconds, 3),
        "memory_gb": round(run.meter.peak_memory(run.device) / 1e9, 3),
    }
    rows[-1] |= speed | PRESETS[run.cfg.teacher].speed(run, calls, seconds)
    return now


def take_look(run: Run, log: Log) -> None:
    """Picture, numbers, curves and the student of now: something to choose from."""
    numbers, picture = PRESETS[run.cfg.teacher].report(run, look)
    log.write([{"phase": run.k, "iteration": run.i, "role": "look"} | numbers])
    file = run.out / "looks" / f"phase{run.k}-{run.i:06}.png"
    write(file, picture)
    parallel.once(lambda: write(run.out / "curves.png", curves(run.out / "log.jsonl")))
    if run.cfg.keep:
        save_student(run, file.with_suffix(".safetensors"))
        parallel.once(lambda: keep_newest(file.parent, run.cfg.keep))


def new_bar(run: Run) -> tqdm:
    """A bar for the rest of a phase."""
    total = run.cfg.iters + run.cfg.warmup
    return tqdm(
        total=total,
        initial=run.i + run.cfg.warmup - 1,
        desc=f"phase {run.k} of {len(run.phases)}",
        disable=None,
    )


def short(rows: list[dict]) -> dict:
    """What a bar has room for: loss of the fake, distance of the student from the teacher."""
    shown = {"loss": rows[0]["loss"], "distance": rows[-1].get("distance")}
    return {key: f"{value:.3f}" for key, value in shown.items() if value is not None}


def save_student(run: Run, path: Path) -> None:
    """The experts that are trained so far, in one file."""
    experts = [moe.student_role(phase.k) for phase in run.phases[: run.k]]
    tensors = {
        f"{role}/{name}": p for role in experts for name, p in run.roles.parameters_of(role).items()
    }
    write_tensors(path, tensors, {"settings": plain(run.cfg), "kind": "student", "phase": run.k})


def finish(run: Run, began: float, stop: Stop) -> dict:
    """Student, picture and numbers; metrics.json comes last and says that the run is finished."""
    save_student(run, run.out / "student.safetensors")
    stop.check()
    trained = time.time()
    metrics, picture = PRESETS[run.cfg.teacher].report(run, look)
    write(run.out / "samples.png", picture)
    metrics |= {
        "seconds": round(trained - began, 1),
        "seconds_metrics": round(time.time() - trained, 1),
    }
    stop.check()
    write_json(run.out / "metrics.json", metrics)
    return metrics


def show(metrics: dict, out: Path) -> None:
    """The numbers, a line each, and where the rest is."""
    for name, value in metrics.items():
        values = value if isinstance(value, list) else [value]
        print(f"{name:28}" + " ".join(f"{v:10.4g}" for v in values))
    print(f"folder: {out}")


def dry_run(cfg: Config, device: str, tflops: float) -> None:
    """What a run would be: the phases, memory and time, on the meta device."""
    phases = phases_of(cfg)
    print(ph.table(phases, cfg.shift) + remark(cfg))
    preset = PRESETS[cfg.teacher]
    held = moe.held(phases, cfg.fake_per_depth, preset.boundary(cfg))
    print(preset.plan(cfg, phases, held, device, 1e12 * tflops))


def remark(cfg: Config) -> str:
    """What to know before days of training: whether other tools could ask the right expert."""
    phases, boundary_t = phases_of(cfg), PRESETS[cfg.teacher].boundary(cfg)
    homes = {role: moe.expert_of(role, phases, boundary_t) for role in moe.owners(phases)}
    try:
        export.experts_of(phases, homes, boundary_t)
        return ""
    except UserError as error:
        return f"\nnote: {error}"


def parser() -> Parser:
    """A flag for every field of Config, and those that are about the command and not the run."""
    made = Parser(__doc__)
    add_flags(made, Config, {name: preset.settings for name, preset in PRESETS.items()})
    made.add_argument(
        "--device",
        default="auto",
        choices=("auto", "cpu", "cuda", "mps"),
        help="auto: the fastest there is; toys: cpu",
    )
    made.add_argument("--out", type=Path, help="the run's folder (default out/TEACHER)")
    made.add_argument(
        "--resume",
        action="store_true",
        help="go on with what is in --out; starts if nothing is there",
    )
    made.add_argument("--overwrite", action="store_true", help="replace the run in --out")
    made.add_argument(
        "--dry-run", action="store_true", help="print phases, memory and time, write nothing"
    )
    made.add_argument(
        "--tflops", type=float, default=0.0, help="of --dry-run: your device's (default: measured)"
    )
    made.add_argument(
        "--context-parallel",
        type=int,
        default=1,
        metavar="P",
        help="under torchrun: processes that share the tokens of each sample (default 1)",
    )
    made.add_argument(
        "--processes",
        default="",
        metavar="[NODESx]N",
        help="of --dry-run: plan for so many, as 8, or for 4x8 of 4 nodes (default 1)",
    )
    made.add_argument("--adapter", choices=KINDS, help="sets both --generator and --fake")
    return made


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, Config]:
    """Command line -> options (with the settings that were given) and the checked Config."""
    args = parser().parse_args(argv)
    args.given = given(args, Config)
    if args.adapter:
        args.given = {"generator": args.adapter, "fake": args.adapter} | args.given
    for name in ("points", "prompts", "images", "weights", "teacher_lora"):
        if name in args.given:  # in full, since a run may go on from elsewhere
            args.given[name] = in_full(args.given[name])
    args.asked, args.out = args.device, args.out or Path("out") / args.given.get("teacher", "toy2d")
    if not 0 <= args.tflops < 1e6:
        raise UserError(f"--tflops {args.tflops} is no rate in Tflop/s, as 400")
    if args.processes and not args.dry_run:
        raise UserError("--processes is of --dry-run; torchrun starts the processes of a run")
    if args.resume and args.overwrite:
        raise UserError("--resume keeps a run and --overwrite removes it; give one of them")
    cfg = Config(**args.given)
    check_teacher(cfg)
    args.device = pick_device(args.device, usual_device(args, cfg))
    return args, config(**args.given)


def in_full(paths):
    """One path, or several, from the root; `random` is none."""
    if isinstance(paths, tuple):
        return tuple(map(in_full, paths))
    return paths if paths in ("", "random") else str(Path(paths).resolve())


def usual_device(args, cfg: Config) -> str:
    """What --device auto means: the teacher's word, a resumed run's own teacher's."""
    file = args.out / "config.json"
    held = read_json(file, "start over with --overwrite") if args.resume and file.is_file() else {}
    settings = held.get("settings")
    teacher = settings.get("teacher") if isinstance(settings, dict) else None
    return PRESETS[teacher if teacher in list(PRESETS) else cfg.teacher].device


def check_teacher(cfg: Config) -> None:
    """Raise UserError for a teacher that there is not."""
    if cfg.teacher not in PRESETS:
        near = difflib.get_close_matches(cfg.teacher, PRESETS, cutoff=0)
        raise UserError(f"unknown --teacher {cfg.teacher}; nearest: {', '.join(near)}")


def validate(cfg: Config, files: bool = True) -> None:
    """Raise UserError for settings, and for files, that cannot make a run."""
    check_teacher(cfg)
    check(cfg)
    PRESETS[cfg.teacher].check(cfg)
    if files:
        PRESETS[cfg.teacher].files(cfg)
    phases_of(cfg)
    if cfg.fake_per_depth and cfg.truncate == "off":
        raise UserError("--fake-per-depth needs truncation: without it there are no depths")


MEMORY = "--dry-run says what would fit: --micro-batch 1, --record last, --offload expert or blocks"


def main(argv: list[str] | None = None) -> int:
    """The command. Returns its exit status: 0, 2 for a user's error, 130 or 143 for a signal."""
    parallel.quiet()
    try:
        args, cfg = parse(argv)
        if args.dry_run:
            with parallel.planned(args.processes, args.context_parallel):
                validate(cfg, files=False)
                dry_run(cfg, args.device, args.tflops)
            return 0
        with parallel.processes(args.device, args.context_parallel, "train.py"):
            work(args, cfg)
        return 0
    except UserError as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        return closed_pipe()
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        print(f"train.py: out of memory; {MEMORY}", file=sys.stderr)
        return 2
    except Interrupted as interrupted:
        device = "" if args.asked == "auto" else f" --device {args.asked}"
        tokens = f" --context-parallel {args.context_parallel}" if args.context_parallel > 1 else ""
        out = shlex.quote(str(args.out))
        line = f"{args.launcher} train.py --resume --out {out}{device}{tokens}"
        print(f"stopped; continue with: {line}")
        return 128 + interrupted.number


def work(args, cfg: Config) -> None:
    """Train, or go on, or show what is finished."""
    args.launcher = parallel.launcher()
    usual = torch.get_num_threads()
    torch.set_num_threads(PRESETS[cfg.teacher].threads or usual)
    cfg, finished = parallel.once(lambda: settled(args, cfg))
    if finished:
        print("finished before; nothing was run. --overwrite trains again")
        return show(read_json(args.out / "metrics.json", "start over with --overwrite"), args.out)
    print(ph.table(phases_of(cfg), cfg.shift) + remark(cfg))
    began = time.time()
    with Stop() as stop:
        run = prepare(args, cfg, stop)
        began = drive(run, began, stop)
        torch.set_num_threads(usual)  # distances of many samples gain from every core
        show(finish(run, began, stop), args.out)


def settled(args, cfg: Config) -> tuple[Config, bool]:
    """The settings to run with, checked, and whether that run is finished. Raises UserError."""
    if not args.resume:
        validate(cfg)
    cfg, finished = settle(args, cfg)
    if args.resume:
        validate(cfg)
    return cfg, finished


if __name__ == "__main__":
    sys.exit(main())
