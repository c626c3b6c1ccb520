"""Claims about sde.py, under the flow and under a process where alpha + sigma is not 1."""

import math

import pytest
import torch

from sde import (
    coefficients,
    diffuse,
    flow,
    score_to_v,
    shift_time,
    step,
    transition,
    unshift_time,
    v_to_eps,
    v_to_score,
    v_to_x0,
    vp,
)
from toy.mixtures import Mixture

both = pytest.mark.parametrize("p", [flow, vp], ids=["flow", "vp"])
T = torch.linspace(0.01, 0.99, 50, dtype=torch.float64)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@both
def test_velocity_is_the_difference_of_noise_and_data_and_gives_both_back(p):
    """Conversions round-trip in float64; with the flow's formula vp would fail."""
    x_0, eps = normal(50, 3), normal(50, 3, seed=1)
    x_t = diffuse(x_0, 0.0, T, eps, p)
    v = eps - x_0
    torch.testing.assert_close(v_to_x0(x_t, T, v, p), x_0, rtol=0, atol=1e-12)
    torch.testing.assert_close(v_to_eps(x_t, T, v, p), eps, rtol=0, atol=1e-12)
    score = v_to_score(x_t, T, v, p)
    torch.testing.assert_close(score_to_v(x_t, T, score, p), v, rtol=0, atol=1e-9)
    assert (v_to_x0(x_t, T, v, flow) - x_0).abs().max() > (0.1 if p is vp else -1)


@both
def test_both_ends_are_finite(p):
    """t = 1 has alpha = 0 exactly, t = 0 has sigma = 0, and t = s has sigma_ts = 0."""
    x, v = normal(2, 3), normal(2, 3, seed=1)
    ends = torch.tensor([0.0, 1.0])
    assert p.alpha(ends)[1] == 0 and p.sigma(ends)[0] == 0
    for made in (v_to_x0(x, ends, v, p), v_to_eps(x, ends, v, p), step(x, 1.0, 0.0, v, p)):
        assert made.isfinite().all()
    for s in (0.0, 0.5, 0.98):
        t = torch.tensor([s, 1.0], dtype=torch.float64)
        alpha_ts, sigma_ts = transition(s, t, torch.zeros(2), p)
        assert alpha_ts.tolist() == [1, 0] and sigma_ts.tolist() == pytest.approx([0, 1])


@both
def test_going_by_way_of_s_changes_no_distribution(p):
    """0 -> s -> t has the mean and the variance of 0 -> t, Eq. 3; adding sigmas would not."""
    for s in (0.1, 0.5, 0.9):
        t = torch.linspace(s, 1, 20, dtype=torch.float64)
        alpha_s, sigma_s = coefficients(torch.tensor(s, dtype=torch.float64), normal(1), p)
        alpha_ts, sigma_ts = transition(s, t, t, p)
        torch.testing.assert_close(alpha_ts * alpha_s, p.alpha(t))
        torch.testing.assert_close(alpha_ts**2 * sigma_s**2 + sigma_ts**2, p.sigma(t) ** 2)
        naive = p.sigma(t) - alpha_ts * sigma_s
        assert ((alpha_ts * sigma_s) ** 2 + naive**2 - p.sigma(t) ** 2).abs().max() > 0.01


@both
def test_one_step_with_the_exact_velocity_is_exact_for_a_point(p):
    """Data in one point: x moves along alpha_t x_0 + sigma_t eps itself, whatever the step."""
    mean = torch.tensor([[2.0, -1.0]], dtype=torch.float64)
    point = Mixture(mean, 0.0, torch.zeros(1, dtype=torch.long), p)
    eps = normal(5, 2)
    x_t = diffuse(point.means.expand(5, 2), 0.0, 0.9, eps, p)
    expected = diffuse(point.means.expand(5, 2), 0.0, 0.2, eps, p)
    v = point.velocity(x_t, 0.9)
    torch.testing.assert_close(step(x_t, 0.9, 0.2, v, p), expected)
    euler = x_t + (0.2 - 0.9) * v
    assert p is flow or (euler - expected).abs().max() > 0.01


@both
def test_the_solver_converges_to_the_exact_flow(p):
    """Gaussian data: the exact flow scales deviations; the solver's error halves with its step."""
    mu, sd = torch.tensor([[1.5]], dtype=torch.float64), 0.3
    gauss = Mixture(mu, sd, torch.zeros(1, dtype=torch.long), p)
    x = normal(200, 1)

    def deviation(t):
        alpha_t, sigma_t = coefficients(torch.tensor(t, dtype=torch.float64), mu, p)
        return (alpha_t**2 * sd**2 + sigma_t**2).sqrt(), alpha_t * mu

    (sd_1, m_1), (sd_0, m_0) = deviation(0.95), deviation(0.05)
    exact, errors = m_0 + (x - m_1) * sd_0 / sd_1, []
    for n in (50, 100):
        y = x
        for i in range(n):
            t, t_next = 0.95 - 0.9 * i / n, 0.95 - 0.9 * (i + 1) / n
            y = step(y, t, t_next, gauss.velocity(y, t), p)
        errors.append((y - exact).abs().mean().item())
    assert errors[0] < 0.05 and errors[0] / errors[1] == pytest.approx(2, rel=0.1)


def test_the_shift_is_the_papers_and_has_an_inverse():
    """Shift 5 sends .75, .5, .25 to .9375, .8333, .625; twice is a shift of 25."""
    times = [shift_time(u, 5) for u in (1, 0.75, 0.5, 0.25, 0)]
    assert times == pytest.approx([1, 0.9375, 5 / 6, 0.625, 0])
    assert [unshift_time(shift_time(u, 5), 5) for u in (1, 0.3, 0)] == pytest.approx([1, 0.3, 0])
    twice = shift_time(shift_time(0.3, 5), 5)
    assert twice == pytest.approx(shift_time(0.3, 25)) != shift_time(0.3, 5)
    assert math.isclose(shift_time(0.3, 1), 0.3)
