"""Phased DMD: distil a teacher into a few-step student, phase by phase.

python train.py                                    the toy: a ring of 8 modes, 40 s on a CPU
python train.py --phases 1 --out out/one-phase     the same steps as one phase, DMD2
python train.py --points FILE.csv                  your own points as the data
python train.py --resume                           go on with what is in the output folder
"""

import argparse
import difflib
import math
import shlex
import sys
import time
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Callable, Iterator

import torch
from torch import Tensor
from tqdm import tqdm

import losses
import moe
import phases as ph
from models.adamw import AdamW
from models.flags import Parser, add_flags, check, given, pick_device, setting
from models.folder import (
    Interrupted,
    Log,
    Stop,
    contents,
    environment,
    hashes,
    settle,
    watch,
)
from models.files import UserError, read_json, read_tensors, write, write_json, write_tensors
from sample import normal, rollout, uniform
from sde import diffuse
from toy import toy2d


ON_OFF = ("on", "off")


# fmt: off
@dataclass(frozen=True)
class Config:
    """The settings of a run: one flag each. Defaults are the paper's where it gives them."""

    teacher: str = setting("toy2d", "preset")
    toy: str = setting("ring", "distribution of toy2d", choices=tuple(toy2d.TOYS))
    points: str = setting("", "csv or npy, n x d, n <= 2000: your own data in place of --toy")
    bandwidth: float = setting(0.0, "sd around each point, in sd of the data; 0: automatic",
                               low=0, high=10)
    classes: str = setting("off", "condition on the class", choices=ON_OFF)
    guidance: float = setting(1.0, "guidance scale of the teacher, with --classes on",
                              low=0, high=100)

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
    lr: float = setting(5e-5, "of the generator (AdamW)", above=0, high=1)
    fake_lr: float = setting(4e-7, "of the fake (AdamW)", above=0, high=1)
    lr_decay: float = setting(0.0, "last part of a phase, in which rates fall to 0", low=0, high=1)

    seed: int = setting(0, "of all that is drawn", low=0, high=2**63)
    save_every: int = setting(200, "iterations between two states for --resume", low=1, high=10**9)
    max_skips: int = setting(20, "non-finite updates in a row to skip before stopping",
                             low=0, high=10**9)
    eval_samples: int = setting(10_000, "samples behind each number of metrics.json",
                                low=2, high=10**6)
# fmt: on


@dataclass(frozen=True)
class Preset:
    """A teacher: what Config starts from, and the functions that know what its samples are."""

    settings: dict
    boundary_t: float | None  # where the teacher's low-noise expert begins, if it has two
    network: Callable  # network(cfg) -> the network that student and fake are
    teacher: Callable  # teacher(cfg, device) -> v_real = teacher(x_t, t, c), guidance included
    start: Callable  # start(cfg, bar) -> tensors that student and fake start from
    data: Callable  # data(cfg) -> batch(n, *where) -> (c, c_null, shape); UserError if it has none
    evaluate: Callable  # evaluate(cfg, student, phases, device) -> numbers
    picture: Callable  # picture(cfg, student, phases, device) -> png
    present: Callable  # present(cfg, c, xs, keep_all) -> numbers, {file name: bytes}
    device: str = "auto"  # that --device auto means
    threads: int = 0  # of the CPU while training; 0 leaves torch's own choice


TOY_SETTINGS = dict(  # what a mixture in the plane needs in place of the paper's settings
    shift=1.0,
    weight="xs",
    depths="mixed",
    warmup=200,
    batch=256,
    lr=1e-3,
    fake_lr=2e-3,
    lr_decay=0.5,
    max_skips=0,
)

PRESETS = {
    "toy2d": Preset(
        TOY_SETTINGS,
        None,
        toy2d.network,
        toy2d.teacher,
        toy2d.start,
        toy2d.data,
        toy2d.evaluate,
        toy2d.picture,
        toy2d.present,
        device="cpu",
        threads=1,
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
    def trained(self) -> list[str]:
        """What a state has to hold: the student's experts so far, and the fakes of the phase."""
        experts = [moe.student_role(k) for k in range(1, self.k + 1)]
        return experts + moe.fake_roles(self.phase, self.cfg.fake_per_depth)

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
    """One step of the fake on samples of the present generator: Eq. 8, inside (s, 1) Eq. 13."""
    part, total = draw_part(run, update), 0.0
    for m, n in micro_batches(run.cfg):
        loss = fake_loss(run, part, update, m, *next(rollouts)) * (n / run.cfg.batch)
        loss.backward()
        total += loss.detach()
    return apply(run, moe.fake_role(part.expert), loss=total)


def fake_loss(run: Run, part: ph.Part, update, m: int, x_s: Tensor, c, depth: Tensor) -> Tensor:
    """Score matching of the fake inside (s, 1), at the times of the phase."""
    t, eps = renoise(run, part, update, m, x_s)
    v_fake = fake_of(run, part, depth)(diffuse(x_s, run.phase.s, t, eps), t, c)
    match = losses.subinterval_matching if run.cfg.target == "unbiased" else losses.biased_matching
    return match(v_fake, x_s, run.phase.s, t, eps)


def generator_update(run: Run, update: int) -> dict:
    """One step of the generator down the reverse KL at a random t, Eq. 10."""
    part, total, square = draw_part(run, update), 0.0, 0.0
    for m, n in micro_batches(run.cfg):
        [(x_s, c, depth)] = simulate(run, [(update, m, n)])
        with torch.no_grad():
            t, eps = renoise(run, part, update, m, x_s)
            x_t = diffuse(x_s, run.phase.s, t, eps)
            v_real = run.roles.velocity("teacher", x_t, t, c)
            v_fake = fake_of(run, part, depth)(x_t, t, c)
            gradient = losses.dmd_gradient(x_s, x_t, run.phase.s, t, v_real, v_fake, run.cfg.weight)
            square += losses.mean((v_real - v_fake) ** 2) * (n / run.cfg.batch)
        loss = losses.distribution_matching(x_s, gradient) * (n / run.cfg.batch)
        loss.backward()
        total += loss.detach()
    return apply(run, moe.student_role(run.k), loss=total, distance=square.sqrt())


def simulate(run: Run, passes: list[tuple]) -> list[tuple]:
    """For each pass (update, m, n): n samples x_{t_k}, their conditions and truncation depths."""
    zs, cs, depths = [], [], []
    for update, m, n in passes:
        where = run.cfg.seed, run.k, run.i, update
        c, _, shape = run.batch(n, *where, m)
        cs.append(moe.move(c, run.device))
        r = uniform((), *where, "depth").item()  # without m: all processes agree
        zs.append(normal((n, *shape), *where, m, "z").to(run.device))
        rows = range(m * run.cfg.micro_batch, m * run.cfg.micro_batch + n)
        mixed = run.cfg.depths == "mixed"
        depths.append(ph.truncation_depths(run.phase, rows, r, mixed, run.cfg.batch))
    c, depth = moe.concatenate(cs), torch.cat(depths)
    x_s = rollout(
        run.student, run.times, run.phase, torch.cat(zs), c, depth, run.cfg.truncate == "on"
    )
    return list(zip(x_s.split([n for *_, n in passes]), cs, depths))


def draw_part(run: Run, update) -> ph.Part:
    """The teacher's expert of an update; without m, so that all processes agree."""
    return ph.pick_part(run.phase, uniform((), run.cfg.seed, run.k, run.i, update, "expert").item())


def renoise(run: Run, part: ph.Part, update, m: int, x_s: Tensor) -> tuple[Tensor, Tensor]:
    """The times t (B,) and the noise eps (B, ...) of one pass."""
    where = run.cfg.seed, run.k, run.i, update, m
    t = ph.renoise_times(part, uniform(len(x_s), *where, "t"), run.cfg.shift)
    return t.to(x_s.device), normal(x_s.shape, *where, "eps").to(x_s.device)


def fake_of(run: Run, part: ph.Part, depth: Tensor) -> Callable:
    """The fake beside the teacher's expert; where there is one a depth, each row asks its own."""
    ask = run.roles.velocity
    if not run.cfg.fake_per_depth:
        return partial(ask, moe.fake_role(part.expert))
    roles = [moe.fake_role(part.expert, j) for j in range(1, run.phase.depths + 1)]
    return moe.by_depth([partial(ask, role) for role in roles], depth)


def micro_batches(cfg: Config) -> list[tuple[int, int]]:
    """(index, size) of the passes that make up one batch."""
    size = cfg.micro_batch or cfg.batch
    return [(m, min(size, cfg.batch - start)) for m, start in enumerate(range(0, cfg.batch, size))]


def apply(run: Run, name: str, **values: Tensor) -> dict:
    """Step the optimizers of a role that have gradients, unless something is not finite."""
    mine = [opt for role, opt in run.optimizers.items() if role.split(".")[0] == name]
    mine = [opt for opt in mine if all(p.grad is not None for p in opt.parameters.values())]
    grads = [p.grad for opt in mine for p in opt.parameters.values()]
    values["grad_norm"] = torch.nn.utils.get_total_norm(grads)
    numbers = torch.stack(list(values.values())).tolist()  # the one wait for the device
    finite = all(map(math.isfinite, numbers))
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
    return row | {key: x if math.isfinite(x) else None for key, x in zip(values, numbers)}


def rate(cfg: Config, i: int) -> float:
    """Factor of both learning rates: 1, then linear to 0 over the last lr_decay of a phase."""
    return min(1.0, (cfg.iters - i) / max(1.0, cfg.iters * cfg.lr_decay))


def fake_lag(run: Run, updates: int = 20, batches: int = 16) -> tuple[float, float]:
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
                fake_loss(run, draw_part(run, update), update, m, *sample)
                for (update, m, _), sample in zip(passes, simulate(run, passes))
            ]
        return torch.stack(found).mean().item()

    now = loss()
    for j in range(updates):
        with torch.no_grad():
            more = simulate(run, [(f"lag more {j}", m, n) for m, n in micro_batches(run.cfg)])
        fake_update(run, f"lag more {j}", iter(more))
    later = loss()
    restore(run, tensors, counters)
    return now, later


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
        tensor.copy_(tensors[name])


def save_state(run: Run, log_bytes: int, seconds: float) -> None:
    """One file, replaced at once: the state of before or of now, never half of each."""
    about = counters_of(run) | {
        "log_bytes": log_bytes,
        "seconds": seconds,
        "settings": asdict(run.cfg),
        "kind": "state",
    }
    write_tensors(run.out / "state" / "state.safetensors", tensors_of(run), about)


def load_state(run: Run) -> tuple[int, float]:
    """Go on from the folder's state, or from the first phase. Returns log_bytes, seconds."""
    path, advice = run.out / "state" / "state.safetensors", "start over with --overwrite"
    if not path.exists():
        return 0, 0.0
    tensors, about = read_tensors(path, "state", asdict(run.cfg), advice)
    restore(run, tensors, about)
    return about["log_bytes"], about["seconds"]


# -- the command ---------------------------------------------------------------------------------


def prepare(args, cfg: Config, stop: Stop) -> Run:
    """A run as its folder has it, or a new one: networks, starting tensors, state."""
    preset, out = PRESETS[cfg.teacher], args.out
    if args.overwrite or "config.json" not in contents(out):
        config = {
            "settings": asdict(cfg),
            "environment": environment(args.device),
            "files": hashes([cfg.points] if cfg.points else []),
        }
        write_json(out / "config.json", config)
    path = out / "start.safetensors"
    if not path.exists():
        start = preset.start(
            cfg, lambda steps: watch(steps, "start: fitting the teacher's velocity", stop)
        )
        write_tensors(path, start, {"settings": asdict(cfg), "kind": "start"})
    start, _ = read_tensors(path, "start", asdict(cfg), "delete it, and run again with --resume")
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


def phases_of(cfg: Config) -> list[ph.Phase]:
    """The phases of the settings; raises UserError where they make none."""
    try:
        return ph.make_phases(
            cfg.steps,
            cfg.phases,
            cfg.shift,
            cfg.interval,
            cfg.t_margin,
            PRESETS[cfg.teacher].boundary_t,
            cfg.boundary,
            cfg.fix_t,
        )
    except ValueError as error:
        raise UserError(str(error)) from None


def drive(run: Run, began: float, stop: Stop) -> float:
    """Train to the end with bars, log and states. Returns its begin, breaks left out."""
    size, before = load_state(run)
    began -= before
    log, bar = Log(run.out / "log.jsonl", size), None
    for rows in train(run):
        if bar is None or rows[0]["iteration"] == -run.cfg.warmup:
            bar = new_bar(run)
        seconds = time.time() - began
        log.write([row | {"seconds": round(seconds, 3)} for row in rows])
        bar.update()
        bar.set_postfix(short(rows), refresh=False)
        last, stopping = run.i == run.cfg.iters, stop.signal
        if last or stopping or run.i % run.cfg.save_every == 0:
            save_state(run, log.sync(), seconds)
        if stopping:
            raise Interrupted(stopping)
        if last:
            bar.close()
            report_lag(run)
    return began


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


def report_lag(run: Run) -> None:
    """Say how far the fake lags behind the generator."""
    now, later = fake_lag(run)
    print(
        f"phase {run.k}: the fake's loss on fresh samples is {now:.4f}, after 20 more updates "
        f"{later:.4f} ({100 * (later / now - 1):+.1f} %; a clear fall means that it lags)"
    )


def finish(run: Run, began: float, stop: Stop) -> dict:
    """Student, picture and numbers; metrics.json comes last and says that the run is finished."""
    preset, settings = PRESETS[run.cfg.teacher], {"settings": asdict(run.cfg), "kind": "student"}
    experts = [moe.student_role(phase.k) for phase in run.phases]
    tensors = {
        f"{role}/{name}": p for role in experts for name, p in run.roles.parameters_of(role).items()
    }
    write_tensors(run.out / "student.safetensors", tensors, settings)
    write(run.out / "samples.png", preset.picture(run.cfg, run.student, run.phases, run.device))
    stop.check()
    trained = time.time()
    metrics = preset.evaluate(run.cfg, run.student, run.phases, run.device)
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


def dry_run(cfg: Config) -> None:
    """What a run would be: the phases, and every role's parameters, on the meta device."""
    phases = phases_of(cfg)
    print(ph.table(phases, cfg.shift))
    with torch.device("meta"):
        network = PRESETS[cfg.teacher].network(cfg)
    count = sum(p.numel() for p in network.parameters())
    for role in moe.run_roles(phases, cfg.fake_per_depth):
        print(f"{role:16}{count:16,} parameters")


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
        "--dry-run", action="store_true", help="print phases and parameter counts, write nothing"
    )
    return made


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, Config]:
    """Command line -> options (with the settings that were given) and the checked Config."""
    args = parser().parse_args(argv)
    args.given = given(args, Config)
    if args.given.get("points"):
        # in full, since a run may go on from elsewhere
        args.given["points"] = str(Path(args.given["points"]).resolve())
    args.asked, args.out = args.device, args.out or Path("out") / args.given.get("teacher", "toy2d")
    if args.resume and args.overwrite:
        raise UserError("--resume keeps a run and --overwrite removes it; give one of them")
    cfg = Config(**args.given)
    check_teacher(cfg)
    args.device = pick_device(args.device, PRESETS[cfg.teacher].device)
    return args, config(**args.given)


def check_teacher(cfg: Config) -> None:
    """Raise UserError for a teacher that there is not."""
    if cfg.teacher not in PRESETS:
        near = difflib.get_close_matches(cfg.teacher, PRESETS, cutoff=0)
        raise UserError(f"unknown --teacher {cfg.teacher}; nearest: {', '.join(near)}")


def validate(cfg: Config) -> None:
    """Raise UserError for settings that cannot make a run."""
    check_teacher(cfg)
    check(cfg)
    phases_of(cfg)
    if cfg.fake_per_depth and cfg.truncate == "off":
        raise UserError("--fake-per-depth needs truncation: without it there are no depths")
    PRESETS[cfg.teacher].data(cfg)  # for what it raises: files that cannot be read, and the like


def main(argv: list[str] | None = None) -> int:
    """The command. Returns its exit status: 0, 2 for a user's error, 130 or 143 for a signal."""
    try:
        args, cfg = parse(argv)
        if not args.resume:
            validate(cfg)
        if args.dry_run:
            dry_run(cfg)
            return 0
        usual = torch.get_num_threads()
        torch.set_num_threads(PRESETS[cfg.teacher].threads or usual)
        cfg, finished = settle(args, cfg)
        validate(cfg)
        if finished:
            print("finished before; nothing was run. --overwrite trains again")
            show(read_json(args.out / "metrics.json", "start over with --overwrite"), args.out)
            return 0
        print(ph.table(phases_of(cfg), cfg.shift))
        began = time.time()
        with Stop() as stop:
            run = prepare(args, cfg, stop)
            began = drive(run, began, stop)
            torch.set_num_threads(usual)  # distances of many samples gain from every core
            show(finish(run, began, stop), args.out)
        return 0
    except UserError as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 2
    except Interrupted as interrupted:
        device = "" if args.asked == "auto" else f" --device {args.asked}"
        out = shlex.quote(str(args.out))
        print(f"stopped; continue with: python train.py --resume --out {out}{device}")
        return 128 + interrupted.number


if __name__ == "__main__":
    sys.exit(main())
