"""Phased DMD: distil a teacher into a few-step student, phase by phase.

python train.py                                a ring of 8 modes, half a minute on a CPU
python train.py --phases 1 --out out/dmd2      the same steps in one phase: DMD2
python train.py --points FILE.csv              your own points as the data
python train.py --teacher wan22-tiny           the loop of wan22 on small random networks
python train.py --teacher wan22 --dry-run      estimate memory and time; needs no weights, no GPU
python train.py --resume                       continue the run in the output folder
"""

import argparse
import math
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

import moe
from losses import dmd_gradient, dmd_loss, naive_matching, subinterval_matching
from models import common, media, parallel, teachers
from models.adamw import AdamW
from models.common import START_OVER, UserError, stream, uniform
from phases import (
    Interval,
    Phase,
    format_phases,
    make_phases,
    pick_interval,
    renoise_times,
    rollout,
    split_batch,
    step_times,
)
from sde import diffuse
from toy import digits, toy2d

data, method, training, memory, output = (
    partial(common.option, group=group) for group in common.GROUPS
)
ON_OFF, KINDS, DTYPES = ("on", "off"), ("lora", "full"), ("bf16", "float32")


# fmt: off
@dataclass(frozen=True)
class Config:
    """The settings of a run: one flag each. The defaults are the paper's, where it gives them."""

    teacher: str        = data("toy2d", "name of a preset: toy2d, mnist, wan22, qwen-image, ...")
    toy: str            = data("ring", "distribution of toy2d", tuple(toy2d.TOYS))
    points: str         = data("", "your own data for toy2d: csv or npy, n x d, n <= 2000")
    classes: str        = data("off", "toys: condition on the class", ON_OFF)
    boundary: float     = data(0.0, "toy2d: the teacher has two branches, which meet at this t; 0: "
                               "one branch", low=0, high=1)
    guidance: tuple     = data((1.0,), "CFG scale of the teacher, or two: high noise, low noise",
                               kind=float, low=0)
    weights: tuple      = data((), "published weights: a folder, or a path per branch (high noise "
                               "first), or `random` (default weights/NAME)", kind=str)
    teacher_lora: tuple = data((), "LoRA to merge into the teacher: FILE[:STRENGTH] ..., "
                               "see sample.py --lora", kind=str)
    prompts: str        = data("", "txt, one prompt per line, csv, tsv, jsonl, or embeddings")
    images: str         = data("", "image to video: first frames made by models.encoders")
    size: tuple         = data((), "pixels, [FRAMESx]HEIGHTxWIDTH[:PROBABILITY] ...", kind=str)
    frames: int         = data(1, "frames of a video, 4n + 1", low=1)

    phases: int         = method(2, "K, a divisor of --steps; 1 is DMD2", low=1)
    steps: int          = method(4, "N, steps of the student", low=1, high=1000)
    shift: float        = method(5.0, "S in t = S u / (1 + (S - 1) u)", low=0.01, high=100)
    interval: str       = method("nested", "re-noise in (s, 1), or in (s, start of the phase)",
                                 ("nested", "disjoint"))
    fix_t: float        = method(0.0, "re-noise at this t alone (Fig. 11); 0: off", low=0, high=1)
    truncate: str       = method("on", "gradient through one step (SGTS), or through all", ON_OFF)
    depths: str         = method("drawn", "truncation depth: one drawn per batch, or every one in "
                                 "each batch", ("drawn", "mixed"))
    fake_rollout: str   = method("complete", "samples of the fake: of complete rollouts, truncated "
                                 "as the student's, or these with a fake per depth",
                                 ("complete", "truncated", "per-depth"))
    target: str         = method("unbiased", "target of the fake: Eq. 11, or Fig. 2(c)",
                                 ("unbiased", "biased"))
    weight: str         = method("paper", "weight of the student's gradient; paper: Eq. 10",
                                 ("paper", "xs", "normalised", "none"))

    iters: int          = training(400, "student updates per phase", low=1)
    fake_updates: int   = training(5, "fake updates per student update", low=1)
    reuse_rollouts: bool = training(False, "fake updates of an iteration share their samples")
    warmup: int         = training(0, "fake updates before a phase's first student update", low=0)
    batch: int          = training(64, "samples per update", low=1)
    micro_batch: int    = training(0, "samples per forward; 0: as many as share a depth", low=0)
    generator: str      = training("lora", "what the student's experts train", KINDS)
    fake: str           = training("full", "what the fakes train", KINDS)
    rank: int           = training(64, "rank of the adapters", low=1)
    alpha: float        = training(8.0, "adapters add alpha / rank up(down(x))", above=0)
    lr: float           = training(5e-5, "rate of the student; 2e-6 where full", above=0, high=1)
    fake_lr: float      = training(4e-7, "rate of the fakes; 5e-5 where lora", above=0, high=1)
    lr_decay: float     = training(0.0, "last part of a phase, in which rates fall to 0", low=0,
                                   high=1)
    seed: int           = training(0, "seed of all random numbers", low=0)

    dtype: str          = memory("bf16", "inside large networks; all else is float32", DTYPES)
    checkpointing: str  = memory("on", "recompute activations in backward", ON_OFF)
    base: str           = memory("float", "int8: the teacher's layers in half the memory",
                                 ("float", "int8"))
    compile: bool       = memory(False, "torch.compile the blocks of large networks")

    save_every: int     = output(200, "iterations between checkpoints for --resume", low=1)
    sample_every: int   = output(0, "iterations between previews; 0: none", low=0)
    eval_samples: int   = output(10_000, "samples behind each metric", low=2)
# fmt: on

    @property
    def fake_per_depth(self) -> bool:
        """Whether every truncation depth has a fake of its own."""
        return self.fake_rollout == "per-depth"


TOY = dict(  # what a mixture in the plane needs in place of the paper's settings
    shift=1.0, weight="xs", depths="mixed", warmup=200, batch=256, generator="full", lr=1e-3,
    fake_lr=2e-3, lr_decay=0.5, checkpointing="off",
)  # fmt: skip
DIGIT_SETTINGS = dict(  # small enough for float32, and for no need to save memory
    guidance=(2.0,), size=("32x32",), shift=3.0, weight="none", depths="mixed", fake_updates=3,
    reuse_rollouts=True, warmup=50, generator="full", lr=3e-4, fake_lr=1e-3, lr_decay=0.5,
    dtype="float32", checkpointing="off",
)  # fmt: skip
LARGE = dict(fake="lora", micro_batch=1, sample_every=50, save_every=50, eval_samples=4)
VIDEO = LARGE | dict(frames=81, size=("480x832:0.4", "832x480:0.4", "720x1280:0.1", "1280x720:0.1"))
QWEN = dict(shift=3.0, guidance=(4.0,), size=(
    "1328x1328", "1664x928", "928x1664", "1472x1104", "1104x1472", "1584x1056", "1056x1584",
))  # fmt: skip
TINY = LARGE | dict(
    iters=4, batch=4, micro_batch=2, sample_every=2, save_every=2, rank=4, fake_updates=2
)
CLIP = TINY | dict(frames=9, size=("48x64", "64x48"))
# fmt: off
PRESETS = {  # teacher: (module, settings); CONTRIBUTING.md lists what a module provides
    "toy2d":           (toy2d,    TOY),
    "mnist":           (digits,   DIGIT_SETTINGS),
    "wan21-1.3b":      (teachers, VIDEO | dict(guidance=(6.0,))),
    "wan21":           (teachers, LARGE | dict(guidance=(5.0,), size=("720x1280",))),
    "wan22":           (teachers, VIDEO | dict(guidance=(4.0, 3.0))),
    "wan22-i2v":       (teachers, VIDEO | dict(guidance=(3.5, 3.5))),
    "wan22-5b":        (teachers, VIDEO | dict(guidance=(5.0,), size=("704x1280",))),
    "qwen-image":      (teachers, LARGE | QWEN),
    "wan21-tiny":      (teachers, CLIP | dict(guidance=(5.0,))),
    "wan22-tiny":      (teachers, CLIP | dict(guidance=(4.0, 3.0))),
    "wan22-i2v-tiny":  (teachers, CLIP | dict(guidance=(3.5, 3.5))),
    "qwen-image-tiny": (teachers, TINY | QWEN | dict(size=("64x96", "96x64"))),
}
# fmt: on
LEARNING_RATES = {"lora": (5e-5, 5e-5), "full": (2e-6, 4e-7)}  # of student and fake
MAX_SKIPS = 20  # non-finite updates in a row before a run stops
SAVE_SECONDS = 1800  # at most, between two checkpoints
KEEP_STUDENTS = 2  # of a large teacher's previews, the newest


def preset_of(teacher: str) -> tuple:
    """Module and settings of a preset. Raises UserError."""
    if teacher not in PRESETS:
        raise UserError(f"--teacher: expected one of {', '.join(PRESETS)}, got {teacher}")
    return PRESETS[teacher]


def make_config(teacher: str = "toy2d", **settings) -> Config:
    """The settings of a preset, changed where `settings` says so. Raises UserError."""
    settings = preset_of(teacher)[1] | {"teacher": teacher} | settings
    cfg = Config(**settings)
    rates = {"lr": LEARNING_RATES[cfg.generator][0], "fake_lr": LEARNING_RATES[cfg.fake][1]}
    return replace(cfg, **{name: lr for name, lr in rates.items() if name not in settings})


def module_of(cfg: Config):
    """The preset's module: toy2d, digits or teachers."""
    return preset_of(cfg.teacher)[0]


def phases_of(cfg: Config) -> list[Phase]:
    """The phases of the settings. Raises UserError if they make none."""
    boundary_t = module_of(cfg).boundary_of(cfg)
    try:
        return make_phases(cfg.steps, cfg.phases, cfg.shift, cfg.interval, boundary_t, cfg.fix_t)
    except ValueError as error:
        raise UserError(str(error)) from None


@dataclass
class Run:
    """A run. Between two iterations only the roles' parameters and the counters have changed."""

    cfg: Config
    phases: list[Phase]
    roles: moe.Roles
    data: Callable  # (n, shared, rng) -> conditions of n samples, shape of one sample
    device: torch.device
    out: Path  # the run's folder
    k: int = 1  # phase
    i: int = 0  # next iteration of the phase; negative while the fake warms up
    optimizers: dict[str, AdamW] = field(default_factory=dict)  # by role name
    skips: dict[str, int] = field(default_factory=dict)  # non-finite updates in a row

    @property
    def phase(self) -> Phase:
        """The current phase."""
        return self.phases[self.k - 1]

    @property
    def nets(self) -> list[moe.Role]:
        """The student's network of each step, up to the end of the current phase."""
        return moe.student_nets(self.roles, self.phases[: self.k])

    @property
    def times(self) -> tuple[float, ...]:
        """The times of the student's steps, from 1 to 0."""
        return step_times(self.cfg.steps, self.cfg.shift)

    @property
    def finished(self) -> bool:
        """Whether the last phase has been trained."""
        return self.k == len(self.phases) and self.i == self.cfg.iters

    def key(self, u: int) -> tuple:
        """The key of update u's random numbers, equal on all ranks."""
        return self.cfg.seed, self.k, self.i, u


# -- the method ----------------------------------------------------------------------------------


def train(run: Run) -> Iterator[list[dict]]:
    """Train phase after phase. Yields the log rows of each iteration, and can be left there.

    Phase 1 has begun already, by begin_phase or from a checkpoint (load_state).
    """
    while True:
        while run.i < run.cfg.iters:
            rows = run_iteration(run)
            run.i += 1
            yield rows
        if run.k == len(run.phases):
            return
        begin_phase(run, run.k + 1)


def begin_phase(run: Run, k: int) -> None:
    """Start the expert and the fakes of phase k from the teacher; earlier experts stay frozen.

    The old fake never saw times below t_{k-1}, nor samples of the new expert. A new fake is the
    teacher without guidance, which is what the new expert makes too (toys: a network fitted to it).
    """
    run.k, run.i, run.optimizers = k, -run.cfg.warmup, {}  # frees old moments before new ones
    student = run.roles.student[k]
    fakes = [run.roles.fakes[key] for key in moe.fake_keys(run.phase, run.cfg.fake_per_depth)]
    for role, lr in [(student, run.cfg.lr), *((fake, run.cfg.fake_lr) for fake in fakes)]:
        role.start()
        run.optimizers[role.name] = AdamW(role.parameters, lr)


def run_iteration(run: Run) -> list[dict]:
    """Update the fake several times, then the student once.

    The student's gradient is right only where the fake has converged on the student's present
    samples (assumption A1). So the fake goes first and takes five updates for each of the student.
    """
    updates = run.cfg.fake_updates if run.i >= 0 else 1
    shared = list(simulate(run, 0)) if run.cfg.reuse_rollouts else None
    rows = [update_fake(run, u, shared or simulate(run, u)) for u in range(updates)]
    return rows if run.i < 0 else [*rows, update_student(run, updates)]


def simulate(run: Run, u: int) -> Iterator[tuple]:
    """Yield micro-batches with the student's samples x_s at the end of the phase (Eq. 9)."""
    for batch in micro_batches(run, u, truncate=run.cfg.fake_rollout != "complete"):
        with torch.no_grad():
            x_s = rollout(run.nets, run.times, run.phase, batch.z, batch.c, batch.depth)
        yield x_s, batch


def update_fake(run: Run, u: int, samples: Iterable[tuple]) -> dict:
    """One step of score matching on the student's samples: Eq. 8; inside (s, 1) Eq. 13.

    v_real - v_fake is a difference of scores only if teacher and fake are the same function of
    their scores (assumption A2). The target of Eq. 11 ensures this; the naive one does not.
    """
    s, interval, total = run.phase.s, choose_interval(run, u), 0.0
    matching = subinterval_matching if run.cfg.target == "unbiased" else naive_matching
    for x_s, batch in samples:
        t, eps = renoise(run, interval, x_s, batch.rng)
        x_t = diffuse(x_s, s, t, eps)  # (n, ...)
        v_fake = fake_of(run, interval, batch)(x_t, t, batch.c)
        loss = matching(v_fake, x_s, s, t, eps).mean() * batch.share
        loss.backward()
        total += loss.detach()
    loss = parallel.all_reduce_sum(total)
    return step_optimizers(run, f"fake{interval.branch}", {"loss": loss})


def update_student(run: Run, u: int) -> dict:
    """One step of the expert down the reverse KL at random times t: Eq. 10; at s = 0 Eq. 7."""
    s, interval, total = run.phase.s, choose_interval(run, u), 0.0
    checkpointing = run.cfg.checkpointing == "on"
    for batch in micro_batches(run, u):
        x_s = rollout(run.nets, run.times, run.phase, batch.z, batch.c, batch.depth, checkpointing)
        with torch.no_grad():  # the gradient is a constant: no graph of teacher or fake
            t, eps = renoise(run, interval, x_s, batch.rng)
            x_t = diffuse(x_s, s, t, eps)
            v_real = run.roles.teacher[interval.branch](x_t, t, batch.c)  # CFG included
            v_fake = fake_of(run, interval, batch)(x_t, t, batch.c)
            gradient = dmd_gradient(x_s, x_t, s, t, v_real, v_fake, run.cfg.weight)
        loss = dmd_loss(x_s, gradient).mean() * batch.share
        loss.backward()
        total += batch.share * mean_squares(v_real - v_fake, x_s.detach())
    distance, x_rms = parallel.all_reduce_sum(total).sqrt()
    return step_optimizers(run, f"student{run.k}", {"distance": distance, "x_rms": x_rms})


class MicroBatch(NamedTuple):
    """What some samples of an update start from."""

    z: Tensor  # (n, ...) noise
    c: dict | None  # conditions
    depth: int | None  # truncation depth; None: all steps of the phase
    rng: torch.Generator  # gives t and eps next
    share: float  # n / batch


def micro_batches(run: Run, u: int, truncate: bool = True) -> Iterator[MicroBatch]:
    """The micro-batches of update u that this rank computes; truncate: with a truncation depth.

    Each has a random stream of its own, so numbers do not depend on how many ranks there are. What
    all ranks must agree on (shape, depth, branch) comes from streams whose key has no m.
    """
    cfg, r = run.cfg, uniform((), *run.key(u), "depth").item()
    depths = run.phase.num_steps if truncate and cfg.truncate == "on" else 0
    sizes = split_batch(cfg.batch, cfg.micro_batch, depths, cfg.depths == "mixed", r)
    share, updates = parallel.my_share(list(enumerate(sizes))), cfg.fake_updates + 1
    for m, (n, depth) in common.watch_update(share, u, updates if run.i >= 0 else 1):
        rng = stream(*run.key(u), m)
        c, shape = run.data(n, stream(*run.key(u), "data"), rng)
        z = moe.to_device(torch.randn(n, *shape, generator=rng), run.device)
        yield MicroBatch(z, moe.cond_to(c, run.device), depth, rng, n / cfg.batch)


def renoise(run: Run, interval: Interval, x_s: Tensor, rng: torch.Generator) -> tuple:
    """Random times t (n,) in the interval and noise eps (n, ...)."""
    t = renoise_times(interval, torch.rand(len(x_s), generator=rng), run.cfg.shift)
    eps = torch.randn(x_s.shape, generator=rng)
    return moe.to_device(t, x_s.device), moe.to_device(eps, x_s.device)


def choose_interval(run: Run, u: int) -> Interval:
    """The part of the phase's interval, and so the teacher's branch, that update u uses."""
    return pick_interval(run.phase, uniform((), *run.key(u), "interval").item())


def fake_of(run: Run, interval: Interval, batch: MicroBatch) -> moe.Role:
    """The fake beside the interval's branch, for the truncation depth of the batch."""
    return run.roles.fakes[interval.branch, batch.depth if run.cfg.fake_per_depth else 0]


# -- optimizer and checkpoint --------------------------------------------------------------------


def step_optimizers(run: Run, name: str, values: dict[str, Tensor]) -> dict:
    """Step every role that has gradients, under one name in the log.

    The update is skipped if one of `values`, or the norm of the gradients, is not finite. Returns
    the update's log row.
    """
    has_grad = lambda o: any(p.grad is not None for p in o.parameters.values())
    optimizers = [o for o in run.optimizers.values() if has_grad(o)]  # all others were cleared
    grads = [p.grad for o in optimizers for p in o.parameters.values() if p.grad is not None]
    values = values | {"grad_norm": parallel.grad_norm(grads)}
    numbers = torch.stack(list(values.values())).tolist()  # the update's only GPU sync
    finite = all(map(math.isfinite, numbers))
    run.skips[name] = 0 if finite else run.skips.get(name, 0) + 1
    if run.skips[name] > MAX_SKIPS:
        raise UserError(
            f"phase {run.k}, iteration {run.i}: {run.skips[name]} updates of {name} in a row were "
            "not finite; start over with --overwrite and a lower --lr or --fake-lr"
        )
    for optimizer in optimizers:
        if finite:
            optimizer.step(lr_factor(run.cfg, run.i))
        for p in optimizer.parameters.values():
            p.grad = None
    row = {"phase": run.k, "iteration": run.i, "role": name, "skipped": not finite}
    numbers = [x if math.isfinite(x) else None for x in numbers]  # JSON has no NaN
    return row | dict(zip(values, numbers, strict=True))


def mean_squares(*tensors: Tensor) -> Tensor:
    """The mean square of each tensor, for the log."""
    return torch.stack([x.square().mean() for x in tensors])


def lr_factor(cfg: Config, i: int) -> float:
    """Factor of both learning rates: 1, then linear to 0 over the last lr_decay of a phase."""
    return min(1.0, (cfg.iters - i) / max(1.0, cfg.iters * cfg.lr_decay))


def trained_experts(run: Run) -> list[moe.Role]:
    """The experts of the phases up to the current one."""
    return [role for k, role in run.roles.student.items() if k <= run.k]


def role_tensors(roles: list[moe.Role]) -> dict[str, Tensor]:
    """The parameters of roles, as role/parameter -> tensor."""
    return {f"{role.name}/{key}": p for role in roles for key, p in role.parameters.items()}


def state_tensors(run: Run) -> dict[str, Tensor]:
    """All that was trained: parameters of experts and of this phase's fakes, second moments."""
    fakes = [role for role in run.roles.fakes.values() if role.name in run.optimizers]
    tensors = role_tensors(trained_experts(run) + fakes)
    for name, optimizer in run.optimizers.items():
        tensors |= {f"{name}.second/{key}": v for key, v in optimizer.second.items()}
    return {key: tensor.detach() for key, tensor in tensors.items()}


def save_state(run: Run, log_bytes: int, seconds: float) -> None:
    """Write a checkpoint. Random numbers are functions of the counters: there is no other state."""
    counters = dict(phase=run.k, iteration=run.i, skips=run.skips, log_bytes=log_bytes)
    counters["optimizer_steps"] = {name: o.steps for name, o in run.optimizers.items()}
    metadata = {"kind": "state", "settings": common.to_json(run.cfg), "seconds": seconds} | counters
    name = f"phase{run.k}-{run.i:06}"
    parallel.write_state(run.out / "state", name, state_tensors(run), metadata)


def load_state(run: Run) -> tuple[int, float]:
    """Continue from the run's checkpoint, or begin phase 1. Returns log_bytes and seconds."""
    folder = run.out / "state"
    if not parallel.on_rank0((folder / "state.json").exists):
        begin_phase(run, 1)
        return 0, 0.0
    tensors, metadata = parallel.read_state(folder, common.to_json(run.cfg), START_OVER)
    with common.reading(folder / "state.json", START_OVER):  # a wrong type fails here
        [k] = [phase.k for phase in run.phases if phase.k == metadata["phase"]]
        i, log_bytes = int(metadata["iteration"]), int(metadata["log_bytes"])
        seconds = float(metadata["seconds"])
        steps = {name: int(n) for name, n in metadata["optimizer_steps"].items()}
        skips = {name: int(n) for name, n in metadata["skips"].items()}
    for earlier in range(1, k):
        run.roles.student[earlier].start()  # allocate the parameters of frozen experts
    begin_phase(run, k)
    run.i, run.skips = i, skips
    for name, optimizer in run.optimizers.items():
        if name not in steps:
            raise UserError(f"{folder}: expected the steps of {name}; {START_OVER}")
        optimizer.steps = steps[name]
    for name, tensor in state_tensors(run).items():
        if name not in tensors or tensors[name].shape != tensor.shape:
            raise UserError(f"{folder}: expected a tensor {name}; {START_OVER}")
        with common.reading(folder, START_OVER):
            parallel.copy_to_local(tensor, tensors[name])
    return log_bytes, seconds


def save_student(run: Run, path: Path) -> None:
    """Write the experts trained so far into one safetensors file."""
    parameters = role_tensors(trained_experts(run))
    tensors = {key: parallel.full_tensor(p) for key, p in parameters.items()}
    metadata = {"kind": "student", "settings": common.to_json(run.cfg), "phase": run.k}
    common.write_tensors(path, tensors, metadata)


# -- a run from its first iteration to its last ----------------------------------------------------


def make_run(cfg: Config, device: torch.device, out: Path, roles: moe.Roles | None = None) -> Run:
    """A run before its first phase. Without roles, `prepare` must have been called for `out`."""
    module, phases = module_of(cfg), phases_of(cfg)
    roles = roles or module.make_roles(cfg, phases, device, out)
    return Run(cfg, phases, roles, module.make_data(cfg, out), device, out)


def run_training(run: Run, began: float, stop: common.Stop) -> float:
    """Train with progress bar, log, previews and checkpoints. Returns the seconds it took."""
    cfg, module = run.cfg, module_of(run.cfg)
    log_bytes, seconds = load_state(run)
    log = common.Log(run.out / "log.jsonl", log_bytes)
    module.throughput(cfg, run.phase, 1.0, run.device)  # measures the GPU's speed, once
    bar, began, clock, saved = None, began - seconds, time.monotonic(), time.monotonic()
    common.reset_peak_memory(run.device)
    for rows in train(run):
        if bar is None or rows[0]["iteration"] == -cfg.warmup:
            text, done = f"phase {run.k} of {len(run.phases)}", run.i + cfg.warmup - 1
            bar = tqdm(total=cfg.iters + cfg.warmup, initial=done, desc=text, disable=None)
            phase_rows = []
        seconds = time.monotonic() - clock
        rows[-1] |= {"seconds_iteration": round(seconds, 4)} | common.peak_memory(run.device)
        rows[-1] |= module.throughput(cfg, run.phase, seconds, run.device)
        log.write([row | {"seconds": round(time.monotonic() - began, 3)} for row in rows])
        phase_rows += rows
        bar.set_postfix({"loss": rows[0]["loss"], "distance": rows[-1].get("distance")}, False)
        bar.update()
        last, signal = run.i == cfg.iters, stop.received()
        late = parallel.max_over_ranks(time.monotonic() - saved > SAVE_SECONDS)
        if is_due(run, cfg.sample_every):
            save_preview(run, log)
        if signal or late or is_due(run, cfg.save_every):
            save_state(run, log.sync(), time.monotonic() - began)
            saved = time.monotonic()
        if signal:  # the one read above: for a later one there is no checkpoint yet
            raise common.Interrupted(signal, stop.advice)
        if last:
            bar.close()
            print(f"{text}: {cfg.iters} iterations, {time.monotonic() - began:.0f} s so far")
            print(module.phase_summary(cfg, run.phases, run.k, phase_rows), end="")
        clock = time.monotonic()  # previews and checkpoints belong to no iteration
    return time.monotonic() - began


def is_due(run: Run, every: int) -> bool:
    """Whether a task of every `every` iterations, and of the last one, is due."""
    return every > 0 and run.i > 0 and (run.i % every == 0 or run.i == run.cfg.iters)


def report(run: Run) -> tuple[dict, bytes]:
    """Metrics and a picture of the student so far, by the preset's module."""
    module, progress = module_of(run.cfg), (run.k, run.device, run.out, run.finished)
    return module.report(run.cfg, run.phases, run.roles, *progress)


def save_preview(run: Run, log: common.Log) -> None:
    """Write metrics, picture and curves, and of large teachers the student so far."""
    metrics, picture = report(run)
    log.write([{"phase": run.k, "iteration": run.i, "role": "preview"} | common.finite(metrics)])
    file = run.out / "previews" / f"phase{run.k}-{run.i:06}.png"
    common.write_file(file, picture)
    if module_of(run.cfg) is teachers:
        save_student(run, file.with_suffix(".safetensors"))
    if common.is_writer:
        common.write_file(run.out / "curves.png", media.curves(run.out / "log.jsonl"))
        for old in sorted(file.parent.glob("*.safetensors"))[:-KEEP_STUDENTS]:
            old.unlink()


def save_results(run: Run, seconds: float, stop: common.Stop) -> dict:
    """Write student, picture and metrics. metrics.json comes last: it marks a finished run."""
    save_student(run, run.out / "student.safetensors")
    stop.check()
    began = time.monotonic()
    metrics, picture = report(run)
    metrics |= {"seconds": round(seconds, 1), "seconds_metrics": round(time.monotonic() - began, 1)}
    stop.check()
    common.write_file(run.out / "samples.png", picture)
    metrics = common.finite(metrics)
    common.write_json(run.out / "metrics.json", metrics)
    return metrics


# -- the command ---------------------------------------------------------------------------------


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, Config]:
    """Parse the command line into the command's own options and a Config. Raises UserError."""
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--teacher", nargs="?")  # --help shows the defaults of this one
    teacher = finder.parse_known_args(argv)[0].teacher or "toy2d"
    parser = common.Parser(__doc__)
    presets = {name: settings for name, (_, settings) in PRESETS.items()}
    common.add_run_flags(common.add_flags(parser, Config, presets, teacher))
    args = parser.parse_args(argv)
    args.argv = sys.argv[1:] if argv is None else argv
    args.explicit = explicit = common.explicit_flags(args, Config)
    for name in {"points", "prompts", "images", "weights", "teacher_lora"} & set(explicit):
        explicit[name] = common.absolute_paths(explicit[name])  # a run may be resumed elsewhere
    args.out = args.out or Path("out") / teacher
    if args.resume and args.overwrite:
        raise UserError("--resume keeps a run and --overwrite removes it: give one of them")
    if args.processes and not args.dry_run:
        raise UserError("--processes belongs to --dry-run; torchrun starts the ranks of a run")
    return args, make_config(**explicit)


def validate(cfg: Config, files: bool = True) -> None:
    """Raise UserError for settings, or input files, that cannot make a run."""
    common.check_values(cfg)
    module_of(cfg).check_config(cfg)
    if files:
        module_of(cfg).input_files(cfg)
    if cfg.truncate == "off" and cfg.fake_per_depth:
        raise UserError("--fake-rollout per-depth needs --truncate on: there are no depths without")
    depths = phases_of(cfg)[0].num_steps
    count = -(-cfg.batch // cfg.micro_batch) if cfg.micro_batch else min(depths, cfg.batch)
    if cfg.depths == "mixed" and count % depths:
        raise UserError(
            f"--depths mixed: expected a multiple of {depths} micro-batches, one per depth, got "
            f"{count}; change --batch or --micro-batch"
        )


def resolve(args: argparse.Namespace, cfg: Config, device: str) -> tuple[Config, bool]:
    """The settings to run with, and whether that run is finished. Writes or checks config.json."""
    if not args.resume:
        validate(cfg)
    elif not (args.out / "config.json").exists():
        print(f"{args.out} contains no run yet: a new one begins")
    folder_args = args.out, cfg, args.explicit, args.resume, args.overwrite, Config
    cfg, finished = common.resolve_run(*folder_args)
    if args.resume:
        validate(cfg)
    ranks = parallel.topology.processes, parallel.topology.context_parallel
    environment = {} if finished else common.environment(device, *ranks)
    files = module_of(cfg).input_files(cfg)
    common.record_run(args.out, cfg, environment, files, args.overwrite)
    return cfg, finished


def run_command(args: argparse.Namespace, cfg: Config, device: str) -> None:
    """Train, or continue, or print the metrics of a finished run."""
    cfg, finished = parallel.on_rank0(lambda: resolve(args, cfg, device))
    if finished:
        print("This run is already finished. Use --overwrite to train it again.")
        file = args.out / "metrics.json"
        with common.reading(file, START_OVER):
            return common.print_metrics(common.read_json(file, START_OVER), args.out)
    module, device, began = module_of(cfg), torch.device(device), time.monotonic()
    torch.set_num_threads(module.THREADS or torch.get_num_threads())
    print(format_phases(phases_of(cfg), cfg.shift))
    flags = f" --context-parallel {args.context_parallel}" * (args.context_parallel > 1)
    command = f"{parallel.launch_command()} train.py --resume --out {shlex.quote(str(args.out))}"
    with common.Stop(f"continue with: {command}{flags}", parallel.max_over_ranks) as stop:
        progress = partial(common.with_progress, stop=stop)
        parallel.on_rank0(lambda: module.prepare(cfg, args.out, device, progress))
        stop.check()
        run = make_run(cfg, device, args.out)
        seconds = run_training(run, began, stop)
        common.print_metrics(save_results(run, seconds, stop), args.out)


def main(argv: list[str] | None = None) -> int:
    """The command. Returns its exit status: 0, 2 for a user's error, 130 or 143 for a signal."""

    def work() -> None:
        args, cfg = parse(argv)
        file = args.out / "config.json"
        if args.resume and file.exists():  # the command need not name the teacher
            cfg = common.config_from_json(Config, common.read_json(file, START_OVER), args.out)
        device = common.pick_device(args.device, module_of(cfg).DEFAULT_DEVICE)
        if not args.dry_run:
            with parallel.distributed(device, args.context_parallel, "train.py"):
                validate(cfg, files=False)
                with teachers.watch_memory(args, cfg, phases_of(cfg), device):
                    return run_command(args, cfg, device)
        with parallel.pretend_topology(args.processes, args.context_parallel):
            validate(cfg, files=False)
            print(format_phases(phases_of(cfg), cfg.shift))
            print(module_of(cfg).plan_text(cfg, phases_of(cfg), torch.device(device)))

    parallel.silence_other_ranks()
    return common.exit_status("train.py", work, "try a smaller --batch or --eval-samples")


if __name__ == "__main__":
    sys.exit(main())
