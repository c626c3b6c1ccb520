"""The diffusion process: how clean data becomes noise, and what a velocity says about both.

Conventions of the whole project, stated here and nowhere else:

    t = 0 is data, t = 1 is noise, and s < t always     x_t = alpha_t x_0 + sigma_t eps
    every network predicts the velocity                 v = eps - x_0
    score                                               grad log p(x_t), written `score`
    unshifted times are called u, shifted ones t        t = shift(u, S); intervals are drawn in u
    phases, steps and experts count from noise to data  phase 1 starts at t = 1

Nothing here assumes alpha + sigma = 1. The paper's process, `flow`, is the default of every
function; `vp` is there so that tests can tell a formula from a coincidence.
"""

import math
from typing import Callable, NamedTuple

import torch
from torch import Tensor


class Process(NamedTuple):
    """A Gaussian process p(x_t | x_0) = N(alpha_t x_0, sigma_t^2 I), Eq. 1. Times of any shape."""

    alpha: Callable
    sigma: Callable


def exact(t) -> Tensor:
    """A number as a 0-dim float64 tensor, which changes nobody's dtype; tensors pass."""
    return t if isinstance(t, Tensor) else torch.tensor(t, dtype=torch.float64)


flow = Process(alpha=lambda t: 1 - t, sigma=lambda t: t)
# alpha_t = cos(pi t / 2), written so that alpha_1 is 0 and not -4e-8
vp = Process(
    alpha=lambda t: torch.sin(math.pi / 2 * (1 - exact(t))),
    sigma=lambda t: torch.sin(math.pi / 2 * exact(t)),
)


def like(t, x: Tensor):
    """Times (B,) as (B, 1, ..., 1), ready to multiply x (B, ...); a number serves all samples."""
    return t.reshape(-1, *[1] * (x.ndim - 1)) if isinstance(t, Tensor) and t.ndim else t


def coefficients(t, x: Tensor, p: Process = flow):
    """alpha_t and sigma_t, shaped to multiply x (B, ...); t is a number or (B,)."""
    t = like(t, x)
    return p.alpha(t), p.sigma(t)


def snr(t: Tensor, p: Process = flow) -> Tensor:
    """Signal-to-noise ratio alpha_t^2 / sigma_t^2: inf at t = 0, 0 at t = 1, decreasing."""
    return (p.alpha(t) / p.sigma(t)) ** 2


# -- from s to t ---------------------------------------------------------------------------------


def kernel(s, t, p: Process = flow) -> tuple[Tensor, Tensor]:
    """alpha_ts = alpha_t / alpha_s and sigma_ts of p(x_t | x_s), Eq. 2. Needs s <= t, s < 1."""
    t = exact(t)
    alpha_ts = p.alpha(t) / p.alpha(s)
    # sigma_ts^2 = sigma_t^2 - alpha_ts^2 sigma_s^2, as a product: no cancellation when t is near s
    sigma_t, carried = p.sigma(t), alpha_ts * p.sigma(s)
    return alpha_ts, ((sigma_t - carried).clamp(min=0) * (sigma_t + carried)).sqrt()


def diffuse(x_s: Tensor, s, t, eps: Tensor, p: Process = flow) -> Tensor:
    """x_t = alpha_ts x_s + sigma_ts eps, Eq. 2; at s = 0 it is Eq. 1. x_s, eps (B, ...).

    Where x_s has the law p(x_s), x_t has the law p(x_t), whatever s is, Eq. 3.
    """
    alpha_ts, sigma_ts = kernel(like(s, x_s), like(t, x_s), p)
    return alpha_ts * x_s + sigma_ts * eps


# -- what a velocity says ------------------------------------------------------------------------


def v_to_x0(x_t: Tensor, t, v: Tensor, p: Process = flow) -> Tensor:
    """x_0 = (x_t - sigma_t v) / (alpha_t + sigma_t); finite at both ends."""
    alpha_t, sigma_t = coefficients(t, x_t, p)
    return (x_t - sigma_t * v) / (alpha_t + sigma_t)


def v_to_eps(x_t: Tensor, t, v: Tensor, p: Process = flow) -> Tensor:
    """eps = (x_t + alpha_t v) / (alpha_t + sigma_t); finite at both ends."""
    alpha_t, sigma_t = coefficients(t, x_t, p)
    return (x_t + alpha_t * v) / (alpha_t + sigma_t)


def v_to_score(x_t: Tensor, t, v: Tensor, p: Process = flow) -> Tensor:
    """score = -eps / sigma_t, Eq. 5 turned round. At t = 0 a velocity holds no score (0 / 0)."""
    return -v_to_eps(x_t, t, v, p) / coefficients(t, x_t, p)[1]


def score_to_v(x_t: Tensor, t, score: Tensor, p: Process = flow) -> Tensor:
    """v = -x_t / alpha_t - (sigma_t + sigma_t^2 / alpha_t) score, Eq. 5. At t = 1: 0 / 0."""
    alpha_t, sigma_t = coefficients(t, x_t, p)
    return -x_t / alpha_t - (sigma_t + sigma_t**2 / alpha_t) * score


def step(x_t: Tensor, t, t_next, v: Tensor, p: Process = flow) -> Tensor:
    """The solver's step t -> t_next: x_0 and eps are kept, their mixture changes.

    x_{t'} = alpha_{t'} x_0 + sigma_{t'} eps. For the flow this is Euler's x_t + (t' - t) v, for
    another process it is DDIM's step. The result never depends on noise drawn on the way.
    """
    alpha, sigma = coefficients(t_next, x_t, p)
    return alpha * v_to_x0(x_t, t, v, p) + sigma * v_to_eps(x_t, t, v, p)


# -- the shift of the times ----------------------------------------------------------------------


def shift(u, S: float):
    """t = S u / (1 + (S - 1) u): S > 1 moves times towards noise. Numbers or tensors."""
    return S * u / (1 + (S - 1) * u)


def unshift(t, S: float):
    """u with shift(u, S) = t."""
    return t / (S - (S - 1) * t)
