"""The paper's objectives, as pure functions of what the networks returned.

Two losses alternate. Score matching teaches the fake network the distribution of the student's
samples. Distribution matching moves the samples from where the fake says they are to where the
teacher says they should be. In a phase that ends at s > 0 no clean sample x_0 exists, only x_s, so
both are written in terms of x_s. At s = 0 the target and the gradient become those of DMD; Eq. 13
keeps its weight.

Every loss returns one number per sample, (B,): the mean over its elements.
"""

from torch import Tensor

from sde import Process, coefficients, expand_like, flow, transition, v_to_x0


def mean_per_sample(x: Tensor) -> Tensor:
    """Mean over the elements of each sample: (B, ...) -> (B,)."""
    return x.flatten(1).mean(1)


# -- score matching: what the fake learns ---------------------------------------------------------


def flow_matching(v: Tensor, x_0: Tensor, eps: Tensor) -> Tensor:
    """|| v - (eps - x_0) ||^2, Eq. 4, with v predicted at x_t = alpha_t x_0 + sigma_t eps."""
    return mean_per_sample((v - (eps - x_0)) ** 2)


def scaled_target(x_s: Tensor, s: float, t: Tensor, eps: Tensor, process: Process = flow) -> tuple:
    """sigma_ts times the target of Eq. 11, and sigma_ts. Nothing is divided by sigma_ts.

    (alpha_s^2 sigma_t + alpha_t sigma_s^2) / alpha_s^2 eps - sigma_ts / alpha_s x_s
    """
    alpha_s, sigma_s = coefficients(s, x_s, process)
    alpha_t, sigma_t = coefficients(t, x_s, process)
    _, sigma_ts = transition(s, t, x_s, process)
    return (sigma_t + alpha_t * (sigma_s / alpha_s) ** 2) * eps - sigma_ts / alpha_s * x_s, sigma_ts


def v_target(x_s: Tensor, s: float, t: Tensor, eps: Tensor, process: Process = flow) -> Tensor:
    """The unbiased target of v at x_t = alpha_ts x_s + sigma_ts eps, Eq. 11.

    (alpha_s^2 sigma_t + alpha_t sigma_s^2) / (alpha_s^2 sigma_ts) eps - x_s / alpha_s

    Denoising score matching holds for the kernel p(x_t | x_s) as for p(x_t | x_0): the mean of
    -eps / sigma_ts given x_t is the score of p(x_t). Eq. 5 turns this score into a velocity, and
    x_t = alpha_ts x_s + sigma_ts eps gives the form above. At s = 0 (alpha_s = 1, sigma_s = 0) it
    is eps - x_0; at t = 1, where Eq. 5 is undefined, eps - x_s / alpha_s. For s > 0 its variance
    grows like 1 / sigma_ts^2 as t -> s.
    """
    scaled, sigma_ts = scaled_target(x_s, s, t, eps, process)
    return scaled / sigma_ts


def x0_target(x_s: Tensor, s: float, t: Tensor, eps: Tensor, process: Process = flow) -> Tensor:
    """The unbiased target of a network that predicts x_0, Eq. 12; x_0 itself at s = 0.

    x_s / alpha_s - alpha_t sigma_s^2 / (alpha_s^2 sigma_ts) eps. Ours predict v: not used here.
    """
    alpha_s, sigma_s = coefficients(s, x_s, process)
    alpha_ts, sigma_ts = transition(s, t, x_s, process)
    return x_s / alpha_s - alpha_ts * sigma_s**2 / (alpha_s * sigma_ts) * eps


def subinterval_matching(
    v: Tensor, x_s: Tensor, s: float, t: Tensor, eps: Tensor, process: Process = flow
) -> Tensor:
    """The fake's loss: clamp(1 / sigma_ts^2, 0, 10) || sigma_ts v - sigma_ts target ||^2, Eq. 13.

    In total (v - target)^2 has the weight min(1, 10 sigma_ts^2): the plain regression, with less
    weight where sigma_ts < 0.316 and the target is mostly noise. Finite at t = s. In phase 1 of
    the paper (s = 0.833) the clamp never acts, for the margin of phases.py keeps sigma_ts above;
    at s = 0 it acts below t = 0.316.
    """
    scaled, sigma_ts = scaled_target(x_s, s, t, eps, process)
    return mean_per_sample((1 / sigma_ts**2).clamp(0, 10) * (sigma_ts * v - scaled) ** 2)


def naive_matching(
    v: Tensor, x_s: Tensor, s: float, t: Tensor, eps: Tensor, process: Process = flow
) -> Tensor:
    """The same loss with the target eps - x_s, as if x_s were clean: the target of Fig. 2(c).

    A control, with the weight of Eq. 13, which the paper's figure does not have.
    Biased for s > 0: its minimiser multiplies x_t by alpha_s times the right coefficient (1/6 of
    it at s = 0.833).
    """
    _, sigma_ts = transition(s, t, x_s, process)
    return mean_per_sample((10 * sigma_ts**2).clamp(max=1) * (v - (eps - x_s)) ** 2)


# -- distribution matching: what the student learns -----------------------------------------------


def dmd_gradient(
    x_s: Tensor,
    x_t: Tensor,
    s: float,
    t: Tensor,
    v_real: Tensor,
    v_fake: Tensor,
    weight: str = "paper",
    process: Process = flow,
) -> Tensor:
    """Gradient (B, ...) of the reverse KL (Eq. 6) at time t with respect to x_s, Eq. 10.

    w (v_real - v_fake), with the weight w:
    paper       alpha_t alpha_ts / (alpha_t sigma_t + sigma_t^2), Eq. 10; Eq. 7 at s = 0. It is
                alpha_ts (score_fake - score_real): Eq. 5 turns the difference of velocities into
                one of scores, and alpha_ts = dx_t / dx_s is the chain rule. It grows like
                1 / sigma_t as t -> 0.
    xs          estimate of x_s by the fake minus that by the teacher: the difference of scores
                times sigma_ts^2 / alpha_ts; bounded at both ends
    normalised  xs over each sample's mean distance to the teacher's estimate of x_s, as in DMD
    none        v_real - v_fake
    """
    alpha_s, sigma_s = coefficients(s, x_s, process)
    alpha_t, sigma_t = coefficients(t, x_s, process)
    alpha_ts, sigma_ts = transition(s, t, x_s, process)
    if weight == "none":
        w = 1.0
    elif weight == "paper":
        w = alpha_t * alpha_ts / (alpha_t * sigma_t + sigma_t**2)
    elif weight in ("xs", "normalised"):
        # w of `paper` times sigma_ts^2 / alpha_ts^2, with alpha_s for alpha_t / alpha_ts (0/0 at 1)
        w = sigma_ts**2 * alpha_s / (alpha_t * sigma_t + sigma_t**2)
    else:
        raise ValueError(f"weight: expected paper, xs, normalised or none, got {weight!r}")
    if weight == "normalised":
        x_0 = v_to_x0(x_t, t, v_real, process)
        # E[x_s | x_t] of the teacher
        x_s_real = alpha_s * x_0 + alpha_ts * (sigma_s / sigma_t) ** 2 * (x_t - alpha_t * x_0)
        distance = mean_per_sample((x_s - x_s_real).abs())  # (B,)
        w = w / expand_like(distance.clamp(min=1e-6), x_s)
    return w * (v_real - v_fake)


def dmd_loss(x_s: Tensor, gradient: Tensor) -> Tensor:
    """Surrogate loss (B,) whose gradient with respect to x_s is `gradient` / number of elements.

    AdamW ignores that factor as long as its eps is far below the gradients (models/adamw.py). The
    loss's value means nothing. The gradient is detached: only x_s depends on the student, so the
    networks inside `gradient` need no graph.
    """
    return mean_per_sample(x_s * gradient.detach())
