"""The exact distributions, the metrics computed from samples, and the user's points."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from models.common import UserError
from sde import coefficients, flow, score_to_v, vp
from toy import toy2d
from toy.mixtures import (
    TOYS,
    Mixture,
    energy,
    energy_distances,
    from_points,
    mean_distance,
    mode_coverage,
    mode_radius,
    read_points,
)
from train import make_config, phases_of

ring, grid = TOYS["ring"], TOYS["grid"]
every = pytest.mark.parametrize("p", [flow, vp], ids=["flow", "vp"])


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def log_density(mixture, x_t, t, c):
    """log p(x_t) (B,) by torch.distributions."""
    alpha_t, sigma_t = coefficients(t, x_t, mixture.process)
    sd = (alpha_t**2 * mixture.sd**2 + sigma_t**2) ** 0.5
    means = (alpha_t * mixture.means).expand(len(x_t), -1, -1)  # (B, M, d)
    in_class = torch.ones(means.shape[:2]) if c is None else mixture.labels == c["class"][:, None]
    modes = Independent(Normal(means, sd), 1)
    return MixtureSameFamily(Categorical(in_class.double()), modes).log_prob(x_t)


@every
@pytest.mark.parametrize("toy", TOYS)
@pytest.mark.parametrize("by_class", [False, True])
def test_score_and_velocity_are_those_of_the_density(p, toy, by_class):
    """The score is autograd's gradient of the log density, the velocity its image by Eq. 5."""
    mixture = TOYS[toy](p).double()
    labels = torch.randint(mixture.classes, (32,), generator=generator())
    c = {"class": labels} if by_class else None
    for t in (0.05, 0.5, 0.95):
        x_t = mixture.sample_at(t, 32, generator(1), c).requires_grad_()
        score = torch.autograd.grad(log_density(mixture, x_t, t, c).sum(), x_t)[0]
        torch.testing.assert_close(mixture.score(x_t, t, c), score)
        v, expected = mixture.velocity(x_t, t, c), score_to_v(x_t, t, score, p)
        torch.testing.assert_close(v, expected, rtol=1e-6, atol=1e-6)
        if t == 0.5:  # under another condition it is another
            other = None if by_class else {"class": torch.zeros(32, dtype=torch.long)}
            assert not torch.allclose(mixture.score(x_t, t, other), score, atol=1e-3)


@every
def test_the_velocity_is_finite_at_both_ends(p):
    for t in (0.0, 1.0):
        assert ring(p).velocity(torch.randn(8, 2, generator=generator()), t).isfinite().all()


def test_samples_are_of_their_class():
    c = {"class": torch.arange(5).repeat(20)}
    x = grid().sample(100, generator(), c)
    nearest = torch.cdist(x, grid().means).argmin(1)
    assert torch.equal(grid().labels[nearest], c["class"])


def test_energy_is_the_formula_and_sees_a_lost_mode():
    """Blocks and halves give what all pairs at once give; a lost mode is visible."""
    x, y = ring().sample(301, generator()), ring().sample(250, generator(1))
    between = torch.cdist(x, y).double().mean().item()
    within = [torch.cdist(z, z).double().sum().item() / (len(z) * (len(z) - 1)) for z in (x, y)]
    assert mean_distance(x, y) == pytest.approx(between, rel=1e-5)
    assert [mean_distance(z) for z in (x, y)] == pytest.approx(within, rel=1e-5)
    assert energy(x, y) == pytest.approx(2 * between - sum(within), abs=1e-5)
    expected = {"a": energy(x, y), "b": energy(x, y)}
    assert energy_distances({"a": (x, y), "b": (y, x)}) == pytest.approx(expected, abs=1e-6)
    a, b = ring().sample(10_000, generator(2)), ring().sample(10_000, generator(3))
    lost = b[torch.cdist(b, ring().means).argmin(1) != 0]
    assert abs(energy(a, b)) < 0.002 < 0.01 < energy(a, lost)


def test_exact_samples_are_inside_their_modes_in_any_dimension():
    """98.9 % of them. Control: within 3 sd, right in the plane, there are hardly any."""
    assert mode_radius(2) == pytest.approx(3, abs=1e-12)
    for d in (1, 2, 3, 16, 64):
        means = 20 * torch.eye(d)[:2] if d > 1 else torch.tensor([[0.0], [20.0]])
        mixture = Mixture(means, 1.0, torch.zeros(2, dtype=torch.long))
        x = mixture.sample(20_000, torch.Generator().manual_seed(d))
        assert mode_coverage(x, mixture)[1] == pytest.approx(0.989, abs=0.003)
    assert ((x - means[:1]).norm(dim=1) <= 3).double().mean() < 0.01


def test_mode_coverage_counts_modes_and_hits():
    exact = ring().sample(10_000, generator())
    number, precision, spread = mode_coverage(exact, ring())
    assert number == pytest.approx(8, abs=0.02)
    assert spread == pytest.approx(1, abs=0.01)
    assert precision == pytest.approx(1 - math.exp(-4.5), abs=0.005)
    single = exact[torch.cdist(exact, ring().means).argmin(1) == 3]
    assert mode_coverage(single, ring())[0] == pytest.approx(1)
    assert mode_coverage(torch.zeros(10, 2), ring())[:2] == (0.0, 0.0)


def test_spread_is_that_of_exact_samples_or_of_samples_shrunk_by_a_known_factor():
    """Around the centre of a mode's samples: a mode that is moved is not wider."""
    x = ring().sample(20_000, generator())
    centre = ring().means[torch.cdist(x, ring().means).argmin(1)]
    spread = lambda factor, move: mode_coverage(centre + factor * (x - centre) + move, ring())[2]
    # inside 3 sd, where 1 - e^-4.5 of the samples are, the sd is 0.9744 of that of all
    assert spread(1, 0) == pytest.approx(1, abs=0.01)
    assert spread(0.5, 0) == pytest.approx(0.5 / 0.9744, abs=0.005)
    assert spread(0.5, 0.05) == pytest.approx(0.5 / 0.9744, abs=0.005)


def test_a_report_compares_student_teacher_and_exact_samples(monkeypatch):
    """An exact student is at the floor in every phase; a wrong one is not."""
    monkeypatch.setattr(toy2d, "draw_picture", lambda *_: b"png")
    cfg = make_config(toy="ring", steps=20, phases=2, eval_samples=2000)
    phases, reports = phases_of(cfg), []
    roles = toy2d.roles_from(cfg, phases, "cpu", toy2d.make_network(cfg).state_dict())
    for velocity in (lambda x_t, t, c: x_t, toy2d.exact_teacher(cfg)):
        for role in roles.student.values():
            role.velocity = velocity
        reports.append(toy2d.report(cfg, phases, roles, 2, "cpu", Path(), finished=True)[0])
    bad, good = reports
    assert max(map(abs, good["energy_phases"])) < 0.01 < min(bad["energy_phases"])
    assert good["energy"] == good["energy_phases"][1] == good["energy_teacher_same_steps"]
    preview, _ = toy2d.report(cfg, phases, roles, 1, "cpu", Path(), finished=False)
    assert preview == {"energy_phases": good["energy_phases"][:1]}


@pytest.mark.parametrize("suffix", ["csv", "npy"])
def test_points_become_a_mixture_in_units_of_their_deviation(tmp_path, suffix):
    """Centred, one scale for all axes, both undone by `unit`; a line of names is allowed."""
    points, file = np.random.default_rng(0).normal(5, [1, 3], (100, 2)), tmp_path / f"p.{suffix}"
    if suffix == "npy":
        np.save(file, points)
    else:
        np.savetxt(file, points, delimiter=";", header="a;b", comments="")
    mixture = from_points(str(file))
    centre, scale = mixture.unit
    assert mixture.means.square().mean().item() == pytest.approx(1, abs=1e-5) and mixture.sd >= 0.05
    np.testing.assert_allclose(mixture.means.double() * scale + centre, points, atol=1e-5)


BAD_POINTS = {  # contents: part of the error
    "1,2\nx,y\n3,4\n": "line 2 is not 2 numbers",
    "1,2\nnan,4\n": "line 2",
    ",2\n3,4\n5,6\n": "line 1",
    '"1,5","2,5"\n3,4\n5,6\n': "line 1",
    "": "n >= 2",
    "0.1,0.7\n" * 3: "two different rows",
    "1e200,1\n2e200,3\n": "too large",
    "1,2\n3,4\n" * 1001: "more than 2000 rows",
}


@pytest.mark.parametrize("contents", BAD_POINTS, ids=BAD_POINTS.values())
def test_unusable_points_are_refused_in_one_line(tmp_path, contents):
    file = tmp_path / "p.csv"
    file.write_text(contents)
    with pytest.raises(UserError, match=BAD_POINTS[contents]) as error:
        from_points(str(file))
    assert "\n" not in str(error.value) and str(file) in str(error.value)


TABLES = {  # what a program writes: the bytes
    "decimal commas under names": b"x;y\r\n1,5;2,5\r\n-3,0;0,25\r\n",
    "Excel's byte order mark": b"\xef\xbb\xbf1.5,2.5\n-3,0.25\n",
    "pandas with its index": b",x,y\n0,1.5,2.5\n1,-3,0.25\n",
    "R": b'"","x","y"\n"1",1.5,2.5\n"2",-3,0.25\n',
    "tabs": b"\tx\ty\n0\t1.5\t2.5\n1\t-3\t0.25\n",
    "numpy": b"# x y\n1.5e+00 2.5e+00\n-3.0e+00  2.5e-01 \n",
    "names in Latin-1": b"gr\xf6\xdfe,y\n\n1.5,2.5\n-3,0.25\n",
}


@pytest.mark.parametrize("name", TABLES)
def test_tables_of_other_programs_are_the_same_points(tmp_path, name):
    """Never one number more or less per row. Names in Latin-1 are the negative control."""
    (tmp_path / "p.csv").write_bytes(TABLES[name])
    assert read_points(tmp_path / "p.csv").tolist() == [[1.5, 2.5], [-3, 0.25]]


def test_unusable_npy_files_are_refused_and_never_unpickled(tmp_path):
    np.save(tmp_path / "pickle.npy", np.array([print, 1], dtype=object), allow_pickle=True)
    np.save(tmp_path / "text.npy", np.array([["a"]]))
    np.save(tmp_path / "big.npy", np.zeros((3000, 2)))
    np.save(tmp_path / "flat.npy", np.float64(3))
    (tmp_path / "cut.npy").write_bytes((tmp_path / "big.npy").read_bytes()[:1000])
    np.savez(tmp_path / "z.npz", a=np.zeros((3, 2)))
    (tmp_path / "zip.npy").write_bytes((tmp_path / "z.npz").read_bytes())
    for name in ("pickle", "text", "big", "flat", "cut", "zip", "absent"):
        with pytest.raises(UserError):
            from_points(str(tmp_path / f"{name}.npy"))
