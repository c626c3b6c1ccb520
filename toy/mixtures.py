"""Mixtures of Gaussians: distributions whose velocity, score and density are known at every t."""

import math
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from models.files import UserError
from sde import Process, coefficients, exact, flow

MAX_POINTS = 2000  # of a user's file: the exact teacher asks every component for every sample


@dataclass(frozen=True)
class Mixture:
    """Equal-weight Gaussians N(means[m], sd^2 I) with a class each; every method is exact.

    Methods take x_t (B, d), t (a number or (B,)), and c: None, or {"class": (B,)} to look at one
    class of the mixture only.
    """

    means: Tensor  # (M, d)
    sd: float
    labels: Tensor  # (M,) class of each component
    p: Process = flow
    unit: tuple[Tensor | float, float] = (0.0, 1.0)  # data = centre + scale * x, of --points

    @property
    def classes(self) -> int:
        return int(self.labels.max()) + 1

    def _posterior(self, x_t: Tensor, t, c):
        """log p(component, x_t) up to a constant (B, M); the variance of x_t given it (B, 1)."""
        alpha_t, sigma_t = coefficients(t, x_t, self.p)
        means, var = self.means.to(x_t), exact(alpha_t**2 * self.sd**2 + sigma_t**2)
        # |x - alpha mu|^2 without |x|^2, which no component can change: nothing to cancel
        logits = (alpha_t * (x_t @ means.T) - 0.5 * alpha_t**2 * means.square().sum(1)) / var
        if c is not None:
            logits = logits.masked_fill(
                self.labels.to(x_t.device) != c["class"][:, None], -math.inf
            )
        return logits, var

    def denoise(self, x_t: Tensor, t, c=None) -> tuple[Tensor, Tensor]:
        """E[x_0 | x_t] and E[eps | x_t], (B, d) each; finite at both ends."""
        alpha_t, sigma_t = coefficients(t, x_t, self.p)
        logits, var = self._posterior(x_t, t, c)
        mean = logits.softmax(1) @ self.means.to(x_t)  # (B, d) of the components that made x_t
        residual = (x_t - alpha_t * mean) / var
        return mean + alpha_t * self.sd**2 * residual, sigma_t * residual

    def velocity(self, x_t: Tensor, t, c=None) -> Tensor:
        """E[eps - x_0 | x_t], the minimiser of Eq. 4. (B, d)"""
        x_0, eps = self.denoise(x_t, t, c)
        return eps - x_0

    def guided(self, x_t: Tensor, t, c, guidance: float) -> Tensor:
        """v + g (v_class - v), classifier-free guidance; exact, though no score of anything."""
        v = self.velocity(x_t, t)
        return v + guidance * (self.velocity(x_t, t, c) - v)

    def score(self, x_t: Tensor, t, c=None) -> Tensor:
        """grad log p(x_t). (B, d)"""
        alpha_t, _ = coefficients(t, x_t, self.p)
        logits, var = self._posterior(x_t, t, c)
        return (alpha_t * (logits.softmax(1) @ self.means.to(x_t)) - x_t) / var

    def log_density(self, x_t: Tensor, t, c=None) -> Tensor:
        """log p(x_t). (B,)"""
        logits, var = self._posterior(x_t, t, c)
        count = (logits > -math.inf).sum(1)  # of the components in question
        quadratic = (
            x_t.square().sum(1, keepdim=True) / var + x_t.shape[1] * (2 * math.pi * var).log()
        )
        return logits.logsumexp(1) - 0.5 * quadratic[:, 0] - count.log()

    def sample(self, n: int, generator: torch.Generator, c=None) -> Tensor:
        """n exact samples x_0 (n, d), of the classes c where given."""
        if c is None:
            component = torch.randint(len(self.means), (n,), generator=generator)
        else:
            mine = self.labels == c["class"][:, None].to(self.labels.device)  # (n, M)
            component = torch.multinomial(mine.double(), 1, generator=generator)[:, 0]
        noise = torch.randn(n, self.means.shape[1], generator=generator, dtype=self.means.dtype)
        return self.means[component] + self.sd * noise

    def sample_at(self, t: float, n: int, generator: torch.Generator, c=None) -> Tensor:
        """n exact samples x_t (n, d)."""
        x_0 = self.sample(n, generator, c)
        alpha_t, sigma_t = coefficients(t, x_0, self.p)
        return alpha_t * x_0 + sigma_t * torch.randn(
            x_0.shape, generator=generator, dtype=x_0.dtype
        )

    def to(self, device) -> "Mixture":
        """The same mixture on another device."""
        return replace(self, means=self.means.to(device), labels=self.labels.to(device))

    def double(self) -> "Mixture":
        """The same mixture in float64."""
        return replace(self, means=self.means.double())


# -- the toys ------------------------------------------------------------------------------------


def ring(p: Process = flow) -> Mixture:
    """8 modes on a circle of radius 2, sd 0.1; two classes, every second mode."""
    angle = torch.arange(8) * (2 * math.pi / 8)
    return Mixture(2 * torch.stack([angle.cos(), angle.sin()], 1), 0.1, torch.arange(8) % 2, p)


def wide(p: Process = flow) -> Mixture:
    """The ring with its modes four times as far from each other, and as narrow."""
    near = ring(p)
    return replace(near, means=4 * near.means)


def grid(p: Process = flow) -> Mixture:
    """5 x 5 modes at distance 1, sd 0.1; a class is a row."""
    axis = torch.arange(-2.0, 3.0)
    return Mixture(torch.cartesian_prod(axis, axis), 0.1, torch.arange(25) % 5, p)


def spirals(p: Process = flow) -> Mixture:
    """Two interleaved arms of 20 modes, sd 0.07, evenly along an arm; a class is an arm."""
    length = torch.linspace(0, 1, 20)
    radius = (
        0.5**2 + (2.2**2 - 0.5**2) * length
    ).sqrt()  # equal steps of radius^2: equal arc length
    angle = 3 * math.pi * (radius - 0.5) / (2.2 - 0.5)
    arm = radius[:, None] * torch.stack([angle.cos(), angle.sin()], 1)
    return Mixture(torch.cat([arm, -arm]), 0.07, torch.arange(40) // 20, p)


TOYS = {"ring": ring, "wide": wide, "grid": grid, "spirals": spirals}


# -- anybody's points ----------------------------------------------------------------------------


def from_points(file: str, bandwidth: float = 0.0) -> Mixture:
    """One narrow component for each row of a csv or npy file, in units of the data's deviation.

    The rows are centred and divided by one number, so that the mean square of a coordinate is 1;
    `bandwidth` is the components' sd in that unit. 0 takes the median distance to the nearest
    other row, at least 0.05. Raises UserError.
    """
    points = torch.from_numpy(read_points(file))
    if (points == points[0]).all():
        raise UserError(f"{file}: all rows are the same point; give at least two different ones")
    centre = points.mean(0)
    points = points - centre
    scale = points.square().mean().sqrt()
    points = points / scale
    if not (scale.isfinite() and points.isfinite().all()):
        raise UserError(f"{file}: the numbers are too large or too close together; rescale them")
    if not bandwidth:
        gaps = torch.cdist(points, points).fill_diagonal_(math.inf).min(1).values
        bandwidth = max(0.05, gaps.median().item())
    labels = torch.zeros(len(points), dtype=torch.long)
    return Mixture(points.float(), bandwidth, labels, unit=(centre, scale.item()))


def read_points(file: str) -> np.ndarray:
    """n x d float64 from a csv (an optional line of names first) or an npy. Raises UserError."""
    path = Path(file)
    try:
        points = _read_npy(path) if path.suffix == ".npy" else _read_csv(path)
    except OSError as error:
        raise UserError(f"--points {file}: {error.strerror}") from error
    if points.ndim != 2 or len(points) < 2 or points.shape[1] < 1:
        raise UserError(
            f"--points {file}: need n x d numbers, n at least 2; found {points.shape[0]} rows"
        )
    if len(points) > MAX_POINTS:
        raise UserError(f"--points {file}: more than {MAX_POINTS} rows; give a random subset")
    if not np.isfinite(points).all():
        row = int(np.argmin(np.isfinite(points).all(1)))
        raise UserError(f"--points {file}: row {row + 1} holds NaN or infinity; remove it")
    return points.astype(np.float64)


def _read_npy(path: Path) -> np.ndarray:
    """The array of an npy file; no more rows than it takes to see that there are too many."""
    try:  # mapped, so that ten million rows are refused and not read
        points = np.load(path, allow_pickle=False, mmap_mode="r")
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"--points {path}: not a plain npy file of numbers ({error})") from error
    if not isinstance(points, np.ndarray) or points.ndim < 1 or points.dtype.kind not in "fiu":
        raise UserError(f"--points {path}: not one n x d array of numbers")
    return points[: MAX_POINTS + 1]


def _read_csv(path: Path) -> np.ndarray:
    """The rows of a csv with commas or semicolons; lines that begin with # are comments."""
    rows: list[list[float]] = []
    names = False  # the first line may hold those of the columns
    with open(path, encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            if not line.strip() or line.startswith("#"):
                continue
            cells = line.replace(";", ",").split(",")
            try:
                rows.append([float(cell) for cell in cells])
            except ValueError:
                if rows or names or any(map(_is_number, cells)):
                    text = line.strip()[:40]
                    raise UserError(
                        f"--points {path}: line {number} is not numbers: {text!r}"
                    ) from None
                names = True
            if len(rows) > MAX_POINTS:
                break
    if len({len(row) for row in rows}) > 1:
        raise UserError(f"--points {path}: rows of different lengths; need n x d numbers")
    return np.array(rows)


def _is_number(cell: str) -> bool:
    """Whether float() takes it."""
    try:
        float(cell)
        return True
    except ValueError:
        return False


# -- how far samples are from a mixture ------------------------------------------------------------


def mean_distance(x: Tensor, y: Tensor, block: int = 100) -> float:
    """Mean of |x_i - y_j| over all pairs, in blocks that fit the cache: 10 times faster."""
    total, columns = 0.0, y.T.contiguous()  # (d, m)
    for rows in x.split(block):
        squares = (rows[:, :1] - columns[0]).square_()  # (block, m)
        for axis in range(1, x.shape[1]):
            squares += (rows[:, axis : axis + 1] - columns[axis]).square_()
        total += squares.sqrt_().sum(1).double().sum().item()
    return total / (len(x) * len(y))


def energy(x: Tensor, y: Tensor) -> float:
    """Energy distance 2 E|x - y| - E|x - x'| - E|y - y'|, unbiased: 0 on average for equal laws."""
    n, m = len(x), len(y)
    within = mean_distance(x, x) * n / (n - 1) + mean_distance(y, y) * m / (m - 1)
    return 2 * mean_distance(x, y) - within


def modes(x: Tensor, mixture: Mixture) -> tuple[float, float]:
    """Effective number of modes, and precision: how many and how well the samples hit.

    Precision is the fraction within 3 sd of a mode; the number is the exponential of the entropy
    of those samples' nearest modes, 0 if there are none.
    """
    distance, nearest = (
        torch.cat(part) for part in zip(*(_nearest(rows, mixture) for rows in x.split(1000)))
    )
    hit = distance <= 3 * mixture.sd
    share = torch.bincount(nearest[hit], minlength=len(mixture.means)) / hit.sum().clamp(min=1)
    number = torch.special.entr(share).sum().exp().item() if hit.any() else 0.0
    return number, hit.double().mean().item()


def _nearest(x: Tensor, mixture: Mixture):
    """Distance to the nearest mode, and which it is. (B,) each"""
    return torch.cdist(x, mixture.means.to(x)).min(1)
