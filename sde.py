"""The diffusion process: how clean data becomes noise, and what a velocity says about both.

Conventions of the whole project:

    time         t = 0 is data, t = 1 is noise; s < t
    process      x_t = alpha_t x_0 + sigma_t eps
    velocity     v = eps - x_0; every network predicts its mean given x_t, in float32
    score        grad log p(x_t)
    shift        u is an unshifted time, t = shift_time(u, shift) a shifted one; re-noising draws u
    order        phases, steps and experts count from noise to data; phase 1 starts at t = 1
    shapes       x (B, ...), t (B,) or one number for all samples

No formula assumes alpha + sigma = 1. Every function takes a `process`; the default is the
paper's, `flow`. The other one, `vp`, lets tests tell a right formula from one that is right by
chance.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Process(NamedTuple):
    """A Gaussian process p(x_t | x_0) = N(alpha_t x_0, sigma_t^2 I), Eq. 1."""

    alpha: Callable
    sigma: Callable


def as_tensor(t: float | Tensor) -> Tensor:
    """Convert a number to a 0-dim float64 tensor; return a tensor unchanged.

    In a product with a float32 tensor a 0-dim tensor does not change the dtype.
    """
    return t if isinstance(t, Tensor) else torch.tensor(t, dtype=torch.float64)


flow = Process(alpha=lambda t: 1 - t, sigma=lambda t: t)
# alpha_t = cos(pi t / 2), written so that alpha_1 is exactly 0 and not -4e-8
vp = Process(
    alpha=lambda t: torch.sin(math.pi / 2 * (1 - as_tensor(t))),
    sigma=lambda t: torch.sin(math.pi / 2 * as_tensor(t)),
)


def expand_like(t: float | Tensor, x: Tensor) -> float | Tensor:
    """Reshape times (B,) to (B, 1, ..., 1), ready to multiply x (B, ...); a number stays one."""
    return t.reshape(-1, *[1] * (x.ndim - 1)) if isinstance(t, Tensor) and t.ndim else t


def coefficients(t: float | Tensor, x: Tensor, process: Process = flow) -> tuple:
    """alpha_t and sigma_t, shaped to multiply x (B, ...)."""
    t = expand_like(t, x)
    return process.alpha(t), process.sigma(t)


# -- from s to t ---------------------------------------------------------------------------------


def transition(
    s: float, t: float | Tensor, x: Tensor, process: Process = flow
) -> tuple[Tensor, Tensor]:
    """alpha_ts and sigma_ts of the transition kernel p(x_t | x_s), Eq. 2, shaped to multiply x.

    alpha_ts = alpha_t / alpha_s,  sigma_ts^2 = sigma_t^2 - alpha_ts^2 sigma_s^2,  s <= t, s < 1
    """
    t = as_tensor(expand_like(t, x))
    alpha_ts = process.alpha(t) / process.alpha(s)
    sigma_t = process.sigma(t)
    # the difference of squares as a product: a plain difference would cancel where t is near s
    carried = alpha_ts * process.sigma(s)
    return alpha_ts, ((sigma_t - carried).clamp(min=0) * (sigma_t + carried)).sqrt()


def diffuse(
    x_s: Tensor, s: float, t: float | Tensor, eps: Tensor, process: Process = flow
) -> Tensor:
    """x_t = alpha_ts x_s + sigma_ts eps, Eq. 2; Eq. 1 at s = 0. x_s, eps and x_t (B, ...).

    The process is Markov: if x_s follows p(x_s), x_t follows p(x_t), whatever s is (Eq. 3). This
    is why a phase can re-noise its own noisy samples and never needs clean ones.
    """
    alpha_ts, sigma_ts = transition(s, t, x_s, process)
    return alpha_ts * x_s + sigma_ts * eps


# -- what a velocity says ------------------------------------------------------------------------


def v_to_x0(x_t: Tensor, t: float | Tensor, v: Tensor, process: Process = flow) -> Tensor:
    """x_0 = (x_t - sigma_t v) / (alpha_t + sigma_t); finite at both ends."""
    alpha_t, sigma_t = coefficients(t, x_t, process)
    return (x_t - sigma_t * v) / (alpha_t + sigma_t)


def v_to_eps(x_t: Tensor, t: float | Tensor, v: Tensor, process: Process = flow) -> Tensor:
    """eps = (x_t + alpha_t v) / (alpha_t + sigma_t); finite at both ends."""
    alpha_t, sigma_t = coefficients(t, x_t, process)
    return (x_t + alpha_t * v) / (alpha_t + sigma_t)


def v_to_score(x_t: Tensor, t: float | Tensor, v: Tensor, process: Process = flow) -> Tensor:
    """score = -eps / sigma_t, the inverse of Eq. 5. Undefined (0 / 0) at t = 0."""
    return -v_to_eps(x_t, t, v, process) / coefficients(t, x_t, process)[1]


def score_to_v(x_t: Tensor, t: float | Tensor, score: Tensor, process: Process = flow) -> Tensor:
    """v = -x_t / alpha_t - (sigma_t + sigma_t^2 / alpha_t) score, Eq. 5. Undefined at t = 1."""
    alpha_t, sigma_t = coefficients(t, x_t, process)
    return -x_t / alpha_t - (sigma_t + sigma_t**2 / alpha_t) * score


def step(
    x_t: Tensor, t: float | Tensor, t_next: float | Tensor, v: Tensor, process: Process = flow
) -> Tensor:
    """One step of the solver from t to t_next: x_{t'} = alpha_{t'} x_0 + sigma_{t'} eps.

    x_0 and eps are what v says at x_t. For the flow this is Euler's x_t + (t' - t) v exactly; for
    another process it is the DDIM step. No fresh noise is added.
    """
    alpha, sigma = coefficients(t_next, x_t, process)
    return alpha * v_to_x0(x_t, t, v, process) + sigma * v_to_eps(x_t, t, v, process)


# -- the shift of the times ----------------------------------------------------------------------


def shift_time(u: float | Tensor, shift: float) -> float | Tensor:
    """t = shift u / (1 + (shift - 1) u): a shift > 1 moves times towards noise."""
    return shift * u / (1 + (shift - 1) * u)


def unshift_time(t: float | Tensor, shift: float) -> float | Tensor:
    """u such that shift_time(u, shift) = t."""
    return t / (shift - (shift - 1) * t)
