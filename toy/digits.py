"""The preset mnist: a Wan of half a million weights draws digits, small enough for a laptop.

The teacher, a classifier and statistics of the teacher's samples come with the repository in
toy/mnist; toy/make_digits.py makes them. A run needs no data.
"""

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm import tqdm

from config import Config
from models import teachers, weights
from models.common import UserError, normal, read_json
from models.media import Figure, to_png
from models.metrics import frechet, moments
from models.parallel import Topology
from models.wan import guide
from moe import Roles, chunked, cond_to, student_nets
from phases import Phase, step_times, trajectory
from toy import toy2d

FOLDER = weights.TEACHERS["mnist"].folder
CLASSES, SHAPE = 10, (16, 1, 8, 8)  # of a sample: channels, frames, rows, columns
SHIFT = 3.0  # of the times at which the teacher is trained and sampled


# -- pixels, latents, conditions -----------------------------------------------------------------


def to_latents(pixels: Tensor) -> Tensor:
    """Latents (n, 16, 1, 8, 8) in [-1, 1] of bytes (n, 28, 28): a border, then 4 x 4 patches."""
    x = F.pad(pixels, (2, 2, 2, 2)).float() / 127.5 - 1
    return rearrange(x, "n (h p) (w q) -> n (p q) 1 h w", p=4, q=4)


def to_pixels(x: Tensor) -> Tensor:
    """Bytes (n, 28, 28) of latents (n, 16, 1, 8, 8); the exact inverse of to_latents."""
    x = rearrange(x, "n (p q) 1 h w -> n (h p) (w q)", p=4, q=4)[:, 2:-2, 2:-2]
    return ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def conditions(labels: Tensor) -> dict[str, Tensor]:
    """Encode a class as a prompt of one token, one-hot in 16 channels; 10 is the null prompt."""
    return {"text": F.one_hot(labels, 16).float()[:, None]}  # (n, 1, 16)


def cycle_labels(n: int) -> Tensor:
    """Labels 0, 1, ..., 9, 0, 1, ... (n,)."""
    return torch.arange(n) % CLASSES


# -- the classifier ------------------------------------------------------------------------------


class Classifier(nn.Module):
    """A small convolutional classifier; its 64 features are the space of the Fréchet distance."""

    def __init__(self):
        super().__init__()
        self.convolutions = nn.Sequential(
            *(nn.Conv2d(1, 16, 3, padding=1), nn.SiLU()),
            *(nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.SiLU()),
            *(nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.SiLU(), nn.Flatten()),
        )
        self.features = nn.Linear(64 * 7 * 7, 64)
        self.classes = nn.Linear(64, CLASSES)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Features (n, 64) and logits (n, 10) of images (n, 1, 28, 28) in [-1, 1]."""
        z = self.features(self.convolutions(x))
        return z, self.classes(F.silu(z))


def to_unit_range(pixels: Tensor) -> Tensor:
    """Images (n, 1, 28, 28) in [-1, 1] of bytes (n, 28, 28)."""
    return pixels[:, None].float() / 127.5 - 1


@torch.no_grad()
def classify(classifier: Classifier, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Features (n, 64) in float64 and predicted classes (n,) of bytes (n, 28, 28)."""
    bar = tqdm(pixels.split(500), "classifying", leave=False, disable=None)
    features, logits = zip(*(classifier(to_unit_range(batch)) for batch in bar), strict=True)
    return torch.cat(features).double(), torch.cat(logits).argmax(1)


def load_classifier() -> Classifier:
    """Load the classifier of the repository."""
    classifier = Classifier()
    classifier.load_state_dict(load_file(FOLDER / "classifier.safetensors"))
    return classifier.eval()


# -- metrics -------------------------------------------------------------------------------------


def class_spread(z: Tensor, labels: Tensor) -> Tensor:
    """Mean distance between two samples of the same class, one per class (10,)."""
    return torch.stack([torch.pdist(z[labels == digit]).mean() for digit in range(CLASSES)])


def coverage(z: Tensor, centres: Tensor, k: int = 5) -> float:
    """Part of the centres (m, D) near which a sample z (n, D) lies.

    Near: in the ball to the k-th nearest of the other centres (Naeem et al., 2020). Unlike a mean
    distance it does not rise with samples that are far from all centres.
    """
    radius = torch.cdist(centres, centres).kthvalue(k + 1).values  # the nearest is itself
    nearest = torch.cdist(centres, z).amin(1) if len(z) else torch.full_like(radius, torch.inf)
    return (nearest <= radius).double().mean().item()


def measure(z: Tensor, predicted: Tensor, labels: Tensor, reference: dict[str, Tensor]) -> dict:
    """Compare samples of the classes `labels` (n,), with features z (n, 64), to the reference.

    accuracy         fraction whose predicted class is the label
    frechet          Fréchet distance of all features to those of the teacher after 40 steps
    frechet_classes  the mean over classes of the distance within a class
    diversity        mean distance of two samples of a class, divided by that of the teacher
    coverage         part of the teacher's samples of a class near which lies a sample of that class
                     that the classifier recognises; the mean over classes
    """
    pairs = zip(reference["class_mean"], reference["class_cov"], strict=True)
    within = [frechet(moments(z[labels == digit]), pair) for digit, pair in enumerate(pairs)]
    good = predicted == labels
    covered = [coverage(z[good & (labels == i)], x) for i, x in enumerate(reference["features"])]
    return {
        "accuracy": good.double().mean().item(),
        "frechet": frechet(moments(z), (reference["mean"], reference["cov"])),
        "frechet_classes": sum(within) / CLASSES,
        "diversity": (class_spread(z, labels) / reference["spread"]).mean().item(),
        "coverage": sum(covered) / CLASSES,
    }


def load_reference() -> dict[str, Tensor]:
    """Load the statistics of the teacher's samples, in float64; see make_digits.statistics."""
    tensors = load_file(FOLDER / "reference.safetensors")
    return {name: x.double() for name, x in tensors.items()}


def teacher_metrics(cfg: Config) -> dict:
    """Metrics of the teacher with as many steps, and the floor: 40 steps from other noise.

    Empty unless they were measured with the same settings. The number of samples is one of them,
    because Fréchet distances fall when it grows.
    """
    known = read_json(FOLDER / "reference.json", weights.download_hint("mnist"))
    measured = ((known["guidance"],), known["shift"], known["samples"], (), ())
    few_steps = known["teacher"].get(str(cfg.steps))
    settings = (cfg.guidance, cfg.shift, cfg.eval_samples, cfg.weights, cfg.teacher_lora)
    if settings != measured or few_steps is None:
        return {}
    floor = {"frechet_floor": known["floor"]["frechet"]}
    return floor | {f"{name}_teacher_same_steps": x for name, x in few_steps.items()}


# -- samples -------------------------------------------------------------------------------------


@torch.no_grad()
def sample_from(nets: list, times: tuple, x: Tensor, device, text="sampling") -> list[Tensor]:
    """x at each of the times, on the CPU, from x at the first; the ten classes in turn."""
    c = cond_to(conditions(cycle_labels(len(x))), device)
    steps = trajectory([chunked(net, 500) for net in nets], times, x.to(device), c)
    return [x.cpu() for x in tqdm(steps, text, len(times), leave=False, disable=None)]


def sample_teacher(
    teacher: Callable, steps: int, x_s: Tensor, device, s: float = 1.0, shift: float = SHIFT
) -> Tensor:
    """Take x_s (n, 16, 1, 8, 8) to t = 0 in so many Euler steps."""
    times = tuple(s * t for t in step_times(steps, shift))
    return sample_from([teacher] * steps, times, x_s, device, f"teacher, {steps} steps")[-1]


def guided_teacher(guidance: float) -> Callable:
    """Load the teacher of the repository: v = teacher(x_t, t, c), with CFG."""
    net = weights.load(FOLDER / "transformer", torch.float32, teacher="mnist")

    def teacher(x_t: Tensor, t: Tensor, c: dict) -> Tensor:
        null = conditions(torch.full((len(x_t),), CLASSES))
        return guide(net(x_t, t, c), net(x_t, t, null), guidance)

    return teacher


# -- the preset; what its functions do is in toy/toy2d.py and models/teachers.py ------------------


def check_config(cfg: Config, topology: Topology) -> None:
    """Raise UserError for settings that do not go together."""
    teachers.check_config(cfg, topology)
    if cfg.size != ("32x32",) or cfg.frames != 1:
        raise UserError("--size and --frames: mnist always draws 28 x 28 pixels; leave them out")
    if cfg.eval_samples < 100:
        raise UserError(f"--eval-samples: expected at least 100 for mnist, got {cfg.eval_samples}")


def input_files(cfg: Config) -> list[Path]:
    """The files that a run reads. Raises UserError."""
    own = ("classifier.safetensors", "reference.safetensors", "reference.json")
    return teachers.input_files(cfg) + [FOLDER / name for name in own]


def apply_flags(cfg: Config, args):
    """Return cfg unchanged. Raises UserError for sampling flags of the large teachers."""
    toy2d.refuse(args, toy2d.LARGE_ONLY, "mnist")
    return cfg


def report(
    cfg: Config, phases: list[Phase], roles: Roles, k: int, device, out: Path, finished: bool
) -> tuple[dict, bytes]:
    """Metrics and a png of the student of phases[:k]; the teacher takes the steps that it lacks."""
    n = cfg.eval_samples if finished else min(1000, cfg.eval_samples)
    z = normal((n, *SHAPE), cfg.seed, "report", "z")
    teacher = roles.teacher[1]
    nets = student_nets(roles, phases[:k])
    times = step_times(cfg.steps, cfg.shift)
    xs = sample_from(nets, times[: len(nets) + 1], z, device)
    x = xs[-1] if k == len(phases) else sample_teacher(teacher, 10, xs[-1], device, phases[k - 1].s)
    features, predicted = classify(load_classifier(), to_pixels(x))
    metrics = measure(features, predicted, cycle_labels(n), load_reference()) | {"samples": n}
    metrics |= teacher_metrics(cfg) if finished else {}
    rows = {}
    for steps in (40, cfg.steps):
        x = sample_teacher(teacher, steps, z[:30], device, shift=cfg.shift)
        rows[f"teacher, {steps} steps"] = x
    rows[f"student, {len(nets)} steps"] = xs[-1][:30]
    rows |= {f"t = {times[i]:.3g}": xs[i][:CLASSES] for i in (0, *(p.end for p in phases[:k]))}
    return metrics, draw_sheet(rows)


def draw_sheet(rows: dict[str, Tensor]) -> bytes:
    """Draw latents by name as a png, ten digits to a line."""
    lines = [len(x) // CLASSES for x in rows.values()]
    figure = Figure((6, 0.6 * sum(lines)), layout="constrained")
    axes = figure.subplots(len(rows), squeeze=False, height_ratios=lines)
    for ax, (name, x) in zip(axes[:, 0], rows.items(), strict=True):
        pixels = rearrange(to_pixels(x), "(r c) h w -> (r h) (c w)", c=CLASSES)
        ax.imshow(pixels.numpy(), cmap="gray_r", vmin=0, vmax=255)
        ax.set(xticks=[], yticks=[])
        ax.set_ylabel(name, fontsize=7)
    return to_png(figure)


def sample_inputs(cfg: Config, args, out: Path, run_dir: Path, device) -> tuple:
    """Settings, conditions, shape and names (none) of args.n samples, the ten classes in turn."""
    return cfg, conditions(cycle_labels(args.n)), SHAPE, []


def save_samples(cfg: Config, c, xs: list[Tensor], args, names, device) -> tuple[dict, list]:
    """Metrics of the samples xs, and their files: a sheet of a hundred, and the bytes of all."""
    pixels = torch.stack([to_pixels(x) for x in xs])  # (times, n, 28, 28)
    array = io.BytesIO()
    np.save(array, (pixels if args.trajectory else pixels[-1]).numpy())
    x = xs[-1][:100]
    x = F.pad(x, (0, 0) * 4 + (0, -len(x) % CLASSES), value=-1.0)  # the last line is full, too
    labels = cycle_labels(args.n)
    z, predicted = classify(load_classifier(), pixels[-1])
    metrics = {"accuracy": (predicted == labels).double().mean().item()}
    if len(z) >= 1000:  # with fewer, the covariance of a class means nothing
        metrics = measure(z, predicted, labels, load_reference()) | {"samples": len(z)}
    return metrics, [("samples.npy", array.getvalue()), ("samples.png", draw_sheet({"samples": x}))]


# the network is a Wan, so that most of the preset is that of the large teachers
PRESET = replace(
    teachers.PRESET,
    check_config=check_config,
    input_files=input_files,
    report=report,
    apply_flags=apply_flags,
    sample_inputs=sample_inputs,
    save_samples=save_samples,
    num_samples=1000,
    throughput=toy2d.PRESET.throughput,  # MFU means nothing on a CPU
    phase_summary=toy2d.PRESET.phase_summary,
    device="cpu",
    threads=1,
    keep_students=0,
)
