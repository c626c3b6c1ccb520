"""Phased DMD: distil a teacher into a few-step student, phase by phase.

    python train.py                                    the toy: a ring of 8 modes, a minute on a CPU
    python train.py --phases 1 --out out/dmd2          the same steps as one phase, which is DMD2
    python train.py --points FILE.csv                  your own points as the data
    python train.py --resume                           go on with what is in the output folder
"""

import argparse
import difflib
import hashlib
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Callable, Iterator

import torch
from torch import Tensor
from tqdm import tqdm

import losses
import moe
import phases as ph
from models.weights import UserError, cannot_write, read_json, read_tensors, write, write_json, write_tensors
from sample import normal, rollout, stream
from sde import diffuse
from toy import toy2d


def setting(default, help: str, choices=None, low=None, above=None, high=None):
    """A field of Config, with all that the command line needs to know of it."""
    return field(default=default, metadata=dict(help=help, choices=choices, low=low, above=above, high=high))


ON_OFF = ("on", "off")


@dataclass(frozen=True)
class Config:
    """The settings of a run: one flag each. Defaults are the paper's where it gives them."""

    teacher: str = setting("toy2d", "preset")
    toy: str = setting("ring", "distribution of toy2d", choices=tuple(toy2d.TOYS))
    points: str = setting("", "csv or npy file, n x d with n <= 2000: your own data in place of --toy")
    bandwidth: float = setting(0.0, "sd of a component of --points, in deviations of the data; 0: automatic", low=0)
    classes: str = setting("off", "condition on the class", choices=ON_OFF)
    guidance: float = setting(1.0, "classifier-free guidance scale of the teacher, with --classes on", low=0)
    phases: int = setting(2, "K, must divide --steps; 1 is DMD2", low=1)
    steps: int = setting(4, "N, network evaluations of a sample", low=1, high=1000)
    shift: float = setting(5.0, "S of the times, t = S u / (1 + (S - 1) u)", above=0)
    interval: str = setting("nested", "re-noise in (s, 1), or in the phase's own (s, start)", choices=("nested", "disjoint"))
    fix_t: float = setting(0.0, "re-noise at this t alone (Fig. 11); 0: over the interval", low=0, high=1)
    target: str = setting("unbiased", "of the fake: Eq. 11, or the naive one of Fig. 2(c)", choices=("unbiased", "biased"))
    truncate: str = setting("on", "record one step (SGTS), or every step of the phase", choices=ON_OFF)
    depths: str = setting("drawn", "truncation depth: all in each batch, or one drawn for it (the paper)", choices=("mixed", "drawn"))
    weight: str = setting("paper", "of the generator's gradient; paper is Eq. 10", choices=("paper", "xs", "x0", "normalised", "one"))
    boundary: str = setting("clip", "a high-noise phase's draws below the teacher's boundary", choices=("clip", "inside"))
    iters: int = setting(400, "generator updates a phase", low=1)
    fake_updates: int = setting(5, "fake updates for each generator update", low=1)
    fake_per_depth: bool = setting(False, "a fake for every truncation depth (ours, not the paper's)")
    reuse_rollouts: bool = setting(False, "the fake updates of an iteration share one rollout")
    warmup: int = setting(0, "fake updates before a phase's first generator update", low=0)
    batch: int = setting(64, "samples of an update", low=1)
    micro_batch: int = setting(0, "samples of one pass; 0: the whole batch", low=0)
    lr: float = setting(5e-5, "of the generator (AdamW)", above=0)
    fake_lr: float = setting(4e-7, "of the fake (AdamW)", above=0)
    lr_decay: float = setting(0.0, "part of a phase, at its end, in which both rates fall to 0", low=0, high=1)
    seed: int = setting(0, "of all that is drawn", low=0)
    save_every: int = setting(200, "iterations between two states for --resume", low=1)
    max_skips: int = setting(20, "non-finite updates in a row to skip before stopping", low=0)
    eval_samples: int = setting(10_000, "samples behind each number of metrics.json", low=2)


MARGIN = 0.02  # kept from both ends of a re-noising interval, in u; the paper gives none


@dataclass(frozen=True)
class Preset:
    """A teacher: what Config starts from, and the functions that know what its samples are."""

    settings: dict
    boundary_t: float | None  # where the teacher's low-noise expert begins, if it has two
    network: Callable  # network(cfg) -> the network that student and fake are
    teacher: Callable  # teacher(cfg, device) -> v_real = teacher(x_t, t, c), guidance included
    start: Callable  # start(cfg, bar) -> tensors that student and fake start from
    data: Callable  # data(cfg) -> batch(n, *where) -> (c, c_null, shape of a sample)
    evaluate: Callable  # evaluate(cfg, student, phases, device) -> numbers
    picture: Callable  # picture(cfg, student, phases, device) -> png
    present: Callable  # present(cfg, phases, xs, keep_all) -> numbers, {file name: bytes}
    device: str = "auto"  # that --device auto means
    threads: int = 0  # of the CPU; 0 leaves torch's own choice


TOY_SETTINGS = dict(  # what a mixture in the plane needs in place of the paper's settings
    shift=1.0, weight="xs", depths="mixed", warmup=200, batch=256, lr=1e-3, fake_lr=2e-3, lr_decay=0.5, max_skips=0
)

PRESETS = {
    "toy2d": Preset(
        TOY_SETTINGS, None, toy2d.network, toy2d.teacher, toy2d.start, toy2d.data,
        toy2d.evaluate, toy2d.picture, toy2d.present, device="cpu", threads=1,
    ),  # one thread: at this size a second one only waits
}


def config(teacher: str = "toy2d", **given) -> Config:
    """The settings of a preset, changed where given."""
    return Config(**(PRESETS[teacher].settings | {"teacher": teacher} | given))


# -- the loop ------------------------------------------------------------------------------------


@dataclass
class Run:
    """A run between two iterations: all that changes is the roles' tensors and the counters."""

    cfg: Config
    phases: list[ph.Phase]
    roles: moe.Roles
    batch: Callable  # of the preset's data
    device: torch.device
    out: Path  # the run's folder
    k: int = 1  # phase
    i: int = 0  # next iteration of it; negative while the fake warms up
    optimizers: dict = field(default_factory=dict)
    skips: dict[str, int] = field(default_factory=dict)  # non-finite updates in a row, by role

    @property
    def phase(self) -> ph.Phase:
        return self.phases[self.k - 1]

    @property
    def roles_begun(self) -> list[str]:
        """Every trained role but the experts of later phases."""
        later = {moe.student_role(k) for k in range(self.k + 1, len(self.phases) + 1)}
        return [role for role in moe.run_roles(self.phases, self.cfg.fake_per_depth) if role not in later]

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
    run.optimizers = {role: AdamW(run.roles.parameters_of(role), lr) for role, lr in rates.items()}


class AdamW:
    """AdamW of the paper, betas (0, 0.999), no decay, eps 1e-8: without momentum the first moment is
    the gradient itself, so only the second is kept (as large as the parameters, once)."""

    def __init__(self, parameters: dict[str, torch.nn.Parameter], lr: float):
        self.parameters, self.lr, self.steps = parameters, lr, 0
        self.second = {name: torch.zeros_like(p) for name, p in parameters.items()}

    @torch.no_grad()
    def step(self, factor: float, beta: float = 0.999, eps: float = 1e-8) -> None:
        """Move every parameter by about lr * factor, against its gradient."""
        self.steps += 1
        unbias = math.sqrt(1 - beta**self.steps)
        for name, p in self.parameters.items():
            v = self.second[name].mul_(beta).addcmul_(p.grad, p.grad, value=1 - beta)
            p.addcdiv_(p.grad, v.sqrt().add_(eps * unbias), value=-self.lr * factor * unbias)


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
    rollouts = fake_rollouts(run, updates)
    fakes = [fake_update(run, update, rollouts) for update in range(updates)]
    row = {"phase": run.k, "iteration": run.i, "fake": fakes[-1]}
    return row if run.i < 0 else row | {"generator": generator_update(run, updates)}


def fake_rollouts(run: Run, updates: int) -> Iterator[tuple]:
    """The samples of every pass of an iteration's fake updates, without gradient."""
    own = 1 if run.cfg.reuse_rollouts else updates  # updates with a rollout of their own
    passes = [(update, m, n) for update in range(own) for m, n in micro_batches(run.cfg)]
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
    """One step of the fake on samples of the present generator, Eq. 13."""
    total = 0.0
    for m, n in micro_batches(run.cfg):
        loss = fake_loss(run, update, m, *next(rollouts)) * (n / run.cfg.batch)
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
        [(x_s, c, depth)] = simulate(run, [(update, m, n)])
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


def simulate(run: Run, passes: list[tuple]) -> list[tuple]:
    """For each pass (update, m, n): n samples x_{t_k} of the student, conditions, truncation depths."""
    zs, cs, depths = [], [], []
    for update, m, n in passes:
        where = run.cfg.seed, run.k, run.i, update
        c, _, shape = run.batch(n, *where, m)
        cs.append(moe.move(c, run.device))
        u = torch.rand((), generator=stream(*where, "depth")).item()  # without m: all processes agree
        zs.append(normal((n, *shape), *where, m, "z").to(run.device))
        depths.append(ph.truncation_depths(run.phase, n, u, run.cfg.depths == "mixed"))
    c, depth = moe.concatenate(cs), torch.cat(depths)
    x_s = rollout(run.student, run.times, run.phase, torch.cat(zs), c, depth, run.cfg.truncate == "on")
    return list(zip(x_s.split([n for *_, n in passes]), cs, depths))


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
    mine = [opt for role, opt in run.optimizers.items() if role.startswith(name)]
    mine = [opt for opt in mine if all(p.grad is not None for p in opt.parameters.values())]
    grads = [p.grad for opt in mine for p in opt.parameters.values()]
    norm = torch.nn.utils.get_total_norm(grads)
    row = {"loss": loss.item(), "grad_norm": norm.item()}  # waits for the device, once an update
    finite = all(map(math.isfinite, row.values()))
    run.skips[name] = 0 if finite else run.skips.get(name, 0) + 1
    if run.skips[name] > run.cfg.max_skips:
        raise UserError(
            f"phase {run.k}, iteration {run.i}: {name} is not finite ({row}); the last state is kept: "
            "continue with --resume, or start over with a lower rate or --max-skips"
        )
    for optimizer in mine:
        if finite:
            optimizer.step(rate(run.cfg, run.i))
        for p in optimizer.parameters.values():
            p.grad = None
    return row


def rate(cfg: Config, i: int) -> float:
    """Factor of both learning rates: 1, then linear to 0 over the last lr_decay of a phase."""
    return min(1.0, (cfg.iters - i) / max(1.0, cfg.iters * cfg.lr_decay))


def fake_lag(run: Run, updates: int = 20) -> tuple[float, float]:
    """The fake's loss on fresh samples now, and after 20 more updates of a copy: how well A1 holds.

    The same draws for both, so that their noise cancels. The run is as it was before.
    """
    tensors = {name: tensor.clone() for name, tensor in tensors_of(run).items()}
    counters, end = counters_of(run), run.i

    def loss() -> float:
        run.i = end
        with torch.no_grad():
            passes = [(f"lag{j}", 0, run.cfg.batch) for j in range(16)]
            samples = zip(passes, simulate(run, passes))
            return sum(fake_loss(run, update, m, *sample).item() for (update, m, _), sample in samples) / 16

    now = loss()
    for update in range(updates):
        run.i = run.cfg.iters // 2  # for its rate: at the end of a phase that is 0
        with torch.no_grad():
            rollouts = simulate(run, [(f"lag more {update}", m, n) for m, n in micro_batches(run.cfg)])
        fake_update(run, f"lag more {update}", iter(rollouts))
    later = loss()
    restore(run, tensors, counters)
    return now, later


# -- state ---------------------------------------------------------------------------------------


def tensors_of(run: Run) -> dict[str, Tensor]:
    """Everything trained so far, by role: parameters, and second moments of the phase's optimizers."""
    tensors = {f"{role}/{name}": p for role in run.roles_begun for name, p in run.roles.parameters_of(role).items()}
    moments = {f"{role}.second/{name}": v for role, opt in run.optimizers.items() for name, v in opt.second.items()}
    return {name: tensor.detach() for name, tensor in (tensors | moments).items()}


def counters_of(run: Run) -> dict:
    """The rest of the state: with the draws a function of these, nothing else is needed."""
    steps = {role: opt.steps for role, opt in run.optimizers.items()}
    return {"phase": run.k, "iteration": run.i, "steps": steps, "skips": dict(run.skips)}


def restore(run: Run, tensors: dict[str, Tensor], counters: dict) -> None:
    """Put the run where tensors_of and counters_of were taken. Raises UserError if they do not fit."""
    begin_phase(run, counters["phase"])
    run.i, run.skips = counters["iteration"], dict(counters["skips"])
    for role, steps in counters["steps"].items():
        run.optimizers[role].steps = steps
    for name, tensor in tensors_of(run).items():
        if name not in tensors or tensors[name].shape != tensor.shape:
            raise UserError(f"the state of {run.out} does not hold {name}; start over with --overwrite")
        tensor.copy_(tensors[name])


def save_state(run: Run, log_bytes: int, seconds: float) -> None:
    """One file, replaced at once: the state of before or of now, never half of each."""
    about = counters_of(run) | {"log_bytes": log_bytes, "seconds": seconds, "settings": asdict(run.cfg)}
    write_tensors(run.out / "state" / "state.safetensors", tensors_of(run), about)


def load_state(run: Run) -> tuple[int, float]:
    """Go on from the folder's state, or from the first phase. Returns log_bytes, seconds."""
    path, advice = run.out / "state" / "state.safetensors", "start over with --overwrite"
    if not path.exists():
        return 0, 0.0
    tensors, about = read_tensors(path, advice)
    if about.get("settings") != asdict(run.cfg):
        raise UserError(f"{path} is the state of another run; {advice}")
    restore(run, tensors, about)
    return about["log_bytes"], about["seconds"]


# -- the folder of a run -------------------------------------------------------------------------

OURS = {"config.json", "log.jsonl", "metrics.json", "samples.png", "start.safetensors", "student.safetensors", "state"}


def contents(out: Path) -> set[str]:
    """What a folder holds, but for temporary files that a crash left."""
    try:
        return {path.name for path in out.iterdir() if path.suffix != ".tmp"}
    except FileNotFoundError:
        return set()
    except OSError as error:
        raise UserError(f"--out {out}: {error.strerror}; choose another --out") from error


def settle(args, cfg: Config) -> tuple[Config, bool]:
    """The settings to run with, and whether that run is finished already. Raises UserError."""
    held = contents(args.out)
    if args.overwrite and held & OURS:
        clear(args.out)
        return cfg, False
    if "config.json" not in held:
        if held:
            raise UserError(f"{args.out} holds other things ({', '.join(sorted(held)[:3])}); choose another --out")
        return cfg, False
    config = read_json(args.out / "config.json", "start over with --overwrite")
    theirs = config_of(config, args.out)
    if args.resume:
        for name, value in args.given.items():
            if getattr(theirs, name) != value:
                flag = name.replace("_", "-")
                raise UserError(
                    f"{args.out} runs with --{flag} {getattr(theirs, name)}, not {value}: --resume keeps its settings; "
                    "drop the flag, or choose another --out"
                )
        cfg = theirs
    elif cfg != theirs or "metrics.json" not in held:
        state = "a run with other settings" if cfg != theirs else "an unfinished run"
        raise UserError(f"{args.out} holds {state}; continue it with --resume, replace it with --overwrite, or choose another --out")
    compare(config["environment"], environment(args.device))
    check_files(config["files"])
    return cfg, "metrics.json" in held


def clear(out: Path) -> None:
    """Remove a run, config.json first: what a crash leaves then is no run. Nothing else is touched."""
    for path in [out / "config.json", *(out / name for name in OURS), out / "state" / "state.safetensors"]:
        if path.is_file():
            path.unlink()
    if (out / "state").is_dir() and not any((out / "state").iterdir()):
        (out / "state").rmdir()


def config_of(config: dict, out: Path) -> Config:
    """The Config in a config.json. Raises UserError if it is not one of this version."""
    try:
        return Config(**config["settings"])
    except (TypeError, KeyError):
        raise UserError(f"{out}/config.json is not of this version; start over with --overwrite") from None


def environment(device: str) -> dict:
    """What besides the settings can change a number."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    except OSError:
        commit = ""
    python = sys.version.split()[0]
    return {"torch": torch.__version__, "python": python, "threads": torch.get_num_threads(), "device": device, "commit": commit or "unknown"}


def compare(then: dict, now: dict) -> None:
    """Say which parts of the environment differ: the numbers then may, too."""
    for name in now:
        if then.get(name) != now[name]:
            print(f"note: the run began with {name} {then.get(name)}, this is {now[name]}; numbers may differ")


def hashes(cfg: Config) -> dict[str, str]:
    """sha256 of each file that the run reads."""
    names = [name for name in (cfg.points,) if name]
    return {name: hashlib.sha256(Path(name).read_bytes()).hexdigest() for name in names}


def check_files(files: dict[str, str]) -> None:
    """Raise UserError where a file that the run was made from has changed."""
    for name, digest in files.items():
        if not Path(name).is_file() or hashlib.sha256(Path(name).read_bytes()).hexdigest() != digest:
            raise UserError(f"{name} is gone or has changed since the run began; bring it back, or use --overwrite")


# -- the command ---------------------------------------------------------------------------------


class Interrupted(Exception):
    """SIGTERM or Ctrl-C: the run was left between two iterations."""


class Stop:
    """Turns signals into a flag that is read where stopping is safe; a second one stops at once."""

    def __init__(self):
        self.signal = 0
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.receive)

    def receive(self, number, _):
        self.signal = number
        signal.signal(number, signal.SIG_DFL)

    def check(self):
        if self.signal:
            raise Interrupted


class Log:
    """log.jsonl, one object a line, cut back to where the state was taken."""

    def __init__(self, path: Path, size: int):
        self.path = path
        with self.errors():
            self.file = open(path, "ab")
            self.file.truncate(size)
            self.file.seek(size)

    @contextmanager
    def errors(self):
        try:
            yield
        except OSError as error:
            raise cannot_write(self.path, error) from error

    def write(self, row: dict) -> None:
        with self.errors():
            self.file.write((json.dumps(row) + "\n").encode())
            self.file.flush()

    def sync(self) -> int:
        """On the disk; returns the size."""
        with self.errors():
            os.fsync(self.file.fileno())
        return self.file.tell()


def prepare(args, cfg: Config, stop: Stop) -> Run:
    """A run as its folder has it, or a new one: networks, starting tensors, state."""
    preset, out = PRESETS[cfg.teacher], args.out
    if "config.json" not in contents(out):
        config = {"settings": asdict(cfg), "environment": environment(args.device), "files": hashes(cfg)}
        write_json(out / "config.json", config)
    path = out / "start.safetensors"
    if not path.exists():
        start = preset.start(cfg, lambda steps: watch(steps, "start: fitting the teacher's velocity", stop))
        write_tensors(path, start, {"teacher": cfg.teacher})
    start, _ = read_tensors(path, "delete it, and run again with --resume")
    return new_run(cfg, start, torch.device(args.device), out)


def new_run(cfg: Config, start: dict[str, Tensor], device: torch.device, out: Path) -> Run:
    """A run before its first iteration, all roles at `start`."""
    preset, phases = PRESETS[cfg.teacher], phases_of(cfg)
    names = moe.run_roles(phases, cfg.fake_per_depth)
    make = lambda: preset.network(cfg).to(device)
    roles = moe.separate_networks(names, make, start, preset.teacher(cfg, device))
    run = Run(cfg, phases, roles, preset.data(cfg), device, out)
    begin_phase(run, 1)
    return run


def watch(steps, text: str, stop: Stop):
    """A progress bar over steps that also hears signals."""
    for item in tqdm(steps, text, disable=None):
        stop.check()
        yield item


def phases_of(cfg: Config) -> list[ph.Phase]:
    """The phases of the settings; raises UserError where they make none."""
    try:
        return ph.make_phases(
            cfg.steps, cfg.phases, cfg.shift, cfg.interval, MARGIN, PRESETS[cfg.teacher].boundary_t, cfg.boundary, cfg.fix_t
        )
    except ValueError as error:
        raise UserError(str(error)) from None


def drive(run: Run, began: float, stop: Stop) -> float:
    """Train to the end with bars, log and states. Returns when it would have begun without a break."""
    size, before = load_state(run)
    began -= before
    log, bar = Log(run.out / "log.jsonl", size), None
    for row in train(run):
        if bar is None or row["iteration"] == -run.cfg.warmup:
            bar = new_bar(run)
        log.write(row | {"seconds": round(time.time() - began, 3)})
        bar.update()
        bar.set_postfix(short(row), refresh=False)
        last = run.i == run.cfg.iters
        if last or stop.signal or run.i % run.cfg.save_every == 0:
            save_state(run, log.sync(), time.time() - began)
        if last:
            bar.close()
            report_lag(run)
        stop.check()
    return began


def new_bar(run: Run) -> tqdm:
    total = run.cfg.iters + run.cfg.warmup
    return tqdm(total=total, initial=run.i + run.cfg.warmup - 1, desc=f"phase {run.k} of {len(run.phases)}", disable=None)


def short(row: dict) -> dict:
    """What a bar has room for: loss of the fake, distance of the student from the teacher."""
    shown = {"loss": f"{row['fake']['loss']:.3f}"}
    return shown | ({"distance": f"{row['generator']['distance']:.3f}"} if "generator" in row else {})


def report_lag(run: Run) -> None:
    now, later = fake_lag(run)
    print(f"phase {run.k}: the fake's loss on fresh samples is {now:.4f}, after 20 more updates {later:.4f} "
          f"({100 * (later / now - 1):+.1f} %; A1 holds where this is near 0)")


def finish(run: Run, began: float) -> dict:
    """Student, picture and numbers; metrics.json comes last and says that the run is finished."""
    preset, settings = PRESETS[run.cfg.teacher], {"settings": asdict(run.cfg)}
    experts = [moe.student_role(phase.k) for phase in run.phases]
    tensors = {f"{role}/{name}": p for role in experts for name, p in run.roles.parameters_of(role).items()}
    write_tensors(run.out / "student.safetensors", tensors, settings)
    write(run.out / "samples.png", preset.picture(run.cfg, run.student, run.phases, run.device))
    trained = time.time()
    metrics = preset.evaluate(run.cfg, run.student, run.phases, run.device)
    metrics |= {"seconds": round(trained - began, 1), "seconds_metrics": round(time.time() - trained, 1)}
    write_json(run.out / "metrics.json", metrics)
    return metrics


def show(metrics: dict, out: Path) -> None:
    """The numbers, a line each, and where the rest is."""
    for name, value in metrics.items():
        values = value if isinstance(value, list) else [value]
        print(f"{name:28}" + " ".join(f"{v:10.4g}" for v in values))
    print(f"written to {out}")


def dry_run(cfg: Config) -> None:
    """What a run would be: the phases, and every role's parameters, on the meta device."""
    phases = phases_of(cfg)
    print(ph.table(phases, cfg.shift))
    with torch.device("meta"):
        network = PRESETS[cfg.teacher].network(cfg)
    count = sum(p.numel() for p in network.parameters())
    for role in moe.run_roles(phases, cfg.fake_per_depth):
        print(f"{role:16}{count:16,} parameters")


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line."""

    def error(self, message):
        raise UserError(f"{message}; see --help")


def parser() -> Parser:
    """A flag for every field of Config, and those that are about the command and not the run."""
    made = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    for f in fields(Config):
        flag, about, kind = "--" + f.name.replace("_", "-"), f.metadata, type(f.default)
        if kind is bool:
            made.add_argument(flag, action="store_true", default=None, help=about["help"])
            continue
        others = [f"{name}: {preset.settings[f.name]}" for name, preset in PRESETS.items() if f.name in preset.settings]
        help = f"{about['help']} ({'; '.join([f'default {f.default or 0 if kind is not str else f.default or None}', *others])})"
        made.add_argument(flag, type=kind, choices=about["choices"], help=help, metavar=None if about["choices"] else kind.__name__.upper())
    made.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"), help="auto: the fastest there is; toys: cpu")
    made.add_argument("--out", type=Path, help="the run's folder (default out/TEACHER)")
    made.add_argument("--resume", action="store_true", help="go on with what is in --out; starts if nothing is there")
    made.add_argument("--overwrite", action="store_true", help="replace the run in --out")
    made.add_argument("--dry-run", action="store_true", help="print phases and parameter counts, write nothing")
    return made


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, Config]:
    """Command line -> options (with the settings that were given) and the checked Config."""
    args = parser().parse_args(argv)
    names = [f.name for f in fields(Config)]
    args.given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if args.given.get("points"):
        args.given["points"] = str(Path(args.given["points"]).resolve())  # a run may go on elsewhere
    name = args.given.get("teacher", Config.teacher)
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, cutoff=0) or list(PRESETS)
        raise UserError(f"unknown --teacher {name}; nearest: {', '.join(near)}")
    cfg = config(**args.given | {"teacher": name})
    check(cfg)
    args.out = args.out or Path("out") / name
    args.device = pick_device(args.device, PRESETS[name].device)
    return args, cfg


def check(cfg: Config) -> None:
    """Raise UserError for settings that make no sense."""
    for f in fields(cfg):
        value, about, flag = getattr(cfg, f.name), f.metadata, "--" + f.name.replace("_", "-")
        if isinstance(value, (int, float)) and not math.isfinite(value):
            raise UserError(f"{flag} {value} is not a finite number")
        if about["low"] is not None and value < about["low"]:
            raise UserError(f"{flag} {value} is below {about['low']}")
        if about["above"] is not None and value <= about["above"]:
            raise UserError(f"{flag} {value} must be above {about['above']}")
        if about["high"] is not None and value > about["high"]:
            raise UserError(f"{flag} {value} is above {about['high']}")
    if cfg.guidance != 1 and cfg.classes == "off":
        raise UserError("--guidance needs --classes on: without classes there is nothing to guide towards")
    if cfg.classes == "on" and cfg.points:
        raise UserError("--points have no classes; drop --classes on")
    phases_of(cfg)


def pick_device(asked: str, usual: str) -> str:
    """cuda, else mps, else cpu, unless the preset has a usual one or the user asks."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    asked = usual if asked == "auto" else asked
    if asked == "auto":
        return next(name for name, here in there.items() if here)
    if not there[asked]:
        raise UserError(f"--device {asked} is not available to this torch; use --device cpu")
    return asked


def main(argv: list[str] | None = None) -> int:
    """The command. Returns its exit status: 0, 2 for a user's error, 130 or 143 for a signal."""
    stop = Stop()
    try:
        args, cfg = parse(argv)
        if args.dry_run:
            dry_run(cfg)
            return 0
        cfg, finished = settle(args, cfg)
        if finished:
            show(read_json(args.out / "metrics.json", "start over with --overwrite"), args.out)
            return 0
        print(ph.table(phases_of(cfg), cfg.shift))
        began = time.time()
        torch.set_num_threads(PRESETS[cfg.teacher].threads or torch.get_num_threads())
        run = prepare(args, cfg, stop)
        show(finish(run, drive(run, began, stop)), args.out)
        return 0
    except UserError as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 2
    except Interrupted:
        print(f"stopped; continue with: python train.py --resume --out {shlex.quote(str(args.out))}")
        return 128 + stop.signal


if __name__ == "__main__":
    sys.exit(main())
