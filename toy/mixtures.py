"""Mixtures of Gaussians, whose velocity and score are known exactly at every t."""

import csv
import math
from dataclasses import dataclass, replace
from functools import cache
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from models.common import UserError, reading
from sde import Process, as_tensor, coefficients, flow

MAX_POINTS = 2000  # rows of --points: the exact teacher evaluates every component for every sample


@dataclass(frozen=True)
class Mixture:
    """Equal-weight Gaussians N(means[m], sd^2 I) in R^d. Each component belongs to one class.

    Methods take x_t (B, d), t (a number or (B,)) and c: None for the whole mixture, or
    {"class": (B,)} to condition each sample on a class.
    """

    means: Tensor  # (M, d)
    sd: float
    labels: Tensor  # (M,) class of each component
    process: Process = flow
    unit: tuple[Tensor | float, float] = (0.0, 1.0)  # --points: data = unit[0] + unit[1] * x

    @property
    def classes(self) -> int:
        return int(self.labels.max()) + 1

    def _posterior(self, x_t: Tensor, t, c) -> tuple[Tensor, Tensor]:
        """log p(component | x_t) up to a constant (B, M), and the variance of x_t given it."""
        alpha_t, sigma_t = coefficients(t, x_t, self.process)
        means = self.means.to(x_t)
        var = as_tensor(alpha_t**2 * self.sd**2 + sigma_t**2)
        # |x - alpha mu|^2 without its |x|^2, which is the same for all components: no cancellation
        logits = (alpha_t * (x_t @ means.T) - 0.5 * alpha_t**2 * means.square().sum(1)) / var
        if c is not None:
            other_class = self.labels.to(x_t.device) != c["class"][:, None]
            logits = logits.masked_fill(other_class, -math.inf)
        return logits, var

    def denoise(self, x_t: Tensor, t, c=None) -> tuple[Tensor, Tensor]:
        """E[x_0 | x_t] and E[eps | x_t], (B, d) each; finite at both ends."""
        alpha_t, sigma_t = coefficients(t, x_t, self.process)
        logits, var = self._posterior(x_t, t, c)
        mean = logits.softmax(1) @ self.means.to(x_t)  # (B, d)
        residual = (x_t - alpha_t * mean) / var
        return mean + alpha_t * self.sd**2 * residual, sigma_t * residual

    def velocity(self, x_t: Tensor, t, c=None) -> Tensor:
        """E[eps - x_0 | x_t] (B, d), the minimiser of Eq. 4."""
        x_0, eps = self.denoise(x_t, t, c)
        return eps - x_0

    def guided(self, x_t: Tensor, t, c, guidance: float) -> Tensor:
        """v + g (v_class - v), CFG. It is exact, but not the velocity of any distribution."""
        v = self.velocity(x_t, t)
        return v + guidance * (self.velocity(x_t, t, c) - v)

    def score(self, x_t: Tensor, t, c=None) -> Tensor:
        """grad log p(x_t) (B, d)."""
        alpha_t, _ = coefficients(t, x_t, self.process)
        logits, var = self._posterior(x_t, t, c)
        return (alpha_t * (logits.softmax(1) @ self.means.to(x_t)) - x_t) / var

    def sample(self, n: int, generator: torch.Generator, c=None) -> Tensor:
        """n exact samples x_0 (n, d)."""
        if c is None:
            component = torch.randint(len(self.means), (n,), generator=generator)
        else:
            in_class = self.labels == c["class"][:, None].to(self.labels.device)  # (n, M)
            component = torch.multinomial(in_class.double(), 1, generator=generator)[:, 0]
        noise = torch.randn(n, self.means.shape[1], generator=generator, dtype=self.means.dtype)
        return self.means[component] + self.sd * noise

    def sample_at(self, t: float, n: int, generator: torch.Generator, c=None) -> Tensor:
        """n exact samples x_t (n, d)."""
        x_0 = self.sample(n, generator, c)
        alpha_t, sigma_t = coefficients(t, x_0, self.process)
        noise = torch.randn(x_0.shape, generator=generator, dtype=x_0.dtype)
        return alpha_t * x_0 + sigma_t * noise

    def to(self, device) -> "Mixture":
        """Return the mixture on another device."""
        return replace(self, means=self.means.to(device), labels=self.labels.to(device))

    def double(self) -> "Mixture":
        """Return the mixture in float64."""
        return replace(self, means=self.means.double())


# -- the toys ------------------------------------------------------------------------------------


def ring(process: Process = flow) -> Mixture:
    """8 modes on a circle of radius 2, sd 0.1; two classes, which alternate."""
    angle = torch.arange(8) * (2 * math.pi / 8)
    return Mixture(
        2 * torch.stack([angle.cos(), angle.sin()], 1), 0.1, torch.arange(8) % 2, process
    )


def wide(process: Process = flow) -> Mixture:
    """The ring with radius 8 and the same sd."""
    narrow = ring(process)
    return replace(narrow, means=4 * narrow.means)


def grid(process: Process = flow) -> Mixture:
    """5 x 5 modes at distance 1, sd 0.1; five classes, one per row."""
    axis = torch.arange(-2.0, 3.0)
    return Mixture(torch.cartesian_prod(axis, axis), 0.1, torch.arange(25) % 5, process)


def spirals(process: Process = flow) -> Mixture:
    """Two interleaved arms of 20 modes, sd 0.07; a class per arm."""
    # equal steps of radius^2 give equal arc lengths
    radius = (0.5**2 + (2.2**2 - 0.5**2) * torch.linspace(0, 1, 20)).sqrt()
    angle = 3 * math.pi * (radius - 0.5) / (2.2 - 0.5)
    arm = radius[:, None] * torch.stack([angle.cos(), angle.sin()], 1)
    return Mixture(torch.cat([arm, -arm]), 0.07, torch.arange(40) // 20, process)


TOYS = {"ring": ring, "wide": wide, "grid": grid, "spirals": spirals}


# -- the user's points ---------------------------------------------------------------------------


def from_points(file: str) -> Mixture:
    """One component per row of a csv or npy file. Raises UserError.

    The rows are centred and divided by one number, so that the mean square of a coordinate is 1.
    sd is the median distance to the nearest other row, at least 0.05.
    """
    points = torch.from_numpy(read_points(Path(file)))
    if (points == points[0]).all():
        raise UserError(f"--points {file}: expected two different rows or more, found one point")
    centre = points.mean(0)
    points = points - centre
    scale = points.square().mean().sqrt()
    points = points / scale
    if not (scale.isfinite() and points.isfinite().all()):
        raise UserError(f"--points {file}: numbers too large or too close together; rescale them")
    gaps = torch.cdist(points, points).fill_diagonal_(math.inf).min(1).values
    labels = torch.zeros(len(points), dtype=torch.long)
    sd = max(0.05, gaps.median().item())
    return Mixture(points.float(), sd, labels, unit=(centre, scale.item()))


def read_points(path: Path) -> np.ndarray:
    """The rows (n, d) of a csv or npy file in float64. Raises UserError."""
    with reading(f"--points {path}", "expected rows of as many numbers each, or an npy file"):
        points = _read_npy(path) if path.suffix.lower() == ".npy" else _read_csv(path)
    if points.ndim != 2 or len(points) < 2 or points.shape[1] < 1:
        raise UserError(f"--points {path}: expected n x d numbers, n >= 2, found {points.shape}")
    if len(points) > MAX_POINTS:
        raise UserError(f"--points {path}: more than {MAX_POINTS} rows; give a random subset")
    if not np.isfinite(points).all():
        row = int(np.argmin(np.isfinite(points).all(1)))
        raise UserError(f"--points {path}: row {row + 1} contains NaN, infinity or text; remove it")
    return points.astype(np.float64)


def _read_npy(path: Path) -> np.ndarray:
    points = np.load(path, allow_pickle=False, mmap_mode="r")  # mapped: reads the rows it returns
    if not isinstance(points, np.ndarray) or points.ndim < 1 or points.dtype.kind not in "fiu":
        raise ValueError("expected one n x d array of numbers")
    return points[: MAX_POINTS + 1]


def _read_csv(path: Path) -> np.ndarray:
    """Read rows of numbers between ; or tabs or , or spaces, after at most one line of names.

    Between ; a comma is a decimal comma. A first column without a name, pandas' index, is left out.
    """
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        lines = (line.partition("#")[0].strip(" \n") for line in file)
        first = next(filter(None, lines), "")
        delimiter = next((mark for mark in ";\t," if mark in first), " ")
        points, width, start = [], 0, 0
        file.seek(0)
        rows = csv.reader(lines, delimiter=delimiter, skipinitialspace=True, strict=True)
        for row in islice(filter(None, rows), MAX_POINTS + 2):
            numbers = [_number(cell.replace(",", ".")) for cell in row]
            has_index = any(row) and row[0] in ("", "Unnamed: 0")
            is_numbered = has_index and numbers[1:] == [*range(len(row) - 1)]
            if not width and (is_numbered or np.isnan(numbers).all()):  # a line of names
                width, start = len(row), int(has_index)
                continue
            width = width or len(row)
            is_decimal = delimiter == ";" or not any("," in cell for cell in row)
            if len(row) != width or not is_decimal or not np.isfinite(numbers).all():
                raise ValueError(f"line {rows.line_num} is not {width} numbers: {row}"[:200])
            points.append(numbers[start:])
    return np.array(points)


def _number(cell: str) -> float:
    try:
        return float(cell)
    except ValueError:
        return math.nan


# -- distance of samples from a mixture ------------------------------------------------------------


def mean_distance(x: Tensor, y: Tensor | None = None, block: int = 50) -> float:
    """Mean of |x_i - y_j| over all pairs; without y, of |x_i - x_j| over i != j.

    A block of rows at a time, so that the distances stay in the cache.
    """
    columns = (x if y is None else y).T.contiguous()  # (d, m)
    total = 0.0
    for start in range(0, len(x), block):
        rows = x[start : start + block]
        others = columns[:, start:] if y is None else columns  # |x_i - x_j| = |x_j - x_i|
        distance = (rows[:, :1] - others[0]).square_()  # (block, m)
        for axis in range(1, x.shape[1]):
            distance += (rows[:, axis : axis + 1] - others[axis]).square_()
        distance.sqrt_()
        total += distance.sum(1).double().sum().item()
        if y is None:
            total += distance[:, len(rows) :].sum(1).double().sum().item()
    return total / (len(x) * (len(x) - 1 if y is None else len(y)))


def energy_distances(pairs: dict[str, tuple[Tensor, Tensor]]) -> dict[str, float]:
    """2 E|x - y| - E|x - x'| - E|y - y'| for each pair (x, y): 0 on average if x and y are alike.

    Unbiased, hence possibly negative. E|y - y'| is computed once for a y in several pairs.
    """
    within = {}
    distances = {}
    bar = tqdm(pairs.items(), "energy distances", disable=None, leave=False)
    for name, (x, y) in bar:
        for z in (x, y):
            if id(z) not in within:
                within[id(z)] = mean_distance(z)
        distances[name] = 2 * mean_distance(x, y) - within[id(x)] - within[id(y)]
    return distances


def energy(x: Tensor, y: Tensor) -> float:
    """Energy distance between the samples x (n, d) and y (m, d)."""
    return 2 * mean_distance(x, y) - mean_distance(x) - mean_distance(y)


@cache
def mode_radius(d: int) -> float:
    """Distance from the mean, in sd, that holds 1 - e^-4.5 = 98.9 % of a Gaussian in d dimensions.

    The quantile of the chi distribution, by bisection: 2.54, 3, 3.34, ... and about sqrt(d) + 1.6.
    """
    low, high = 0.0, d + 3.0
    for _ in range(60):
        r = (low + high) / 2
        mass = torch.special.gammainc(*torch.tensor([d / 2, r * r / 2], dtype=torch.float64))
        low, high = (r, high) if mass < -math.expm1(-4.5) else (low, r)
    return high


def mode_coverage(x: Tensor, mixture: Mixture) -> tuple[float, float, float]:
    """Effective number of modes, precision, and spread of samples x (n, d).

    precision   fraction of x inside a mode, where 98.9 % of its own samples are: 3 sd in the plane
    modes       exponential of the entropy of the nearest modes of the samples inside; 0 without any
    spread      their standard deviation around the centre of the samples of the same mode, over
                that of exact samples inside: 1 is exact, less is too narrow
    """
    means = mixture.means.to(x)
    parts = [torch.cdist(rows, means).min(1) for rows in x.split(1000)]
    distance, nearest = (torch.cat(part) for part in zip(*parts))
    radius = mode_radius(x.shape[1])
    half = x.shape[1] / 2
    hit = distance <= radius * mixture.sd
    x = x[hit].double()
    nearest = nearest[hit]
    counts = torch.bincount(nearest, minlength=len(means))
    share = counts / hit.sum().clamp(min=1)
    number = torch.special.entr(share).sum().exp().item() if hit.any() else 0.0
    sums = torch.zeros(len(means), x.shape[1], dtype=x.dtype).index_add_(0, nearest, x)
    variance = (x - sums[nearest] / counts[nearest, None]).square().mean()
    # variance of a Gaussian inside the radius, in units of sd^2
    a, r = torch.tensor([[half, half + 1], [radius**2 / 2] * 2], dtype=torch.float64)
    mass, moment = torch.special.gammainc(a, r)
    spread = (variance / (mixture.sd**2 * moment / mass)).sqrt().item()
    return number, hit.double().mean().item(), spread
