"""The paper's objectives, as pure functions of what the networks returned.

Score matching teaches a fake what the student's samples look like; the distribution-matching
loss moves the samples from where the fake says they are to where the teacher says they should be.
Inside a phase that ends at s > 0 no clean sample exists: everything is said of x_s.
Every loss is one number a sample, (B,): the mean over its elements. The loop takes their mean.
"""

import torch
from torch import Tensor

from sde import Process, coefficients, flow, kernel, like, v_to_x0


def mean(x: Tensor) -> Tensor:
    """Mean over the elements of each sample: (B, ...) -> (B,)."""
    return x.flatten(1).mean(1)


# -- score matching ------------------------------------------------------------------------------


def flow_matching(v: Tensor, x_0: Tensor, eps: Tensor) -> Tensor:
    """|| v - (eps - x_0) ||^2 at x_t = alpha_t x_0 + sigma_t eps, Eq. 4."""
    return mean((v - (eps - x_0)) ** 2)


def v_target(x_s: Tensor, s, t, eps: Tensor, p: Process = flow) -> Tensor:
    """Target of v for x_t = alpha_ts x_s + sigma_ts eps, Eq. 11: its mean given x_t is exact.

    (alpha_s^2 sigma_t + alpha_t sigma_s^2) / (alpha_s^2 sigma_ts) eps - x_s / alpha_s
    At s = 0 this is eps - x_0, the target of Eq. 4. It grows like 1 / sigma_ts as t -> s.
    """
    eps_weight, alpha_s, sigma_ts = _target_parts(x_s, s, t, p)
    return eps_weight / sigma_ts * eps - x_s / alpha_s


def x0_target(x_s: Tensor, s, t, eps: Tensor, p: Process = flow) -> Tensor:
    """Target of an x_0-prediction for the same x_t, Eq. 12; x_0 itself at s = 0.

    x_s / alpha_s - alpha_t sigma_s^2 / (alpha_s^2 sigma_ts) eps
    """
    alpha_s, sigma_s = coefficients(s, x_s, p)
    alpha_ts, sigma_ts = kernel(like(s, x_s), like(t, x_s), p)
    # alpha_t / alpha_s is alpha_ts
    return x_s / alpha_s - alpha_ts * sigma_s**2 / (alpha_s * sigma_ts) * eps


def subinterval_matching(v: Tensor, x_s: Tensor, s, t, eps: Tensor, p: Process = flow) -> Tensor:
    """Eq. 11's regression with Eq. 13's weight, clamp(1 / sigma_ts^2, 0, 10), in its stable form.

    Both sides are multiplied by sigma_ts, so nothing is divided by it: finite at t = s.
    At s = 0 it is Eq. 4 times min(1, 10 sigma_t^2).
    """
    eps_weight, alpha_s, sigma_ts = _target_parts(x_s, s, t, p)
    error = sigma_ts * v - (eps_weight * eps - sigma_ts / alpha_s * x_s)
    return mean((1 / sigma_ts**2).clamp(0, 10) * error**2)


def biased_matching(v: Tensor, x_s: Tensor, s, t, eps: Tensor, p: Process = flow) -> Tensor:
    """The naive target eps - x_s of Fig. 2(c), with Eq. 13's weight: wrong unless s = 0."""
    sigma_ts = _target_parts(x_s, s, t, p)[2]
    return mean((1 / sigma_ts**2).clamp(0, 10) * (sigma_ts * (v - (eps - x_s))) ** 2)


def _target_parts(x_s: Tensor, s, t, p: Process) -> tuple[Tensor, Tensor, Tensor]:
    """(alpha_s^2 sigma_t + alpha_t sigma_s^2) / alpha_s^2, alpha_s, sigma_ts of Eqs. 11 and 13."""
    (alpha_s, sigma_s), (alpha_t, sigma_t) = coefficients(s, x_s, p), coefficients(t, x_s, p)
    sigma_ts = kernel(like(s, x_s), like(t, x_s), p)[1]
    return sigma_t + alpha_t * (sigma_s / alpha_s) ** 2, alpha_s, sigma_ts


# -- distribution matching -----------------------------------------------------------------------


def dmd_gradient(
    x_s: Tensor,
    x_t: Tensor,
    s,
    t,
    v_real: Tensor,
    v_fake: Tensor,
    weight="paper",
    p: Process = flow,
) -> Tensor:
    """Gradient of the reverse KL (Eq. 6) at time t with respect to x_s, Eq. 10; Eq. 7 at s = 0.

    w (v_real - v_fake), (B, ...); what that is for each weight:
    paper       alpha_ts (score_fake - score_real), w as printed in Eq. 10; grows like
                1 / sigma_t as t -> 0
    xs          estimate of x_s by the fake minus that by the teacher: the scores' difference
                times sigma_ts^2 / alpha_ts; bounded at both ends
    x0          the same of x_0; equals xs at s = 0
    normalised  xs over each sample's mean distance to the teacher's estimate of x_s, as in DMD
    one         v_real - v_fake
    """
    alpha_s, sigma_s = coefficients(s, x_s, p)
    alpha_t, sigma_t = coefficients(t, x_s, p)
    alpha_ts, sigma_ts = kernel(like(s, x_s), like(t, x_s), p)
    if weight == "paper":
        w = alpha_t * alpha_ts / (alpha_t * sigma_t + sigma_t**2)
    elif weight in ("xs", "normalised"):  # alpha_t / alpha_ts is alpha_s: no 0 / 0 at t = 1
        w = sigma_ts**2 * alpha_s / (alpha_t * sigma_t + sigma_t**2)
    elif weight == "x0":
        w = sigma_t / (alpha_t + sigma_t)
    elif weight == "one":
        w = torch.ones_like(sigma_t)
    else:
        raise ValueError(f"unknown weight {weight!r}; use paper, xs, x0, normalised or one")
    if weight == "normalised":
        x_0 = v_to_x0(x_t, t, v_real, p)
        x_s_real = alpha_s * x_0 + alpha_ts * (sigma_s / sigma_t) ** 2 * (x_t - alpha_t * x_0)
        distance = (x_s - x_s_real).abs().flatten(1).mean(1)  # (B,)
        w = w / like(distance.clamp(min=1e-6), x_s)
    return w * (v_real - v_fake)


def distribution_matching(x_s: Tensor, gradient: Tensor) -> Tensor:
    """Surrogate loss whose gradient with respect to x_s is `gradient` over the number of elements.

    Its value means nothing; the networks' outputs inside `gradient` are constants here.
    """
    return mean(x_s * gradient.detach())
