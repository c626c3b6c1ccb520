"""Make toy/mnist: train the teacher and the classifier, and measure the teacher's samples.

    python toy/make_digits.py --data DIR     39 minutes on one core

DIR holds MNIST's IDX files.
"""

import gzip
import json
import math
import shlex
import sys
import zlib
from argparse import Namespace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # run as a script from the project's root

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from losses import flow_matching
from models import weights
from models.common import (
    Parser,
    UserError,
    environment,
    exit_status,
    file_digest,
    first_line,
    integers,
    normal,
    stream,
    uniform,
    write_json,
    write_tensors,
)
from models.wan import Wan
from sde import diffuse, shift_time
from toy import digits
from toy.digits import CLASSES, FOLDER, SHIFT, Classifier

GUIDANCE, SAMPLES = 2.0, 10_000  # of the reference; those of the preset
WEIGHTS = ("transformer/model.safetensors", "judge.safetensors", "reference.safetensors")


# -- data ----------------------------------------------------------------------------------------


def read_digits(folder: Path) -> tuple[Tensor, Tensor]:
    """Bytes (n, 28, 28) and labels (n,) from IDX files. Raises UserError."""
    found = [p for p in ("train", "t10k") if (folder / f"{p}-images-idx3-ubyte.gz").is_file()]
    if not found:
        raise UserError(
            f"--data {folder}: expected t10k-images-idx3-ubyte.gz or train-images-idx3-ubyte.gz "
            "and their labels; download MNIST"
        )
    images = torch.cat([read_idx(folder / f"{part}-images-idx3-ubyte.gz") for part in found])
    labels = torch.cat([read_idx(folder / f"{part}-labels-idx1-ubyte.gz") for part in found])
    if images.shape[1:] != (28, 28) or labels.shape != (len(images),) or labels.max() >= CLASSES:
        raise UserError(f"--data {folder}: expected images of 28 x 28 and one label 0..9 for each")
    return images, labels.long()


def read_idx(path: Path) -> Tensor:
    """Read a gzipped IDX file as bytes, in the shape that its header gives. Raises UserError."""
    try:
        content = gzip.decompress(path.read_bytes())
        axes = content[3]
        shape = [int.from_bytes(content[4 + 4 * i : 8 + 4 * i], "big") for i in range(axes)]
        return torch.frombuffer(bytearray(content[4 + 4 * axes :]), dtype=torch.uint8).view(shape)
    except (OSError, EOFError, ValueError, IndexError, RuntimeError, zlib.error) as error:
        raise UserError(f"cannot read {path} ({first_line(error)}); download it again") from error


# -- the teacher ---------------------------------------------------------------------------------


def new_network(seed: int) -> Wan:
    """The untrained teacher. Its output layer is zero."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = Wan(**weights.TEACHERS["mnist"].settings)
    nn.init.zeros_(net.head.head.weight)
    return net


def fit_teacher(pixels: Tensor, labels: Tensor, steps: int, seed: int, batch: int = 128) -> dict:
    """Train the teacher by flow matching, Eq. 4; return a moving average of its weights.

    A tenth of the labels is replaced by the null prompt, so that CFG works.
    """
    x, net = digits.to_latents(pixels), new_network(seed)
    parameters = dict(net.named_parameters())
    averaged = {name: p.detach().clone() for name, p in parameters.items()}
    optimizer = torch.optim.AdamW(net.parameters(), 2e-3, (0.9, 0.99), fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min(1, i / 500) * (0.5 + 0.5 * math.cos(math.pi * i / steps))
    )
    bar, mean_loss = tqdm(range(steps), "teacher", mininterval=10), None
    for i in bar:
        key = "teacher", seed, i
        rows = integers(batch, len(x), *key, "rows")
        is_null = uniform(batch, *key, "drop") < 0.1
        c = digits.conditions(labels[rows].masked_fill(is_null, CLASSES))
        t, eps = shift_time(uniform(batch, *key, "t"), SHIFT), normal((batch, *x.shape[1:]), *key)
        loss = flow_matching(net(diffuse(x[rows], 0.0, t, eps), t, c), x[rows], eps).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        for name, p in parameters.items():
            averaged[name].lerp_(p.detach(), 1 - min(0.9995, (1 + i) / (10 + i)))
        mean_loss = loss.item() if i == 0 else mean_loss + 0.01 * (loss.item() - mean_loss)
        bar.set_postfix(loss=f"{mean_loss:.4f}", refresh=False)
    return averaged


def write_prompts(path: Path) -> None:
    """Write the eleven conditions in the format of models/encoders.py."""
    rows = digits.conditions(torch.arange(CLASSES + 1))["text"][:, 0].bfloat16()
    tensors = {"text": rows[:CLASSES], "negative": rows[CLASSES:]}
    tensors["offsets"] = torch.arange(CLASSES + 1)
    metadata = {"kind": "embeddings", "teacher": "mnist", "encoder": "one hot"}
    metadata |= {"prompts": [str(digit) for digit in range(CLASSES)], "negative": ""}
    write_tensors(path, tensors, metadata)


# -- the classifier ------------------------------------------------------------------------------


def train_test_split(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Rows for training the classifier, and the 15 % that test it."""
    order = torch.randperm(n, generator=stream("judge", seed, "split"))
    return order[n * 15 // 100 :], order[: n * 15 // 100]


def fit_classifier(
    pixels: Tensor, labels: Tensor, epochs: int, seed: int, batch: int = 100
) -> Classifier:
    """Train a classifier with cross-entropy on augmented digits."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        classifier = Classifier()
    steps = epochs * len(pixels) // batch
    optimizer = torch.optim.AdamW(classifier.parameters(), 2e-3, weight_decay=0.05, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for i in tqdm(range(steps), "classifier", mininterval=10):
        rows = integers(batch, len(pixels), "judge", seed, i, "rows")
        x = augment(digits.to_unit_range(pixels[rows]), "judge", seed, i)
        loss = F.cross_entropy(classifier(x)[1], labels[rows], label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return classifier.eval()


def augment(x: Tensor, *key) -> Tensor:
    """Rotate images by up to 0.2, shear and scale by up to a tenth, shift by up to 2 pixels."""
    change = (2 * uniform((len(x), 2, 3), *key, "move") - 1) * torch.tensor([0.1, 0.1, 2 / 14])
    angle = 0.2 * (2 * uniform(len(x), *key, "turn") - 1)
    cos, sin, zero = angle.cos(), angle.sin(), torch.zeros(len(x))
    rotation = torch.stack([cos, -sin, zero, sin, cos, zero], 1).view(-1, 2, 3)
    grid = F.affine_grid(rotation + change, list(x.shape), align_corners=False)
    return F.grid_sample(x + 1, grid, align_corners=False) - 1  # outside is black


# -- the command ---------------------------------------------------------------------------------


def statistics(z: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Moments of features (n, 64) over all samples and per class, spread and features per class."""
    (mean, cov), spread = digits.moments(z), digits.class_spread(z, labels)
    by_class = [digits.moments(z[labels == digit]) for digit in range(CLASSES)]
    class_mean, class_cov = map(torch.stack, zip(*by_class, strict=True))
    # rounded as in the file; (10, n / 10, 64)
    features = torch.stack([z[labels == digit] for digit in range(CLASSES)]).half().double()
    moments = dict(mean=mean, cov=cov, class_mean=class_mean, class_cov=class_cov, spread=spread)
    return moments | {"features": features}


def provenance(args: Namespace) -> dict:
    """The command, the seed and the environment, for the files that it makes."""
    words = ["DIR" if word == str(args.data) else word for word in sys.argv[1:]]
    command = shlex.join(["python", "toy/make_digits.py", *words])
    return {"command": command, "seed": args.seed} | environment("cpu", 1, 1)


def make_teacher(pixels: Tensor, labels: Tensor, args: Namespace) -> None:
    """Train the teacher; write it as a published Wan, and its prompts."""
    tensors, folder = fit_teacher(pixels, labels, args.steps, args.seed), FOLDER / "transformer"
    config = {"_class_name": "WanModel", "patch_size": [1, 2, 2]}
    write_json(folder / "config.json", config | weights.TEACHERS["mnist"].settings)
    metadata = provenance(args) | {"steps": args.steps, "digits": len(pixels)}
    write_tensors(folder / "model.safetensors", tensors, metadata)
    write_prompts(FOLDER / "prompts.safetensors")


def make_classifier(pixels: Tensor, labels: Tensor, args: Namespace) -> None:
    """Train the classifier; write it, and its accuracy on the digits that test it."""
    train, test = train_test_split(len(pixels), args.seed)
    classifier = fit_classifier(pixels[train], labels[train], args.epochs, args.seed)
    write_tensors(FOLDER / "judge.safetensors", classifier.state_dict(), provenance(args))
    is_right = digits.classify(classifier, pixels[test])[1] == labels[test]
    metrics = {"learnt": len(train), "held_out": len(test)}
    metrics["accuracy"] = is_right.double().mean().item()
    print(json.dumps(metrics))
    write_json(FOLDER / "judge.json", provenance(args) | metrics)


def make_reference(args: Namespace) -> None:
    """Measure the teacher: write statistics of 40 steps, and metrics of 40, 1, 2 and 4 steps."""
    classifier, teacher = digits.load_classifier(), digits.guided_teacher(GUIDANCE)
    labels = digits.cycle_labels(SAMPLES)

    def sample(steps: int, number: int) -> tuple[Tensor, Tensor]:
        x = digits.sample_teacher(teacher, steps, SAMPLES, "cpu", "reference", number)
        return digits.classify(classifier, digits.to_pixels(x))

    z, predicted = sample(40, 0)
    reference = statistics(z, labels)
    metrics = {"guidance": GUIDANCE, "shift": SHIFT, "samples": SAMPLES}
    metrics["accuracy"] = (predicted == labels).double().mean().item()
    metrics["floor"] = digits.measure(*sample(40, 1), labels, reference)  # from other noise
    metrics["teacher"] = {
        str(steps): digits.measure(*sample(steps, 2), labels, reference) for steps in (1, 2, 4)
    }
    print(json.dumps(metrics, indent=1))
    tensors = {name: x.float() for name, x in reference.items()}
    tensors["features"] = tensors["features"].half()
    write_tensors(FOLDER / "reference.safetensors", tensors, provenance(args))
    digests = {name: file_digest(FOLDER / name) for name in WEIGHTS}
    write_json(FOLDER / "reference.json", provenance(args) | metrics | {"sha256": digests})


def main() -> None:
    """Make the parts of toy/mnist that the flags name. Raises UserError."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add(
        "--only",
        choices=("teacher", "classifier", "reference"),
        help="make one part (default: all)",
    )
    add("--data", type=Path, default=Path("mnist"), help="folder of IDX files (default mnist)")
    add("--steps", type=int, default=16_000, help="training steps of the teacher (default 16000)")
    add("--epochs", type=int, default=20, help="of the classifier (default 20)")
    add("--seed", type=int, default=0, help="of both trainings (default 0)")
    args = parser.parse_args()
    if min(args.steps, args.epochs) < 1:
        raise UserError("--steps and --epochs must be at least 1")
    data = read_digits(args.data) if args.only != "reference" else ()
    if args.only in (None, "teacher"):
        make_teacher(*data, args)
    if args.only in (None, "classifier"):
        make_classifier(*data, args)
    if args.only in (None, "reference"):
        make_reference(args)


if __name__ == "__main__":
    sys.exit(exit_status("make_digits.py", main))
