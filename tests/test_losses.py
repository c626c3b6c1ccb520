"""Claims about losses.py. Every score here is exact: nothing is trained."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import losses
from sde import coefficients, diffuse, flow, score_to_v, transition, v_to_x0, vp
from toy.mixtures import Mixture, ring

both = pytest.mark.parametrize("p", [flow, vp], ids=["flow", "vp"])
PAIRS = [(0.0, 0.3), (0.0, 0.9), (0.2, 0.25), (0.5, 0.6), (0.5, 0.99), (0.8333, 0.9), (0.9, 0.95)]


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def posterior(mixture, x_t, s, t, p):
    """Exact E[x_s | x_t] and E[eps | x_t] by Tweedie's formula from the exact score of p(x_t)."""
    alpha_ts, sigma_ts = transition(s, t, torch.zeros(1), p)
    score = mixture.score(x_t, t)
    return (x_t + sigma_ts**2 * score) / alpha_ts, -sigma_ts * score


@both
@pytest.mark.parametrize("s,t", PAIRS)
def test_eq_11_and_eq_12_are_unbiased_and_the_naive_target_is_not(p, s, t):
    """Both targets are linear in (x_s, eps), so their mean given x_t is the target of the means."""
    means = ring().means.double() + 1  # off centre: bias shows at high t
    mixture = replace(ring(p).double(), means=means)
    x_t = mixture.sample_at(t, 64, torch.Generator().manual_seed(0))
    x_s, eps = posterior(mixture, x_t, s, t, p)
    v, x_0 = mixture.velocity(x_t, t), mixture.denoise(x_t, t)[0]
    torch.testing.assert_close(losses.v_target(x_s, s, t, eps, p), v, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(losses.x0_target(x_s, s, t, eps, p), x_0, rtol=1e-8, atol=1e-8)
    naive = (eps - x_s - v).abs().mean()
    assert naive < 1e-8 if s == 0 else naive > 0.05


@both
@pytest.mark.parametrize("s,t", PAIRS)
def test_eq_13_is_eq_11_with_its_weight(p, s, t):
    """The stable form is clamp(1 / sigma_ts^2, 0, 10) sigma_ts^2 || v - target ||^2."""
    x_s, eps, v = normal(8, 2), normal(8, 2, seed=1), normal(8, 2, seed=2)
    _, sigma_ts = transition(s, t, torch.zeros(1), p)
    weight = min(1, 10 * sigma_ts.item() ** 2)
    expected = weight * losses.mean_per_sample((v - losses.v_target(x_s, s, t, eps, p)) ** 2)
    torch.testing.assert_close(losses.subinterval_matching(v, x_s, s, t, eps, p), expected)


@both
def test_at_s_0_eq_13_is_eq_4_with_weight_min_1_10_sigma_squared(p):
    x_0, eps, v = normal(1, 2), normal(1, 2, seed=1), normal(1, 2, seed=2)
    torch.testing.assert_close(losses.v_target(x_0, 0.0, 0.3, eps, p), eps - x_0)
    for t in (0.05, 0.2, 0.4, 1.0):
        t = torch.tensor([t], dtype=torch.float64)
        expected = min(1, 10 * p.sigma(t).item() ** 2) * losses.flow_matching(v, x_0, eps)
        for loss in (losses.subinterval_matching, losses.naive_matching):
            torch.testing.assert_close(loss(v, x_0, 0.0, t, eps, p), expected)


@both
def test_every_loss_is_finite_at_both_ends_of_its_interval(p):
    """At t = s the target of Eq. 11 is infinite; Eq. 13 is not, nor are the other weights."""
    x_s, eps, v = normal(2, 3), normal(2, 3, seed=1), normal(2, 3, seed=2)
    for s in (0.0, 0.5):
        t = torch.tensor([s, 1.0], dtype=torch.float64)
        assert losses.subinterval_matching(v, x_s, s, t, eps, p).isfinite().all()
        assert s == 0 or not losses.v_target(x_s, s, t, eps, p).isfinite().all()
        t = torch.tensor([s + 1e-6, 1.0], dtype=torch.float64)
        for weight in ("paper", "xs", "normalised", "none"):
            x_t = diffuse(x_s, s, t, eps, p)
            assert losses.dmd_gradient(x_s, x_t, s, t, v, v + 1, weight, p).isfinite().all()


def test_the_surrogate_has_the_gradient_it_is_given_and_no_other():
    """d loss / d x_s is `gradient` over the number of elements; nothing flows into `gradient`."""
    x_s, v_real = normal(4, 3, 2).requires_grad_(), normal(4, 3, 2, seed=1).requires_grad_()
    gradient = v_real - 2.0
    losses.dmd_loss(x_s, gradient).mean().backward()
    torch.testing.assert_close(x_s.grad * x_s.numel(), gradient)
    assert v_real.grad is None


@both
@pytest.mark.parametrize("s", [0.0, 0.5])
def test_eq_10_is_the_difference_of_scores_times_dx_t_dx_s(p, s):
    """Fake minus real: with the sign turned, or without alpha_ts inside a phase, it is another."""
    x_s, t = normal(16, 2), torch.linspace(s + 0.05, 0.99, 16, dtype=torch.float64)
    x_t = diffuse(x_s, s, t, normal(16, 2, seed=1), p)
    real, fake = ring(p).double(), normal(16, 2, seed=2)
    alpha_ts, _ = transition(s, t, x_t, p)
    v_real, v_fake = real.velocity(x_t, t), score_to_v(x_t, t, fake, p)
    expected = alpha_ts * (fake - real.score(x_t, t))
    gradient = losses.dmd_gradient(x_s, x_t, s, t, v_real, v_fake, "paper", p)
    torch.testing.assert_close(gradient, expected)
    assert (gradient - expected / alpha_ts).abs().mean() > 0.05


@both
@pytest.mark.parametrize("s", [0.0, 0.5])
def test_the_other_weights_are_differences_of_estimates(p, s):
    """xs is the difference of E[x_s | x_t] (Tweedie with each score); normalised divides it."""
    x_s, t = normal(16, 2), torch.linspace(s + 0.05, 0.99, 16, dtype=torch.float64)
    x_t = diffuse(x_s, s, t, normal(16, 2, seed=1), p)
    v_real, v_fake = normal(16, 2, seed=3), normal(16, 2, seed=4)
    (alpha_ts, _), (alpha_t, sigma_t) = transition(s, t, x_t, p), coefficients(t, x_t, p)

    def estimate(v):  # the formula of E[x_s | x_t] that goes through x_0
        x_0, (alpha_s, sigma_s) = v_to_x0(x_t, t, v, p), coefficients(s, x_t, p)
        return alpha_s * x_0 + alpha_ts * sigma_s**2 / sigma_t**2 * (x_t - alpha_t * x_0)

    def gradient(weight):
        return losses.dmd_gradient(x_s, x_t, s, t, v_real, v_fake, weight, p)

    torch.testing.assert_close(gradient("xs"), estimate(v_fake) - estimate(v_real))
    distance = (x_s - estimate(v_real)).abs().mean(1, keepdim=True)
    torch.testing.assert_close(gradient("normalised"), gradient("xs") / distance)
    torch.testing.assert_close(gradient("none"), v_real - v_fake)
    x_0 = v_to_x0(x_t, t, v_fake, p) - v_to_x0(x_t, t, v_real, p)
    assert torch.allclose(gradient("xs"), x_0) == (s == 0)  # control: another estimate inside
    with pytest.raises(ValueError, match="weight: expected"):
        gradient("tow")


def student_gradient(a, b, s, t, real, p, sign=1.0):
    """Eq. 10's gradient for the student x_s = a + b z, averaged exactly by Gauss-Hermite nodes."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(12)
    z, eps = (torch.tensor(g.ravel())[:, None] for g in np.meshgrid(nodes, nodes))
    w = torch.tensor(np.outer(weights, weights).ravel() / weights.sum() ** 2)[:, None]
    x_s = a + b * z
    x_t, (alpha_ts, sigma_ts) = diffuse(x_s, s, t, eps, p), transition(s, t, torch.zeros(1), p)
    score = -(x_t - alpha_ts * a) / (alpha_ts**2 * b**2 + sigma_ts**2)  # the student's own, exact
    v_fake = score_to_v(x_t, t, score, p)
    g = sign * losses.dmd_gradient(x_s, x_t, s, t, real.velocity(x_t, t), v_fake, "paper", p)
    return g, (w * g).sum(), (w * g * z).sum()


def kl(a, b, s, t, real, p):
    """KL between the student's and the data's Gaussians at time t, in closed form."""
    alpha_ts, sigma_ts = transition(s, t, torch.zeros(1), p)
    alpha_t, sigma_t = coefficients(t, real.means, p)
    m, var = alpha_ts * a, alpha_ts**2 * b**2 + sigma_ts**2
    m_real, var_real = alpha_t * real.means[0, 0], alpha_t**2 * real.sd**2 + sigma_t**2
    return 0.5 * ((var_real / var).log() + (var + (m - m_real) ** 2) / var_real - 1)


@both
@pytest.mark.parametrize("s,t", [(0.0, 0.1), (0.0, 0.7), (0.5, 0.55), (0.5, 0.9)])
def test_the_students_gradient_is_that_of_the_reverse_kl(p, s, t):
    """Against autograd through the closed form, for mean and deviation; the wrong sign ascends."""
    real = Mixture(torch.tensor([[1.0]]).double(), 0.5, torch.zeros(1, dtype=torch.long), p)
    t = torch.tensor(t, dtype=torch.float64)
    a, b = (torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (-0.3, 0.8))
    expected = torch.autograd.grad(kl(a, b, s, t, real, p).sum(), (a, b))
    with torch.no_grad():
        _, *gradients = student_gradient(a, b, s, t, real, p)
        _, *wrong_sign = student_gradient(a, b, s, t, real, p, sign=-1.0)
    torch.testing.assert_close(tuple(gradients), expected)
    assert not torch.allclose(wrong_sign[0], expected[0])


@both
@pytest.mark.parametrize("s,t", [(0.0, 0.1), (0.5, 0.55), (0.5, 0.9)])
def test_a_matched_student_stays_put(p, s, t):
    """The student's samples follow p(x_s) of the data: every gradient is zero to rounding."""
    real = Mixture(torch.tensor([[1.0]]).double(), 0.5, torch.zeros(1, dtype=torch.long), p)
    alpha_s, sigma_s = coefficients(torch.tensor(s, dtype=torch.float64), real.means, p)
    a, b = alpha_s * 1.0, (alpha_s**2 * 0.25 + sigma_s**2).sqrt()
    t = torch.tensor(t, dtype=torch.float64)
    assert student_gradient(a, b, s, t, real, p)[0].abs().max() < 1e-9
    assert student_gradient(a, 1.1 * b, s, t, real, p)[0].abs().max() > 1e-3


def test_what_each_fake_makes_stationary():
    """Two depths, exact fakes: the gradient's RMS at samples of each depth, at t = 0.5.

    First the deepest depth, which users draw, is the data, and the shallow one has half of the
    modes. Only a fake that sees both moves the deepest away from the data. Then each depth has the
    other half, and both together are the data: for that fake, all is well.
    """
    data = ring().double()
    modes = lambda rows: replace(data, means=data.means[rows])
    left, right, everywhere = [0, 1, 2, 3], [4, 5, 6, 7], [*range(8)]

    def gradients(deep, shallow):
        """RMS at the deep and at the shallow samples, for each fake."""
        together = modes(deep * (8 // len(deep)) + shallow * (8 // len(shallow)))
        fakes = {
            "complete": (modes(deep), modes(deep)),
            "truncated": (together, together),
            "per-depth": (modes(deep), modes(shallow)),
        }
        for name, pair in fakes.items():
            rms = []
            for rows, fake in zip((deep, shallow), pair, strict=True):
                x_s = modes(rows).sample(2000, torch.Generator().manual_seed(0))
                x_t = diffuse(x_s, 0.0, 0.5, normal(2000, 2))
                v_real, v_fake = data.velocity(x_t, 0.5), fake.velocity(x_t, 0.5)
                gradient = losses.dmd_gradient(x_s, x_t, 0.0, 0.5, v_real, v_fake, "xs")
                rms.append(gradient.square().mean().sqrt().item())
            yield name, rms

    found = dict(gradients(everywhere, left))
    assert max(found["complete"]) < 1e-9  # nothing moves the shallow depth, which nobody draws
    assert found["per-depth"][0] < 1e-9 < 0.1 < found["per-depth"][1]
    assert min(found["truncated"]) > 0.1
    found = dict(gradients(left, right))
    assert max(found["truncated"]) < 1e-9  # although users would draw half of the modes
    assert min(found["complete"]) > 0.1 and min(found["per-depth"]) > 0.1
