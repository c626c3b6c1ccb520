"""Phased DMD: distil a teacher into a few-step student, phase by phase.

python train.py                                a ring of 8 modes, a minute on a CPU
python train.py --phases 1 --out out/dmd2      the same steps in one phase: DMD2
python train.py --points FILE.csv              your own points as the data
python train.py --teacher wan22-tiny           the loop of wan22 on small random networks
python train.py --teacher wan22 --dry-run      estimate memory and time; needs no weights, no GPU
python train.py --resume                       continue the run in the output folder
"""

import argparse
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

import moe
from config import Config
from losses import dmd_gradient, dmd_loss, naive_matching, subinterval_matching
from models import advice, cli, common, media, parallel, runs
from models.adamw import AdamW, note_if_slow
from models.common import UserError, stream, uniform
from models.runs import START_OVER
from phases import (
    Interval,
    Phase,
    format_phases,
    pick_interval,
    renoise_times,
    rollout,
    split_batch,
    step_times,
)
from presets import PRESETS, make_config, phases_of, preset_of, validate
from sde import diffuse

MAX_SKIPS = 20  # non-finite updates in a row that a run survives
SAVE_SECONDS = 1800  # at most, between two checkpoints


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
    watch: Callable = runs.watch_update  # progress inside an iteration

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

    def key(self, update: int) -> tuple:
        """The key of an update's random numbers, equal on all ranks."""
        return self.cfg.seed, self.k, self.i, update


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
    teacher without guidance, near to what the new expert makes (toys: a network fitted to it).
    """
    run.k = k
    run.i = -run.cfg.warmup
    run.optimizers = {}  # frees old moments before new ones
    student = run.roles.student[k]
    fakes = [run.roles.fakes[key] for key in moe.fake_keys(run.phase, run.cfg.fake_per_depth)]
    for role in (student, *fakes):
        role.start()
        lr = run.cfg.lr if role is student else run.cfg.fake_lr
        run.optimizers[role.name] = AdamW(role.parameters, lr)


def run_iteration(run: Run) -> list[dict]:
    """Update the fake several times, then the student once.

    The student's gradient is right only where the fake has converged on the student's present
    samples (assumption A1). So the fake goes first and takes several updates (the paper: 5).
    """
    updates = run.cfg.fake_updates if run.i >= 0 else 1
    shared = list(simulate(run, 0)) if run.cfg.reuse_rollouts else None
    rows = [update_fake(run, n, shared or simulate(run, n)) for n in range(updates)]
    return rows if run.i < 0 else [*rows, update_student(run, updates)]


def simulate(run: Run, update: int) -> Iterator[tuple]:
    """Yield micro-batches with the student's samples x_s at the end of the phase (Eq. 9)."""
    for batch in micro_batches(run, update, truncate=run.cfg.fake_rollout != "complete"):
        with torch.no_grad():
            x_s = rollout(run.nets, run.times, run.phase, batch.z, batch.c, batch.depth)
        yield x_s, batch


def update_fake(run: Run, update: int, samples: Iterable[tuple]) -> dict:
    """One step of score matching on the student's samples: Eq. 8, in the form of Eq. 13.

    v_real - v_fake is a difference of scores only if teacher and fake are the same function of
    their scores (assumption A2). The target of Eq. 11 ensures this; the naive one does not.
    """
    s = run.phase.s
    interval = choose_interval(run, update)
    total = 0.0
    matching = subinterval_matching if run.cfg.target == "unbiased" else naive_matching
    for x_s, batch in samples:  # the student's, without gradient
        t, eps = renoise(run, interval, x_s, batch.rng)
        x_t = diffuse(x_s, s, t, eps)  # (n, ...)
        v_fake = fake_of(run, interval, batch)(x_t, t, batch.c)
        loss = matching(v_fake, x_s, s, t, eps).mean() * batch.share  # Eq. 13
        loss.backward()
        total += loss.detach()
    loss = parallel.all_reduce_sum(total)
    return step_optimizers(run, f"fake{interval.branch}", {"loss": loss})


def update_student(run: Run, update: int) -> dict:
    """One step of the expert down the reverse KL at random times t: Eq. 10; at s = 0 Eq. 7."""
    s = run.phase.s
    interval = choose_interval(run, update)
    total = 0.0
    checkpointing = run.cfg.checkpointing
    for batch in micro_batches(run, update):
        x_s = rollout(run.nets, run.times, run.phase, batch.z, batch.c, batch.depth, checkpointing)
        with torch.no_grad():  # the gradient is a constant: no graph of teacher or fake
            t, eps = renoise(run, interval, x_s, batch.rng)
            x_t = diffuse(x_s, s, t, eps)
            v_real = run.roles.teacher[interval.branch](x_t, t, batch.c)  # CFG included
            v_fake = fake_of(run, interval, batch)(x_t, t, batch.c)
            gradient = dmd_gradient(x_s, x_t, s, t, v_real, v_fake, run.cfg.kl_weight)
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


def micro_batches(run: Run, update: int, truncate: bool = True) -> Iterator[MicroBatch]:
    """The micro-batches of an update that this rank computes; truncate: with a truncation depth.

    Each has a random stream of its own, so numbers do not depend on how many ranks there are. What
    all ranks must agree on (shape, depth, branch) comes from streams whose key has no m.
    """
    cfg = run.cfg
    r = uniform((), *run.key(update), "depth").item()
    depths = run.phase.num_steps if truncate and cfg.truncate else 0
    sizes = split_batch(cfg.batch, cfg.micro_batch, depths, cfg.depths == "mixed", r)
    own = parallel.my_share(list(enumerate(sizes)))
    for m, (n, depth) in run.watch(own, update, cfg.fake_updates + 1 if run.i >= 0 else 1):
        rng = stream(*run.key(update), m)
        c, shape = run.data(n, stream(*run.key(update), "data"), rng)
        z = moe.to_device(torch.randn(n, *shape, generator=rng), run.device)
        yield MicroBatch(z, moe.cond_to(c, run.device), depth, rng, n / cfg.batch)


def renoise(run: Run, interval: Interval, x_s: Tensor, rng: torch.Generator) -> tuple:
    """Random times t (n,) in the interval and noise eps (n, ...)."""
    t = renoise_times(interval, torch.rand(len(x_s), generator=rng), run.cfg.shift)
    eps = torch.randn(x_s.shape, generator=rng)
    return moe.to_device(t, x_s.device), moe.to_device(eps, x_s.device)


def choose_interval(run: Run, update: int) -> Interval:
    """The part of the phase's interval, and so the teacher's branch, that an update uses."""
    return pick_interval(run.phase, uniform((), *run.key(update), "interval").item())


def fake_of(run: Run, interval: Interval, batch: MicroBatch) -> moe.Role:
    """The fake beside the interval's branch, for the truncation depth of the batch."""
    return run.roles.fakes[interval.branch, batch.depth if run.cfg.fake_per_depth else 0]


# -- optimizer and checkpoint --------------------------------------------------------------------


def step_optimizers(run: Run, name: str, values: dict[str, Tensor]) -> dict:
    """Step every role that has gradients, under one name in the log. Returns the log row.

    Nothing moves if one of `values`, or the norm of the gradients, is not finite.
    """
    has_grad = lambda o: any(p.grad is not None for p in o.parameters.values())
    optimizers = [o for o in run.optimizers.values() if has_grad(o)]  # all others were cleared
    grads = [p.grad for o in optimizers for p in o.parameters.values() if p.grad is not None]
    values = values | {"grad_norm": parallel.grad_norm(grads)}
    finite = torch.stack(list(values.values())).isfinite().all()  # a tensor
    for optimizer in optimizers:
        optimizer.step(lr_factor(run.cfg, run.i), finite)
    # AdamW.step has left the updates over the rate in p.grad
    values["update_rms"] = parallel.grad_norm(grads) / sum(g.numel() for g in grads) ** 0.5
    *numbers, is_finite = torch.stack([*values.values(), finite]).tolist()  # the only GPU sync
    run.skips[name] = 0 if is_finite else run.skips.get(name, 0) + 1
    if run.skips[name] > MAX_SKIPS:
        raise UserError(
            f"phase {run.k}, iteration {run.i}: {run.skips[name]} updates of {name} in a row were "
            "not finite; start over with --overwrite and a lower --lr or --fake-lr"
        )
    if is_finite and optimizers[0].steps <= 3:  # later, gradients may have shrunk
        note_if_slow(name, numbers[-1])
    for p in [p for o in optimizers for p in o.parameters.values()]:
        p.grad = None
    row = {"phase": run.k, "iteration": run.i, "role": name, "skipped": not is_finite}
    return common.finite(row | dict(zip(values, numbers, strict=True)))


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
    metadata = {"kind": "state", "settings": cli.to_json(run.cfg), "seconds": seconds} | counters
    name = f"phase{run.k}-{run.i:06}"
    parallel.write_state(run.out / "state", name, state_tensors(run), metadata)


def load_state(run: Run) -> tuple[int, float]:
    """Continue from the run's checkpoint, or begin phase 1. Returns log_bytes and seconds."""
    folder = run.out / "state"
    if not parallel.on_rank0((folder / "state.json").exists):
        begin_phase(run, 1)
        return 0, 0.0
    tensors, metadata = parallel.read_state(folder, cli.to_json(run.cfg), START_OVER)
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
    with common.reading(folder, START_OVER):
        for name, optimizer in run.optimizers.items():
            optimizer.steps = steps[name]
        for name, tensor in state_tensors(run).items():
            if tensors[name].shape != tensor.shape:
                raise ValueError(f"{name} has the shape {tuple(tensors[name].shape)}")
            parallel.copy_to_local(tensor, tensors[name])
    return log_bytes, seconds


def save_student(run: Run, path: Path) -> None:
    """Write the experts trained so far into one safetensors file."""
    tensors = {}
    for key, p in role_tensors(trained_experts(run)).items():
        tensor = parallel.full_tensor(p)  # one at a time on the GPU, and kept by rank 0 only
        if common.is_rank0():
            tensors[key] = tensor.cpu()
    metadata = {"kind": "student", "settings": cli.to_json(run.cfg), "phase": run.k}
    if common.is_rank0():
        common.write_tensors(path, tensors, metadata)


# -- a run from its first iteration to its last ----------------------------------------------------


def make_run(cfg: Config, device: torch.device, out: Path, roles: moe.Roles | None = None) -> Run:
    """A run before its first phase. Without roles, `prepare` must have been called for `out`."""
    phases = phases_of(cfg)
    preset = preset_of(cfg)
    roles = roles or preset.make_roles(cfg, phases, device, out)
    return Run(cfg, phases, roles, preset.make_data(cfg, out), device, out)


def run_training(run: Run, began: float, stop: runs.Stop) -> float:
    """Train with progress bar, log, previews and checkpoints. Returns the seconds it took."""
    cfg = run.cfg
    log_bytes, seconds = load_state(run)
    log = runs.Log(run.out / "log.jsonl", log_bytes)
    preset_of(cfg).throughput(cfg, run.phase, 1.0, run.device)  # measures the GPU's speed, once
    began -= seconds
    bar = None
    clock = saved = time.monotonic()
    if run.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(run.device)  # without the text encoder's
    for rows in train(run):
        if bar is None:
            text = f"phase {run.k} of {len(run.phases)}"
            done = run.i + cfg.warmup - 1
            bar = tqdm(total=cfg.iters + cfg.warmup, initial=done, desc=text, disable=None)
            phase_rows = []
        add_measurements(run, rows, time.monotonic() - clock)
        log.write([row | {"seconds": round(time.monotonic() - began, 3)} for row in rows])
        phase_rows += rows
        bar.set_postfix({"loss": rows[0]["loss"], "distance": rows[-1].get("distance")}, False)
        bar.update()
        signal = stop.received()
        late = parallel.max_over_ranks(time.monotonic() - saved > SAVE_SECONDS)
        if is_due(run, cfg.sample_every):
            save_preview(run, log)
        if signal or late or is_due(run, cfg.save_every):
            save_state(run, log.sync(), time.monotonic() - began)
            saved = time.monotonic()
        if signal:  # the one read above: for a later one there is no checkpoint yet
            raise common.Interrupted(signal, stop.advice)
        if run.i == cfg.iters:
            bar.close()
            print(f"{text}: {cfg.iters} iterations, {time.monotonic() - began:.0f} s so far")
            print(preset_of(cfg).phase_summary(cfg, run.phases, run.k, phase_rows), end="")
            bar = None
        clock = time.monotonic()  # previews and checkpoints belong to no iteration
    return time.monotonic() - began


def add_measurements(run: Run, rows: list[dict], seconds: float) -> None:
    """Add time, memory and speed of an iteration to the last of its log rows."""
    rows[-1] |= {"seconds_iteration": round(seconds, 4)} | runs.peak_memory(run.device)
    if run.i > 0:  # a warm-up iteration has fewer updates
        rows[-1] |= preset_of(run.cfg).throughput(run.cfg, run.phase, seconds, run.device)


def is_due(run: Run, every: int) -> bool:
    """Whether a task of every `every` iterations, and of the last one, is due."""
    return every > 0 and run.i > 0 and (run.i % every == 0 or run.i == run.cfg.iters)


def report(run: Run) -> tuple[dict, bytes]:
    """Metrics and a picture of the student so far, by the preset."""
    progress = run.k, run.device, run.out, run.finished
    return preset_of(run.cfg).report(run.cfg, run.phases, run.roles, *progress)


def save_preview(run: Run, log: runs.Log) -> None:
    """Write metrics, picture and curves, and of large teachers the student so far."""
    metrics, picture = report(run)
    log.write([{"phase": run.k, "iteration": run.i, "role": "preview"} | common.finite(metrics)])
    file = run.out / "previews" / f"phase{run.k}-{run.i:06}.png"
    common.write_file(file, picture)
    keep = preset_of(run.cfg).keep_students
    if keep:
        save_student(run, file.with_suffix(".safetensors"))
    if common.is_rank0():
        common.write_file(run.out / "curves.png", media.curves(run.out / "log.jsonl"))
        runs.remove_files(file.parent, runs.STUDENT_FILES, keep)


def save_results(run: Run, seconds: float, stop: runs.Stop) -> dict:
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
    parser = cli.Parser(__doc__)
    presets = {name: settings for name, (_, settings) in PRESETS.items()}
    cli.add_run_flags(cli.add_flags(parser, Config, presets, teacher))
    args = parser.parse_args(argv)
    args.argv = sys.argv[1:] if argv is None else argv
    args.explicit = explicit = cli.explicit_flags(args, Config)
    for name in set(runs.MOVABLE) & set(explicit):
        explicit[name] = cli.absolute_paths(explicit[name])  # a run may be resumed elsewhere
    args.out = args.out or Path("out") / teacher
    if args.resume and args.overwrite:
        raise UserError("--resume keeps a run and --overwrite removes it: give one of them")
    if args.processes and not args.dry_run:
        raise UserError("--processes belongs to --dry-run; torchrun starts the ranks of a run")
    return args, make_config(**explicit)


def resolve(args: argparse.Namespace, cfg: Config, device: str) -> tuple[Config, bool]:
    """The settings to run with, and whether that run is finished. Writes or checks config.json."""
    preset = preset_of(cfg)
    if not args.resume:
        files = preset.input_files(cfg)  # an error shows before an old run is removed
        own = [file for file in files if args.out.resolve() in file.resolve().parents]
        if own and args.overwrite:
            raise UserError(f"--overwrite: this run reads {own[0]} in --out; move it first")
    resume_flags = args.explicit, args.resume, args.overwrite
    cfg, finished = runs.resolve_run(args.out, cfg, *resume_flags)
    validate(cfg, parallel.topology)
    ranks = parallel.topology.processes, parallel.topology.context_parallel
    environment = {} if finished else runs.environment(device, *ranks)
    runs.record_run(args.out, cfg, environment, preset.input_files(cfg), args.overwrite)
    return cfg, finished


def run_command(args: argparse.Namespace, cfg: Config, device: str) -> None:
    """Train, or continue, or print the metrics of a finished run."""
    cfg, finished = parallel.on_rank0(lambda: resolve(args, cfg, device))
    if finished:
        print("This run is already finished. Use --overwrite to train it again.")
        file = args.out / "metrics.json"
        with common.reading(file, START_OVER):
            return runs.print_metrics(common.read_json(file, START_OVER), args.out)
    preset = preset_of(cfg)
    device = torch.device(device)
    began = time.monotonic()
    torch.set_num_threads(preset.threads or torch.get_num_threads())
    print(format_phases(phases_of(cfg), cfg.shift))
    command = parallel.launch_command(parallel.topology, "train.py")
    command += f" --resume --out {shlex.quote(str(args.out))}"
    with runs.Stop(f"continue with: {command}", parallel.max_over_ranks) as stop:
        progress = partial(runs.with_progress, stop=stop)
        parallel.on_rank0(lambda: preset.prepare(cfg, args.out, device, progress))
        stop.check()
        run = make_run(cfg, device, args.out)
        seconds = run_training(run, began, stop)
        runs.print_metrics(save_results(run, seconds, stop), args.out)


def main(argv: list[str] | None = None) -> int:
    """The command. Returns its exit status: 0, 2 for a user's error, 130 or 143 for a signal."""

    def work() -> None:
        parallel.silence_other_ranks()
        args, cfg = parse(argv)
        file = args.out / "config.json"
        if args.resume and file.exists():  # the command need not name the teacher
            cfg = runs.config_from_json(common.read_json(file, START_OVER), args.out)
        device = cli.pick_device(args.device, preset_of(cfg).device)
        topology = parallel.make_topology(args.processes, args.context_parallel)
        if args.dry_run:
            validate(cfg, topology)
            print(format_phases(phases_of(cfg), cfg.shift))
            print(preset_of(cfg).plan_text(cfg, phases_of(cfg), torch.device(device), topology))
            return
        ranks = parallel.distributed(device, args.context_parallel, "train.py")
        with ranks, runs.own_folder(args.out):
            validate(cfg, topology)
            request = advice.Request(args.argv, cfg, phases_of(cfg), args.resume)
            finished = (args.out / "metrics.json").exists() and not args.overwrite
            with advice.watch_memory(request, device, not (args.ignore_plan or finished)):
                run_command(args, cfg, device)

    return cli.exit_status("train.py", work, "try a smaller --batch or --eval-samples")


if __name__ == "__main__":
    sys.exit(main())
