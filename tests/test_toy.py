"""Claims about the exact distributions, the numbers computed from samples, and users' points."""

import math

import numpy as np
import pytest
import torch

from models.files import UserError
from sde import flow, score_to_v, vp
from toy import mixtures
from toy.mixtures import TOYS, energy, from_points, grid, mean_distance, modes, ring

every = pytest.mark.parametrize("p", [flow, vp], ids=["flow", "vp"])


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@every
@pytest.mark.parametrize("toy", TOYS)
@pytest.mark.parametrize("by_class", [False, True])
def test_score_and_velocity_are_those_of_the_density(p, toy, by_class):
    """The score is autograd's gradient of log_density, the velocity its affine image by Eq. 5."""
    mixture = TOYS[toy](p).double()
    c = (
        {"class": torch.randint(mixture.classes, (32,), generator=generator())}
        if by_class
        else None
    )
    for t in (0.05, 0.5, 0.95):
        x_t = mixture.sample_at(t, 32, generator(1), c).requires_grad_()
        score = torch.autograd.grad(mixture.log_density(x_t, t, c).sum(), x_t)[0]
        torch.testing.assert_close(mixture.score(x_t, t, c), score)
        torch.testing.assert_close(
            mixture.velocity(x_t, t, c), score_to_v(x_t, t, score, p), rtol=1e-6, atol=1e-6
        )
        if t == 0.5:  # of another class it is another
            other = None if by_class else {"class": torch.zeros(32, dtype=torch.long)}
            assert not torch.allclose(mixture.score(x_t, t, other), score, atol=1e-3)


@every
def test_the_density_is_one_in_all_and_the_velocity_finite_at_both_ends(p):
    axis = torch.linspace(-6, 6, 401, dtype=torch.float64)
    x = torch.cartesian_prod(axis, axis)
    for c in (None, {"class": torch.ones(len(x), dtype=torch.long)}):
        total = ring(p).double().log_density(x, 0.4, c).exp().sum() * (axis[1] - axis[0]) ** 2
        assert total.item() == pytest.approx(1, abs=1e-3)
    for t in (0.0, 1.0):
        assert ring(p).velocity(torch.randn(8, 2, generator=generator()), t).isfinite().all()


def test_guidance_is_linear_in_its_scale():
    mixture, x = ring().double(), torch.randn(8, 2, generator=generator(), dtype=torch.float64)
    c = {"class": torch.arange(8) % 2}
    v, v_class = mixture.velocity(x, 0.5), mixture.velocity(x, 0.5, c)
    torch.testing.assert_close(mixture.guided(x, 0.5, c, 0.0), v)
    torch.testing.assert_close(mixture.guided(x, 0.5, c, 1.0), v_class)
    torch.testing.assert_close(mixture.guided(x, 0.5, c, 3.0), v + 3 * (v_class - v))


def test_samples_are_of_their_class():
    c = {"class": torch.arange(5).repeat(20)}
    x = grid().sample(100, generator(), c)
    nearest = torch.cdist(x, grid().means).argmin(1)
    assert torch.equal(grid().labels[nearest], c["class"])


def test_energy_is_the_formula_and_sees_a_lost_mode():
    """Blocks give what all pairs at once give; equal laws give about 0; 7 of 8 modes do not."""
    x, y = ring().sample(301, generator()), ring().sample(250, generator(1))
    assert mean_distance(x, y) == pytest.approx(torch.cdist(x, y).double().mean().item(), rel=1e-5)
    off = lambda a: torch.cdist(a, a).double().sum().item() / (len(a) * (len(a) - 1))
    assert energy(x, y) == pytest.approx(
        2 * torch.cdist(x, y).double().mean().item() - off(x) - off(y), abs=1e-5
    )
    a, b = ring().sample(10_000, generator(2)), ring().sample(10_000, generator(3))
    lost = b[torch.cdist(b, ring().means).argmin(1) != 0]
    assert abs(energy(a, b)) < 0.002 < 0.01 < energy(a, lost)


def test_modes_and_precision_count_what_they_say():
    exact = ring().sample(10_000, generator())
    number, precision = modes(exact, ring())
    assert number == pytest.approx(8, abs=0.02) and precision == pytest.approx(
        1 - math.exp(-4.5), abs=0.005
    )
    one = exact[torch.cdist(exact, ring().means).argmin(1) == 3]
    assert modes(one, ring())[0] == pytest.approx(1)
    assert modes(torch.zeros(10, 2), ring()) == (0.0, 0.0)


@pytest.mark.parametrize("suffix", ["csv", "npy"])
def test_points_become_a_mixture_in_the_unit_of_their_deviation(tmp_path, suffix):
    """Centred, one scale for all axes, both undone by `unit`; a header line is allowed."""
    points, file = np.random.default_rng(0).normal(5, [1, 3], (100, 2)), tmp_path / f"p.{suffix}"
    np.save(file, points) if suffix == "npy" else np.savetxt(
        file, points, delimiter=",", header="a,b", comments=""
    )
    mixture = from_points(str(file))
    centre, scale = mixture.unit
    assert mixture.means.square().mean().item() == pytest.approx(1, abs=1e-5) and mixture.sd >= 0.05
    np.testing.assert_allclose(mixture.means.double() * scale + centre, points, atol=1e-5)
    assert from_points(str(file), 0.3).sd == 0.3


BAD_POINTS = {
    "text": "1,2\nx,y\n3,4\n",
    "ragged": "1,2\n3\n",
    "nan": "1,2\nnan,4\n",
    "one": "1,2\n",
    "empty": "",
    "same": "1,2\n1,2\n",
    "same fractions": "0.1,0.7\n" * 3,
    "huge": "1e200,1\n2e200,3\n",
    "a typo above": "1,x\n2,3\n4,5\n",
    "many": "1,2\n3,4\n" * 5_000_000,
}


@pytest.mark.parametrize("kind", BAD_POINTS)
def test_points_that_cannot_serve_are_refused_in_one_line(tmp_path, kind):
    file = tmp_path / "p.csv"
    file.write_text(BAD_POINTS[kind])
    with pytest.raises(UserError) as caught:
        from_points(str(file))
    assert "\n" not in str(caught.value) and str(file) in str(caught.value)


def test_npy_files_that_cannot_serve_are_refused_and_never_unpickled(tmp_path):
    for name, array in {
        "pickle": np.array([print, 1], dtype=object),
        "text": np.array([["a"]]),
        "big": np.zeros((3000, 2)),
    }.items():
        np.save(tmp_path / f"{name}.npy", array, allow_pickle=True)
        with pytest.raises(UserError):
            from_points(str(tmp_path / f"{name}.npy"))
    np.save(tmp_path / "flat.npy", np.float64(3))
    np.savez(tmp_path / "z.npz", a=np.zeros((3, 2)))
    (tmp_path / "zip.npy").write_bytes((tmp_path / "z.npz").read_bytes())
    (tmp_path / "badzip.npy").write_bytes((tmp_path / "z.npz").read_bytes()[:99])
    (tmp_path / "cut.npy").write_bytes((tmp_path / "big.npy").read_bytes()[:1000])
    for name in ("cut.npy", "absent.csv", "flat.npy", "zip.npy", "badzip.npy"):
        with pytest.raises(UserError):
            from_points(str(tmp_path / name))
    assert mixtures.MAX_POINTS == 2000
