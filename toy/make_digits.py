"""Make toy/mnist: train the teacher and the classifier, and measure the teacher's samples.

    python toy/make_digits.py --data DIR     39 minutes on one core

DIR holds MNIST's IDX files.
"""

import gzip
import json
import math
import sys
from argparse import Namespace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # run as a script from the project's root

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from losses import flow_matching
from models import cli, common, runs, weights
from models.common import UserError, integers, normal, uniform, write_json, write_tensors
from models.metrics import moments
from models.wan import Wan
from sde import diffuse, shift_time
from toy import digits
from toy.digits import CLASSES, FOLDER, SHIFT, Classifier

GUIDANCE, SAMPLES = 2.0, 10_000  # of the reference; those of the preset
WEIGHTS = ("transformer/model.safetensors", "classifier.safetensors", "reference.safetensors")


# -- data ----------------------------------------------------------------------------------------


def read_digits(folder: Path) -> tuple[Tensor, Tensor]:
    """Bytes (n, 28, 28) and labels (n,) from gzipped IDX files. Raises UserError."""
    files = sorted(folder.glob("*-images-idx3-ubyte.gz"), reverse=True)  # train, t10k
    names = [file.name.replace("images-idx3", "labels-idx1") for file in files]
    if not files:
        raise UserError(f"--data {folder}: expected *-images-idx3-ubyte.gz and labels of MNIST")
    images = torch.cat([read_idx(file, 16) for file in files]).view(-1, 28, 28)
    labels = torch.cat([read_idx(folder / name, 8) for name in names]).long()
    if len(images) != len(labels):
        raise UserError(f"--data {folder}: {len(images)} images have {len(labels)} labels")
    return images, labels


def read_idx(path: Path, header: int) -> Tensor:
    """Read the bytes of a gzipped IDX file after its header. Raises UserError."""
    with common.reading(path, "download it again"):
        content = bytearray(gzip.decompress(path.read_bytes()))
        return torch.frombuffer(content, dtype=torch.uint8, offset=header)


# -- the teacher ---------------------------------------------------------------------------------


def fit_teacher(pixels: Tensor, labels: Tensor, steps: int, seed: int, batch: int = 128) -> dict:
    """Train the teacher by flow matching, Eq. 4; return a moving average of its weights.

    A tenth of the labels is replaced by the null prompt, so that CFG works.
    """
    x = digits.to_latents(pixels)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = Wan(**weights.TEACHERS["mnist"].settings)
    nn.init.zeros_(net.head.head.weight)
    parameters = dict(net.named_parameters())
    averaged = {name: p.detach().clone() for name, p in parameters.items()}
    optimizer = torch.optim.AdamW(net.parameters(), 2e-3, (0.9, 0.99), fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min(1, i / 500) * (0.5 + 0.5 * math.cos(math.pi * i / steps))
    )
    bar = tqdm(range(steps), "teacher", mininterval=10)
    for i in bar:
        key = "teacher", seed, i
        rows = integers(batch, len(x), *key, "rows")
        is_null = uniform(batch, *key, "drop") < 0.1
        c = digits.conditions(labels[rows].masked_fill(is_null, CLASSES))
        t = shift_time(uniform(batch, *key, "t"), SHIFT)
        eps = normal((batch, *x.shape[1:]), *key)
        loss = flow_matching(net(diffuse(x[rows], 0.0, t, eps), t, c), x[rows], eps).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        for name, p in parameters.items():
            averaged[name].lerp_(p.detach(), 1 - min(0.9995, (1 + i) / (10 + i)))
        bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
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
        rows = integers(batch, len(pixels), "classifier", seed, i, "rows")
        x = augment(digits.to_unit_range(pixels[rows]), "classifier", seed, i)
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
    by_class = [z[labels == digit] for digit in range(CLASSES)]
    mean, cov = moments(z)
    class_mean, class_cov = map(torch.stack, zip(*map(moments, by_class)))
    features = torch.stack(by_class).half().double()  # (10, n / 10, 64), rounded as in the file
    spread = digits.class_spread(z, labels)
    tensors = dict(mean=mean, cov=cov, class_mean=class_mean, class_cov=class_cov, spread=spread)
    return tensors | {"features": features}


def provenance(**settings) -> dict:
    """The settings and the environment, for the files that it makes."""
    return settings | runs.environment("cpu", 1, 1)


def make_teacher(args: Namespace) -> None:
    """Train the teacher; write it as a published Wan, and its prompts."""
    pixels, labels = read_digits(args.data)
    folder = FOLDER / "transformer"
    tensors = fit_teacher(pixels, labels, args.steps, args.seed)
    config = {"_class_name": "WanModel", "patch_size": [1, 2, 2]}
    write_json(folder / "config.json", config | weights.TEACHERS["mnist"].settings)
    origin = provenance(seed=args.seed, steps=args.steps, digits=len(pixels))
    write_tensors(folder / "model.safetensors", tensors, origin)
    write_prompts(FOLDER / "prompts.safetensors")


def make_classifier(args: Namespace) -> None:
    """Train the classifier; write it, and its accuracy on the digits that test it."""
    pixels, labels = read_digits(args.data)
    order = torch.randperm(len(pixels), generator=common.stream("classifier", args.seed, "split"))
    test, train = order.tensor_split([len(order) * 15 // 100])
    classifier = fit_classifier(pixels[train], labels[train], args.epochs, args.seed)
    origin = provenance(seed=args.seed, epochs=args.epochs)
    write_tensors(FOLDER / "classifier.safetensors", classifier.state_dict(), origin)
    is_right = digits.classify(classifier, pixels[test])[1] == labels[test]
    accuracy = is_right.double().mean().item()
    metrics = {"learnt": len(train), "held_out": len(test), "accuracy": accuracy}
    print(json.dumps(metrics))
    write_json(FOLDER / "classifier.json", origin | metrics)


def make_reference(args: Namespace) -> None:
    """Measure the teacher: write statistics of 40 steps, and metrics of 40, 1, 2 and 4 steps."""
    classifier = digits.load_classifier()
    teacher = digits.guided_teacher(GUIDANCE)
    labels = digits.cycle_labels(SAMPLES)

    def sample(steps: int, number: int) -> tuple[Tensor, Tensor]:
        z = normal((SAMPLES, *digits.SHAPE), "reference", number, "z")
        x = digits.sample_teacher(teacher, steps, z, "cpu")
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
    write_tensors(FOLDER / "reference.safetensors", tensors, provenance())
    digests = {name: common.file_digest(FOLDER / name) for name in WEIGHTS}
    write_json(FOLDER / "reference.json", provenance() | metrics | {"sha256": digests})


PARTS = {"teacher": make_teacher, "classifier": make_classifier, "reference": make_reference}


def main() -> None:
    """Make the parts of toy/mnist that the flags name. Raises UserError."""
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add("--only", choices=PARTS, help="make one part (default: all)")
    add("--data", type=Path, default=Path("mnist"), help="folder of IDX files (default mnist)")
    add("--steps", type=int, default=16_000, help="training steps of the teacher (default 16000)")
    add("--epochs", type=int, default=20, help="of the classifier (default 20)")
    add("--seed", type=int, default=0, help="of both trainings (default 0)")
    args = parser.parse_args()
    if min(args.steps, args.epochs) < 1:
        raise UserError("--steps and --epochs must be at least 1")
    for name in [args.only] if args.only else PARTS:
        PARTS[name](args)


if __name__ == "__main__":
    sys.exit(cli.exit_status("make_digits.py", main))
