"""The preset toy2d: the teacher is an exact mixture, so every metric has an exact reference."""

import io
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.adam import adam

from config import Config
from models.cli import flag_name, to_json
from models.common import UserError, normal, reading, stream, write_tensors
from models.media import Figure, to_png
from models.parallel import Topology
from models.runs import Preset, read_tensors
from moe import Roles, cond_to, separate_roles, student_nets, trained_names
from phases import Phase, step_times, trajectory
from sde import diffuse
from toy.mixtures import TOYS, Mixture, energy, energy_distances, from_points, mode_coverage


class MLP(nn.Module):
    """v = net(x_t, t, c) for points: linear layers with SiLU, residuals between the hidden ones.

    Input features: sin and cos of 2^k x for each axis (k = 0 .. octaves - 1), so that narrow modes
    can be told apart; the same of 16 frequencies of t; and c["class"] (B,) as one-hot.
    """

    def __init__(
        self, dim: int = 2, width: int = 64, layers: int = 4, classes: int = 0, octaves: int = 5
    ):
        super().__init__()
        self.classes = classes
        t_freq = torch.logspace(0, math.log10(30), 16)[None]  # (1, 16)
        freq = torch.block_diag(*[2.0 ** torch.arange(octaves)[None]] * dim, t_freq)  # (d + 1, W)
        self.register_buffer("freq", freq.repeat(1, 2), persistent=False)  # (d + 1, 2 W)
        # cos(x) = sin(x + pi / 2): one product and one sine give all features
        phase = torch.tensor([0.0, math.pi / 2]).repeat_interleave(freq.shape[1])
        self.register_buffer("phase", phase, persistent=False)  # (2 W,)
        sizes = [dim + 1 + 2 * freq.shape[1] + classes] + [width] * (layers - 1) + [dim]
        self.first, *hidden, self.last = [nn.Linear(n, m) for n, m in zip(sizes, sizes[1:])]
        self.hidden = nn.ModuleList(hidden)

    def forward(self, x_t: Tensor, t: Tensor, c: dict | None = None, adapter=None) -> Tensor:
        xt = torch.cat([x_t, t[:, None]], 1)  # (B, d + 1)
        features = [xt, torch.addmm(self.phase, xt, self.freq).sin()]
        if self.classes:
            features.append(F.one_hot(c["class"], self.classes).to(x_t.dtype))
        h = F.silu(self.first(torch.cat(features, 1)))  # (B, width)
        for linear in self.hidden:
            h = h + F.silu(linear(h))
        return self.last(h)


def load_mixture(cfg: Config) -> Mixture:
    """The distribution of cfg.points, or of cfg.toy. Raises UserError."""
    return from_points(cfg.points) if cfg.points else TOYS[cfg.toy]()


def make_network(cfg: Config, width: int = 64) -> MLP:
    """A network with the architecture of student and fake."""
    with torch.device("cpu"):  # the mixture has data even if networks are built on meta
        mixture = load_mixture(cfg)
    classes = mixture.classes if cfg.classes else 0
    return MLP(mixture.means.shape[1], width, classes=classes)


def exact_teacher(cfg: Config, device="cpu") -> Callable:
    """v_real = teacher(x_t, t, c): the exact velocity, with CFG if a scale is set."""
    mixture = load_mixture(cfg).to(device)
    [scale] = cfg.guidance
    if scale == 1:
        return mixture.velocity
    return lambda x_t, t, c=None: mixture.guided(x_t, t, c, scale)


# -- the preset: what train.py calls -------------------------------------------------------------


def check_config(cfg: Config, topology: Topology) -> None:
    """Raise UserError for settings that do not go together."""
    expected = dict(
        train_student="full", train_fake="full", base="float", compile=False, weights=()
    )
    expected |= dict(teacher_lora=(), prompts="", images="", size=())
    for name, value in expected.items():
        if getattr(cfg, name) != value:
            raise UserError(f"{flag_name(name)} is for large teachers, not for toy2d; drop it")
    if topology.processes > 1:
        raise UserError("toy2d runs in one process: use python train.py without torchrun")
    if len(cfg.guidance) != 1:
        raise UserError(f"--guidance: expected one number for toy2d, got {len(cfg.guidance)}")
    if cfg.guidance != (1.0,) and not cfg.classes:
        raise UserError("--guidance needs --classes: CFG compares with and without a class")
    if cfg.classes and cfg.points:
        raise UserError("--points have no classes; remove --classes")


def input_files(cfg: Config) -> list[Path]:
    """The files that a run reads: the user's points, if any. Raises UserError."""
    load_mixture(cfg)
    return [Path(cfg.points)] if cfg.points else []


def boundary_of(cfg: Config) -> float | None:
    """The time at which the teacher changes its branch, or None. Both branches are exact."""
    return cfg.boundary or None


def prepare(cfg: Config, out: Path, device, progress: Callable) -> None:
    """Fit the network that student and fake start from, start.safetensors, unless it exists."""
    path = out / "start.safetensors"
    if not path.exists():
        if cfg.points:
            count, dimensions = load_mixture(cfg).means.shape
            print(f"read {count} points of {dimensions} dimensions")
        tensors = fit_start(cfg, lambda steps: progress(steps, "fitting the start network"))
        write_tensors(path, tensors, {"settings": to_json(cfg), "kind": "start"})


def fit_start(
    cfg: Config, progress: Callable = iter, steps=1500, batch=1024, width=64
) -> dict[str, Tensor]:
    """Tensors of an MLP fitted to the exact velocity. They stand in for a pretrained teacher's.

    The seed is fixed: all runs on a mixture start from the same network.
    """
    mixture = load_mixture(cfg)
    data = make_data(cfg)
    key = ("start", cfg.toy, "on" if cfg.classes else "off")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # nn.Linear's initialisation takes no generator
        net = make_network(cfg, width)
    parameters = list(net.parameters())
    lr = 1e-2
    moments = [[torch.zeros_like(p) for p in parameters] for _ in range(2)]
    counts = [torch.zeros(()) for _ in parameters]
    options = dict(beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0)
    options |= dict(fused=True, amsgrad=False, maximize=False)
    cosine = lambda i: 1 + math.cos(math.pi * i / steps)
    for i in progress(range(steps)):
        c, _ = data(batch, rng=stream(*key, i, "class"))
        x_0 = mixture.sample(batch, stream(*key, i, "x_0"), c)
        t = torch.rand(batch, generator=stream(*key, i, "t"))
        x_t = diffuse(x_0, 0.0, t, normal(x_0.shape, *key, i, "eps"))
        # the exact velocity has no noise, unlike the target of Eq. 4, and the same minimiser
        loss = (net(x_t, t, c) - mixture.velocity(x_t, t, c)).square().mean()
        grads = torch.autograd.grad(loss, parameters)
        # the function: the class Adam imports torch.compile, which takes seconds
        adam(parameters, list(grads), *moments, [], counts, lr=lr, **options)
        lr *= cosine(i + 1) / cosine(i)
    return net.state_dict()


def make_roles(cfg: Config, phases: list[Phase], device, out: Path) -> Roles:
    """A network per role, and the exact teacher."""
    advice = "delete it and continue with --resume"
    start, _ = read_tensors(out / "start.safetensors", "start", to_json(cfg), advice)
    with reading(out / "start.safetensors", advice):
        make_network(cfg).load_state_dict(start)
    return roles_from(cfg, phases, device, start)


def roles_from(cfg: Config, phases: list[Phase], device, start: dict[str, Tensor]) -> Roles:
    """The roles of a run whose networks start from these tensors, and are as wide."""
    teacher = exact_teacher(cfg, device)
    width = len(start["first.bias"])
    network = lambda: make_network(cfg, width).to(device)
    return separate_roles(phases, cfg.fake_per_depth, network, start, teacher)


def make_data(cfg: Config, out: Path | None = None) -> Callable:
    """data(n, shared, rng) -> (conditions of n samples, shape of one)."""
    mixture = load_mixture(cfg)

    def data(n: int, shared=None, rng: torch.Generator | None = None) -> tuple:
        c = None
        if cfg.classes:
            c = {"class": torch.randint(mixture.classes, (n,), generator=rng)}
        return c, mixture.means.shape[1:]

    return data


def plan_text(cfg: Config, phases: list[Phase], device, topology: Topology) -> str:
    """The number of parameters of every role."""
    with torch.device("meta"):
        count = sum(p.numel() for p in make_network(cfg).parameters())
    names = trained_names(phases, cfg.fake_per_depth)
    return "\n".join(f"{name:16}{count:16,} parameters" for name in names)


# -- what sample.py calls ------------------------------------------------------------------------

LARGE_ONLY = ("prompt", "prompts", "image", "size", "frames")


def refuse(args, flags: tuple[str, ...], teacher: str) -> None:
    """Raise UserError if sample.py was given one of these flags."""
    for name in flags:
        if getattr(args, name):
            raise UserError(f"--{name} is for large teachers, not for {teacher}")


def apply_flags(cfg: Config, args):
    """Return cfg unchanged. Raises UserError for sampling flags of the large teachers."""
    refuse(args, ("weights", "dtype", "base", *LARGE_ONLY), "toy2d")
    if args.n < 2:
        raise UserError(f"--n: expected at least 2, got {args.n}: metrics compare samples")
    return cfg


def sample_inputs(cfg: Config, args, out: Path, run_dir: Path, device) -> tuple:
    """Settings, conditions, shape and names (none) of args.n samples."""
    c, shape = make_data(cfg)(args.n, rng=stream(args.seed, "sample", 0, "class"))
    return cfg, c, shape, []


def make_sampler(cfg: Config, branch_of: dict, weights_of: Callable, device, run_dir) -> Callable:
    """velocity(name, x_t, t, c) of a finished student's roles and of the exact teacher."""
    nets = {}
    for name in branch_of:
        if name.startswith("student"):
            nets[name] = make_network(cfg).to(device)
            with reading(f"the tensors of {name}", "train it again"):
                nets[name].load_state_dict(dict(weights_of(name).full()))
    teacher = exact_teacher(cfg, device)
    return lambda name, x_t, t, c=None: nets.get(name, teacher)(x_t, t, c)


def save_samples(
    cfg: Config, c: dict | None, xs: list[Tensor], args, names, device
) -> tuple[dict, list]:
    """Metrics of the samples xs, and their files in the data's units: samples.png, samples.npy."""
    mixture = load_mixture(cfg)
    centre, scale = mixture.unit
    times = step_times(cfg.steps, cfg.shift)[-len(xs) :]
    shown = list(zip(times, xs))[0 if args.trajectory else -1 :]
    array = torch.stack([x for _, x in shown]).double() * scale + centre
    file = io.BytesIO()
    np.save(file, (array if args.trajectory else array[0]).numpy())
    figure = Figure((3 * len(shown), 3.2))
    axes = figure.subplots(1, len(shown), squeeze=False)
    colors = nearest_mode(xs[-1], mixture)
    for ax, (t, x) in zip(axes[0], shown):
        plot_points(ax, x, colors, len(mixture.means), axis_limit(x))
        ax.set_title(f"t = {t:.3g}")
    exact = mixture.sample(len(xs[-1]), stream("exact", cfg.seed))
    values = {"energy": energy(xs[-1], exact)} | metrics(mixture, xs[-1], c)
    return values, [("samples.npy", file.getvalue()), ("samples.png", to_png(figure))]


# -- metrics and picture -------------------------------------------------------------------------


@torch.no_grad()
def sample_nets(
    cfg: Config, nets: list, times: tuple, n: int, device
) -> tuple[list[Tensor], dict | None]:
    """x (n, d) at each of the times of the nets, on the CPU, and the conditions.

    The noise is the evaluation's own, and the same for every student of a seed.
    """
    c, shape = make_data(cfg)(n, rng=stream(cfg.seed, "evaluate", "class"))
    z = normal((n, *shape), cfg.seed, "evaluate", "z").to(device)
    xs = trajectory(nets, times[: len(nets) + 1], z, cond_to(c, device))
    return [x.cpu() for x in xs], c


def nearest_mode(x: Tensor, mixture: Mixture) -> Tensor:
    """The component whose mean is nearest to each sample, (B,)."""
    return torch.cdist(x, mixture.means).argmin(1)


def metrics(mixture: Mixture, x: Tensor, c: dict | None) -> dict:
    """How well samples x (n, d) hit the modes, and their class if they have one."""
    values = dict(zip(("modes", "precision", "spread"), mode_coverage(x, mixture), strict=True))
    if c is not None:
        correct = mixture.labels[nearest_mode(x, mixture)] == c["class"]
        values["class_accuracy"] = correct.double().mean().item()
    return values


def report(
    cfg: Config, phases: list[Phase], roles: Roles, k: int, device, out: Path, finished: bool
) -> tuple[dict, bytes]:
    """Metrics and a png of the student of phases[:k]. Before the end only energies.

    energy         energy distance to exact samples. With CFG the student's aim is not this
                   distribution, and its energy does not fall to 0.
    energy_phases  the same at the end of each phase: later phases can hide errors of earlier ones
    energy_floor   [mean, sd] for exact samples against other exact samples
    """
    is_last = k == len(phases)
    mixture = load_mixture(cfg)
    n = cfg.eval_samples
    phases = phases[:k]
    times = step_times(cfg.steps, cfg.shift)
    nets = student_nets(roles, phases)
    xs, c = sample_nets(cfg, nets, times, n, device)
    exact = lambda s, i: mixture.sample_at(s, n, stream("exact", cfg.seed, i))
    pairs = {f"phase {p.k}": (xs[p.end], exact(p.s, p.s or 0)) for p in phases}
    if finished:
        (*_, x_teacher), _ = sample_nets(
            cfg, [exact_teacher(cfg, device)] * cfg.steps, times, n, device
        )
        _, y = pairs[f"phase {k}"]
        y1, y2 = exact(0.0, 1), exact(0.0, 2)
        pairs |= {"teacher": (x_teacher, y), "floor 1": (y, y1), "floor 2": (y, y2)}
        pairs["floor 3"] = y1, y2
    distance = energy_distances(pairs)
    values = {"energy_phases": [distance[f"phase {p.k}"] for p in phases]}
    if is_last:  # x at its end is a sample
        values = {"energy": distance[f"phase {k}"]} | values
    if finished:
        floor = torch.tensor([distance[f"floor {i}"] for i in (1, 2, 3)])
        values = {"energy": values["energy"]} | metrics(mixture, xs[-1], c) | values
        values["energy_floor"] = [floor.mean().item(), floor.std().item()]
        teacher = {"energy": distance["teacher"]} | metrics(mixture, x_teacher, c)
        values |= {f"{name}_teacher_same_steps": value for name, value in teacher.items()}
        values["modes_exact"], values["precision_exact"], _ = mode_coverage(y, mixture)
    return values, draw_picture(cfg, nets, phases, device)


def plot_points(ax, x: Tensor, colors: Tensor | None, num_colors: int, limit: float) -> None:
    """Plot the first two axes of x (n, d), or a histogram if d = 1; colors (n,), or None: grey."""
    ax.set(xticks=[], yticks=[], xlim=(-limit, limit))
    if x.shape[1] == 1:
        ax.hist(x[:, 0].numpy(), bins=80, range=(-limit, limit), color="tab:blue")
        return
    color = {"c": "0.4"}
    if colors is not None:
        color = {"c": colors, "cmap": "hsv", "vmin": 0, "vmax": num_colors}
    ax.scatter(x[:, 0], x[:, 1], s=1.5, alpha=0.5, linewidths=0, **color)
    ax.set(ylim=(-limit, limit), aspect="equal")


def axis_limit(x: Tensor) -> float:
    """Half the width of a plot that shows nearly all of x; 1 if x is not finite."""
    limit = 1.2 * x.abs().max(1).values.quantile(0.99).item()
    return limit if math.isfinite(limit) else 1.0


def draw_picture(cfg: Config, nets: list, phases: list[Phase], device, n: int = 3000) -> bytes:
    """A png: student, exact teacher with as many steps, and exact samples, at every time.

    A sample has the colour of the mode where it ends. Thick frames: the student matches p(x_t).
    """
    mixture = load_mixture(cfg)
    times = step_times(cfg.steps, cfg.shift)
    teacher = [exact_teacher(cfg, device)] * cfg.steps
    rows = {
        f"student, {cfg.steps} steps": sample_nets(cfg, nets, times, n, device)[0],
        f"teacher, {cfg.steps} steps": sample_nets(cfg, teacher, times, n, device)[0],
        "exact": [mixture.sample_at(t, n, stream("picture", i)) for i, t in enumerate(times)],
    }
    expert = {i: phase.k for phase in phases for i in range(phase.first, phase.end)}
    ends = {phase.end for phase in phases}
    figure = Figure((2.1 * len(times), 6.4), layout="constrained")
    axes = figure.subplots(3, len(times), squeeze=False)
    for row, (name, xs) in zip(axes, rows.items()):
        colors = None if name == "exact" else nearest_mode(xs[-1], mixture)
        for i, (ax, x) in enumerate(zip(row, xs)):
            plot_points(ax, x, colors, len(mixture.means), axis_limit(rows["exact"][i]))
            ax.spines[:].set_linewidth(2.5 if i in ends else 0.8)
            ax.set_ylabel(name if i == 0 else "")
            if name.startswith("student"):
                source = f"by expert {expert[i - 1]}" if i else "noise"
                ax.set_title(f"t = {times[i]:.3g}\n{source}", fontsize=9)
        for ax in row[len(xs) :]:  # steps of phases that a preview does not have yet
            ax.axis("off")
    return to_png(figure)


PRESET = Preset(
    check_config=check_config,
    input_files=input_files,
    base_files=input_files,
    make_roles=make_roles,
    make_data=make_data,
    report=report,
    plan_text=plan_text,
    apply_flags=apply_flags,
    sample_inputs=sample_inputs,
    make_sampler=make_sampler,
    save_samples=save_samples,
    prepare=prepare,
    num_samples=10_000,
    boundary_of=boundary_of,
)
