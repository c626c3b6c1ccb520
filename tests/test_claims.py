"""Claims about toy/claims.py: the statistics, the methods that settings cannot say, the cells."""

import random
from dataclasses import replace

import pytest
import torch

import train
from models.files import UserError, read_json
from toy import claims, methods
from toy.methods import Budget, Row
from toy.verdicts import Part, holm, interval, mark, t_cdf, t_quantile, verdicts

SMALL = Budget(updates=8, warmup=4, samples=400, fit=20, matching=5)


# -- the machinery of verdicts -------------------------------------------------------------------


@pytest.mark.parametrize("df,quantile", [(1, 12.7062), (2, 4.30265), (9, 2.26216), (30, 2.04227)])
def test_quantiles_are_those_of_the_tables(df, quantile):
    assert t_quantile(0.975, df) == pytest.approx(quantile, rel=1e-5)
    assert t_cdf(-quantile, df) == pytest.approx(0.025, rel=1e-4)


def normals(seed, mean=0.0, n=10):
    source = random.Random(seed)
    return [source.gauss(mean, 1) for _ in range(n)]


def test_identical_methods_are_undecided_and_a_planted_difference_is_found():
    """Nine claims at once, twenty times: 18 of 20 without any verdict; then one of them is true."""
    quiet, found = 0, 0
    for repetition in range(20):
        claims_of_nothing = [[Part("", normals(100 * repetition + i), 0.0)] for i in range(9)]
        quiet += verdicts(claims_of_nothing) == ["undecided"] * 9
        planted = [[Part("", normals(100 * repetition + 50, mean=3), 1.0)], *claims_of_nothing[1:]]
        found += verdicts(planted)[0] == "reproduced"
    assert quiet >= 18 and found >= 18


def test_without_correction_nine_claims_of_nothing_would_often_find_something():
    """Negative control of the one above: each claim by itself, at 5 %."""
    alone = [
        any(verdicts([[Part("", normals(100 * r + i), 0.0)]]) != ["undecided"] for i in range(9))
        for r in range(20)
    ]
    assert sum(alone) >= 4


def test_the_other_direction_is_a_contradiction_and_a_small_difference_is_neither():
    far, near = normals(1, mean=-5), [x / 100 + 0.3 for x in normals(2)]
    assert verdicts([[Part("", far, 1.0)]]) == ["contradicted"]
    assert verdicts([[Part("", near, 1.0)]]) == ["undecided"]
    assert mark(Part("", near, 1.0)) == "no difference that matters"
    assert verdicts([[Part("", near, 0.1)]]) == ["reproduced"]


def test_a_claim_needs_all_its_parts_and_falls_with_one():
    yes, unclear, no = (Part("", normals(3, mean), 1.0) for mean in (5, 1, -5))
    assert verdicts([[yes, yes]]) == ["reproduced"]
    assert verdicts([[yes, unclear]]) == ["undecided"]
    assert verdicts([[yes, no]]) == ["contradicted"]


def test_holm_by_hand():
    """0.04 would be rejected alone; the second smallest of four has to be below 0.05 / 3."""
    assert holm([0.04, 0.01, 0.03, 0.02]) == [False, True, False, False]
    assert holm([0.04, 0.01, 0.02, 0.015]) == [True] * 4


def test_counted_numbers_have_an_interval_of_a_point():
    assert interval([2.0] * 5) == (2.0, 2.0, 2.0)
    assert verdicts([[Part("", [2.0] * 5, 1.0)]]) == ["reproduced"]
    assert verdicts([[Part("", [1.0] * 5, 1.0)]]) == ["undecided"]


# -- methods -------------------------------------------------------------------------------------


def started(variant, **settings):
    """A run's student and all of its iterations."""
    cfg = methods.config("ring", Row(dict(phases=2) | settings), 0, 1e-3, SMALL)
    start = methods.start_of("ring", "off", SMALL.fit)
    return methods.training(cfg, variant, start)


def role_of(run, role):
    return {name: p.detach().clone() for name, p in run.roles.parameters_of(role).items()}


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


def test_a_row_is_the_run_of_train(tmp_path):
    """To the bit: the same energy from train.py's own command."""
    cell = methods.row("ring", "Phased 4 / 2", 3, 1e-3, replace_fit(SMALL, 1500))
    flags = "--seed 3 --iters 4 --warmup 2 --eval-samples 400".split()
    assert train.main([*flags, "--out", str(tmp_path)]) == 0
    metrics = read_json(tmp_path / "metrics.json", "")
    assert cell["energy"] == metrics["energy"]
    assert (
        methods.row("ring", "DMD2", 3, 1e-3, replace_fit(SMALL, 1500))["energy"] != cell["energy"]
    )


def replace_fit(budget, steps):
    return budget._replace(fit=steps)


def test_every_row_asks_for_as_many_updates():
    """Fakes and generators see as many samples in each; the rows differ in their rollouts."""
    asked = {name: methods.row("ring", name, 0, 1e-3, SMALL) for name in methods.ROWS}
    assert {cell["evaluations"]["teacher"] for cell in asked.values()} == {8 * 256}
    assert {cell["evaluations"]["fake"] for cell in asked.values()} == {(8 * 6 + 4) * 256}
    assert {cell["parameters"][0] for cell in asked.values()} == {12034}


def test_a_shared_network_is_trained_by_both_phases_and_has_one_optimizer():
    *_, run = started("shared")
    assert run.finished
    assert run.roles.parameters_of("student1") is not None
    assert same(role_of(run, "student1"), role_of(run, "student2"))
    assert run.optimizers["student2"].steps == 8
    *_, plain = started("")
    assert not same(role_of(plain, "student1"), role_of(plain, "student2"))
    assert plain.optimizers["student2"].steps == 4


def test_a_kept_fake_goes_on_where_it_was():
    """At the first iteration of phase 2; the paper's starts from the teacher again."""
    ends = {}
    for variant in ("kept", ""):
        for run in started(variant):
            if run.k == 1 and run.i == 4:
                before = role_of(run, "fake1")
                train.begin_phase(run, 2)
                ends[variant] = same(before, role_of(run, "fake1"))
                break
    assert ends == {"kept": True, "": False}


def test_a_learnt_teacher_is_the_fitted_network_and_not_the_exact_one():
    runs = {variant: next(started(variant)) for variant in ("learnt", "random")}
    x_t, t = torch.randn(8, 2), torch.full((8,), 0.5)
    with torch.no_grad():
        v = {name: run.roles.velocity("teacher1", x_t, t) for name, run in runs.items()}
        fitted = methods.toy2d.network(runs["learnt"].cfg)
        fitted.load_state_dict(methods.start_of("ring", "off", SMALL.fit))
        assert torch.equal(v["learnt"], fitted(x_t, t)) and not torch.equal(v["random"], v["learnt"])
    assert not same(role_of(runs["learnt"], "student2"), fitted.state_dict())


def test_a_random_student_starts_from_its_seed_and_not_from_the_teacher():
    first = {variant: next(started(variant)) for variant in ("random", "")}
    start = methods.start_of("ring", "off", SMALL.fit)
    assert same(role_of(first[""], "student2"), start)
    assert not same(role_of(first["random"], "student2"), start)


def test_the_peak_counts_what_is_alive_at_once():
    with methods.Peak() as peak:
        a = torch.zeros(1000)
        b = a + 1
        a = None
        c = b.view(10, 100) + 0  # a view has no storage of its own
        b.add_(1)
        del b, c
    assert peak.most == 8000 and peak.now == 0
    assert a is None


def test_memory_grows_with_vanilla_steps_and_not_with_phases():
    vanilla, phased = (methods.growth("memory", n, 0, 1e-3, SMALL) for n in ("vanilla", "phased"))
    assert len(set(phased["memory"])) == 1
    one, two, four, eight = vanilla["memory"]
    assert eight - four == pytest.approx(2 * (four - two)) == pytest.approx(4 * (two - one))


def test_the_mean_of_the_target_is_the_velocity_and_of_the_naive_one_is_not():
    target = methods.TOYS["ring"]().double()
    x_t, t = torch.randn(64, 2, dtype=torch.float64), torch.linspace(0.6, 0.99, 64).double()
    v = target.velocity(x_t, t)
    torch.testing.assert_close(methods.mean_target(target, "b", 0.5, t, x_t), v)
    assert (methods.mean_target(target, "c", 0.5, t, x_t) - v).abs().mean() > 0.05


def test_distances_of_classes_see_a_swap_that_the_whole_does_not():
    """The two classes of the ring exchanged: the same samples in all, all wrong by class."""
    cfg = methods.config("conditional", Row(dict(phases=1)), 0, 1e-3, SMALL)
    c = {"class": torch.arange(2000) % 2}
    x, y = methods.law(cfg, 0.0, 2000, c), methods.law(replace(cfg, seed=1), 0.0, 2000, c)
    swapped = {"class": 1 - c["class"]}
    wrong = methods.law(replace(cfg, seed=1), 0.0, 2000, swapped)
    assert abs(methods.distance(x, y, c)) < 0.01 < 0.05 < methods.distance(x, wrong, c)
    assert abs(methods.distance(x, wrong, None)) < 0.01


# -- cells ---------------------------------------------------------------------------------------


def test_cells_are_kept_read_again_and_not_mixed(tmp_path):
    """What is there is not computed again; what is gone is, to the bit; unlike ones are refused."""
    jobs = [claims.Job("tuning", "ring", "DMD2", seed, 1e-3, SMALL) for seed in (0, 1)]
    first = claims.compute_all(jobs, tmp_path, 1, "")
    file, kept = jobs[0].file(tmp_path), jobs[1].file(tmp_path)
    written = kept.stat().st_mtime_ns
    file.unlink()
    assert claims.compute_all(jobs, tmp_path, 2, "") == first
    assert kept.stat().st_mtime_ns == written and first[0] != first[1]
    with pytest.raises(UserError, match="other settings"):
        claims.read(jobs[0]._replace(budget=Budget()), tmp_path)


def test_the_best_rate_is_that_of_the_smallest_sum():
    job = lambda lr, seed: claims.Job("tuning", "ring", "DMD2", seed, lr, SMALL)
    jobs = [job(lr, seed) for lr in (1.0, 2.0, 3.0) for seed in (0, 1)]
    found = [{"energy": x} for x in (1, 5, 2, 2, 0, 9)]
    assert claims.best(jobs, found, "energy") == {("ring", "DMD2"): 2.0}


@pytest.mark.parametrize(
    "flags", ["--quick --digits", "--seeds 1", "--processes 0", "--seeds x", "--nonsense"]
)
def test_a_wrong_command_is_one_line(flags, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("sys.argv", ["claims.py", *flags.split(), "--out", str(tmp_path / "o")])
    assert claims.exit_status("claims.py", claims.main) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "o").exists()
