"""The preset toy2d: an exact mixture is the teacher, and every number has an exact reference."""

import io
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from models import parallel
from models.mlp import MLP
from models.files import UserError, read_tensors, write_tensors
from models.flags import plain
from moe import Roles, move, run_roles, separate_networks
from phases import step_times
from models.draws import integers, normal, stream, uniform
from sample import trajectory
from sde import diffuse
from toy.mixtures import TOYS, Mixture, energy, from_points, modes
from toy.plot import panel, plt, png, reach_of


def mixture(cfg) -> Mixture:
    """The distribution that cfg.toy or cfg.points names."""
    return from_points(cfg.points, cfg.bandwidth) if cfg.points else TOYS[cfg.toy]()


def network(cfg) -> MLP:
    """The network that fake and student are."""
    with torch.device("cpu"):  # the mixture is data, also where networks are built without any
        target = mixture(cfg)
    return MLP(target.means.shape[1], classes=target.classes if cfg.classes == "on" else 0)


def teacher(cfg, device="cpu"):
    """v_real = teacher(x_t, t, c): exact, guided where classes and a scale are given."""
    target = mixture(cfg).to(device)
    [scale] = cfg.guidance
    if scale == 1 or cfg.classes == "off":
        return target.velocity
    return lambda x_t, t, c=None: target.guided(x_t, t, c, scale)


def check(cfg) -> None:
    """Raise UserError for settings that do not go together."""
    if parallel.here.processes > 1:
        raise UserError("toy2d runs in one process: python train.py, without torchrun")
    if len(cfg.guidance) != 1:
        raise UserError("--guidance takes one number; toys have one expert")
    if cfg.guidance != (1.0,) and cfg.classes == "off":
        raise UserError("--guidance needs --classes on: without classes there is no direction")
    if cfg.classes == "on" and cfg.points:
        raise UserError("--points have no classes; drop --classes on")
    if cfg.bandwidth and not cfg.points:
        raise UserError("--bandwidth belongs to --points; the toys have a width of their own")
    for name in ("weights", "teacher_lora", "prompts", "images", "size"):
        if getattr(cfg, name):
            raise UserError(f"--{name.replace('_', '-')} is for large teachers, not for toy2d")
    if (cfg.generator, cfg.fake, cfg.offload, cfg.compile) != ("full", "full", "none", False):
        raise UserError("adapters, --offload and --compile are for large teachers, not for toy2d")


def files(cfg) -> list[Path]:
    """What a run reads: the user's points, if there are any. Raises UserError."""
    mixture(cfg)
    return [Path(cfg.points)] if cfg.points else []


def data(cfg, out=None):
    """batch(n, *where) -> conditions, shape of one sample."""
    target = mixture(cfg)

    def batch(n: int, *where):
        c = classes_of(target, n, *where) if cfg.classes == "on" else None
        return c, target.means.shape[1:]

    return batch


def roles(cfg, phases, device, out, start: dict[str, Tensor]) -> Roles:
    """A network each, and the exact teacher."""
    names = run_roles(phases, cfg.fake_per_depth)
    return separate_networks(names, lambda: network(cfg).to(device), start, teacher(cfg, device))


def sampler(cfg, experts, wear, device, out, offload):
    """velocity(role, x_t, t, c) of a finished student, or of the exact teacher."""
    exact, nets = teacher(cfg, device), {}
    for role in experts:
        if role.startswith("student"):
            nets[role] = network(cfg).to(device)
            nets[role].load_state_dict(dict(wear(role).own()))
    return lambda role, x_t, t, c=None: nets.get(role, exact)(x_t, t, c)


LARGE_ONLY = ("prompt", "prompts", "image", "size", "frames", "latents", "decode", "tiles")


def refuse(args, flags, teacher: str) -> None:
    """Raise UserError for flags of sample.py that mean nothing for this teacher."""
    given = [name for name in flags if getattr(args, name)]
    if given:
        raise UserError(f"--{given[0]} is for large teachers, not for {teacher}")


def settled(cfg, args):
    """The settings as they are: sample.py's other flags are for large teachers. UserError."""
    refuse(args, ("weights", "dtype", *LARGE_ONLY), "toy2d")
    if args.n < 2:
        raise UserError("--n is at least 2: the numbers are of distances between samples")
    return cfg


def ask(cfg, args, out, home, device):
    """Settings, conditions, shape, names (none) of the samples."""
    return cfg, *data(cfg)(args.n, args.seed, "sample", 0), []


def plan(cfg, phases, held, device, rate) -> str:
    """Every role's parameters, counted on the meta device."""
    with torch.device("meta"):
        count = sum(p.numel() for p in network(cfg).parameters())
    roles = run_roles(phases, cfg.fake_per_depth)
    return "\n".join(f"{role:16}{count:16,} parameters" for role in roles)


def closing(run, fake_lag) -> str:
    """How far the fake lags behind the generator, at the end of a phase."""
    now, later = fake_lag(run)
    return (
        f"phase {run.k}: the fake's loss on fresh samples is {now:.4f}, after 20 more updates "
        f"{later:.4f} ({100 * (later / now - 1):+.1f} %; a clear fall means that it lags)"
    )


def classes_of(target: Mixture, n: int, *where) -> dict:
    """Uniformly drawn classes of n samples."""
    return {"class": integers(n, target.classes, *where, "class")}


def start(cfg, out: Path, watch, device) -> dict[str, Tensor]:
    """What student and fake start from, start.safetensors: fitted once, then read."""
    path = out / "start.safetensors"
    if not path.exists():
        made = fit(cfg, lambda steps: watch(steps, "start: fitting the teacher's velocity"))
        write_tensors(path, made, {"settings": plain(cfg), "kind": "start"})
    return read_tensors(path, "start", plain(cfg), "delete it, and run again with --resume")[0]


def fit(cfg, bar, steps: int = 1500, batch: int = 1024) -> dict[str, Tensor]:
    """The network fitted to the exact velocity: what a pretrained teacher's weights are at scale.

    From a fixed seed of its own: every run on the same mixture starts from the same network.
    """
    target, where = mixture(cfg), ("start", cfg.toy, cfg.classes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # of nn.Linear's initialisation alone
        net = network(cfg)
    optimizer = torch.optim.Adam(net.parameters(), 1e-2, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for i in bar(range(steps)):
        c = classes_of(target, batch, *where, i) if cfg.classes == "on" else None
        x_0 = target.sample(batch, stream(*where, i, "x_0"), c)
        t = uniform(batch, *where, i, "t")
        x_t = diffuse(x_0, 0.0, t, normal(x_0.shape, *where, i, "eps"))
        loss = (net(x_t, t, c) - target.velocity(x_t, t, c)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return net.state_dict()


# -- numbers and picture -------------------------------------------------------------------------


def draw(cfg, nets, times, n: int, device) -> tuple[list[Tensor], dict | None]:
    """n samples at the times of the nets, on the CPU, from noise of their own, and conditions."""
    c, shape = data(cfg)(n, cfg.seed, "evaluate")
    z = normal((n, *shape), cfg.seed, "evaluate", "z").to(device)
    with torch.no_grad():
        xs = trajectory(nets, times[: len(nets) + 1], z, move(c, device))
        return [x.cpu() for x in xs], c


def numbers(cfg, x: Tensor, c, y: Tensor) -> dict:
    """How far samples x (n, d) are from exact ones y, how well they hit the modes, and their class.

    With guidance the student's aim is another law than y's, and its energy need not fall to 0.
    """
    target = mixture(cfg)
    number, precision = modes(x, target)
    found = {"energy": energy(x, y), "modes": number, "precision": precision}
    if c is not None:
        label = target.labels[torch.cdist(x, target.means).argmin(1)]
        found["class_accuracy"] = (label == c["class"]).double().mean().item()
    return found


def report(run, look) -> tuple[dict, bytes]:
    """Numbers and picture of the student so far: in early phases how far x is at their ends."""
    about = run.cfg, run.student, run.phases[: run.k], run.device
    if run.k == len(run.phases):
        return evaluate(*about), picture(*about)
    xs, _ = draw(run.cfg, run.student, run.times, run.cfg.eval_samples, run.device)
    return {"energy_phases": phase_energies(run.cfg, xs, run.phases[: run.k])}, picture(*about)


def phase_energies(cfg, xs: list[Tensor], phases) -> list[float]:
    """Energy of x at the end of each phase, beside exact x_t."""
    target, n = mixture(cfg), len(xs[0])
    at = lambda p: target.sample_at(p.s, n, stream("exact at", cfg.seed, p.k))
    return [energy(xs[phase.last], at(phase)) for phase in phases]


def evaluate(cfg, student, phases, device) -> dict:
    """The student beside exact samples, and beside the exact teacher with as many Euler steps.

    Energies are distances `energy` of mixtures.py. energy_phases: x at the end of each phase
    beside exact x_t, which the last phase can hide; energy_floor: [mean, sd] of exact samples
    beside exact samples.
    """
    target, n, times = mixture(cfg), cfg.eval_samples, step_times(cfg.steps, cfg.shift)
    xs, c = draw(cfg, student, times, n, device)
    (*_, x_teacher), _ = draw(cfg, [teacher(cfg, device)] * cfg.steps, times, n, device)
    exact = [target.sample(n, stream("exact", cfg.seed, j)) for j in range(10)]
    floor = torch.tensor([energy(x, y) for x, y in zip(exact[:5], exact[5:])])
    metrics = numbers(cfg, xs[-1], c, exact[0])
    metrics["energy_floor"] = [floor.mean().item(), floor.std().item()]
    metrics["energy_phases"] = phase_energies(cfg, xs, phases)
    same_steps = numbers(cfg, x_teacher, c, exact[0])
    metrics |= {f"{key}_teacher_same_steps": value for key, value in same_steps.items()}
    metrics["modes_exact"], metrics["precision_exact"] = modes(exact[0], target)
    return metrics


def present(cfg, c, xs: list[Tensor], args, names, device) -> tuple[dict, list]:
    """Samples xs at each time as numbers, and as files in the unit of the data: picture and npy."""
    keep_all, target = args.trajectory, mixture(cfg)
    times = step_times(cfg.steps, cfg.shift)[-len(xs) :]
    centre, scale = target.unit
    kept = list(zip(times, xs))[0 if keep_all else -1 :]
    array = torch.stack([x for _, x in kept]).double() * scale + centre
    file = io.BytesIO()
    np.save(file, (array if keep_all else array[0]).numpy())
    figure, axes = plt.subplots(1, len(kept), figsize=(3 * len(kept), 3.2), squeeze=False)
    nearest = torch.cdist(xs[-1], target.means).argmin(1)
    for ax, (t, x) in zip(axes[0], kept):
        panel(ax, x, nearest, len(target.means), reach=reach_of(x))
        ax.set_title(f"t = {t:.3g}")
    y = target.sample(len(xs[-1]), stream("exact", cfg.seed))
    files = [("samples.png", png(figure)), ("samples.npy", file.getvalue())]
    return numbers(cfg, xs[-1], c, y), files


def picture(cfg, student, phases, device, n: int = 3000) -> bytes:
    """A png: the student step by step, the exact teacher with the same steps, exact samples."""
    target, times = mixture(cfg), step_times(cfg.steps, cfg.shift)
    exact_teacher = [teacher(cfg, device)] * cfg.steps
    rows = {
        f"student, {cfg.steps} steps": draw(cfg, student, times, n, device)[0],
        f"teacher, {cfg.steps} steps": draw(cfg, exact_teacher, times, n, device)[0],
        "exact": [target.sample_at(t, n, stream("picture", i)) for i, t in enumerate(times)],
    }
    expert = {i: phase.k for phase in phases for i in range(phase.first, phase.last)}
    ends = {phase.last for phase in phases}  # what is matched: thicker frames
    figure, axes = plt.subplots(
        3, len(times), figsize=(2.1 * len(times), 6.4), squeeze=False, layout="constrained"
    )
    for row, (name, xs) in zip(axes, rows.items()):
        final = torch.cdist(xs[-1], target.means).argmin(1)
        for i, (ax, x) in enumerate(zip(row, xs)):
            colour = None if name == "exact" else final  # of the mode where a sample ends
            panel(ax, x, colour, len(target.means), reach=reach_of(rows["exact"][i]))
            plt.setp(ax.spines.values(), linewidth=2.5 if i in ends else 0.8)
            ax.set_ylabel(name if i == 0 else "")
            if ax in axes[0]:
                by = f"\nby expert {expert[i - 1]}" if i else "\nnoise"
                ax.set_title(f"t = {times[i]:.3g}{by}", fontsize=9)
    return png(figure)
