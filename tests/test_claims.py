"""toy/claims.py: the statistics, the methods that settings cannot express, the runs."""

import json
import random
import sys
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from toy import claims
from toy.claims import DMD2, PHASED, Job, Part, decide, interval, part_verdict
from toy.mixtures import TOYS

SCALE = 100  # 8 student updates, 100 samples


@pytest.fixture(autouse=True)
def short_fit(monkeypatch):
    """A start network of 20 steps in place of 1500."""
    fit = claims.toy2d.fit_start
    monkeypatch.setattr(claims.toy2d, "fit_start", partial(fit, steps=20))
    claims.start_tensors.cache_clear()
    yield
    claims.start_tensors.cache_clear()


def verdict(parts):
    return part_verdict(decide(parts))


def normals(seed, mean=0.0, n=10):
    source = random.Random(seed)
    return [source.gauss(mean, 1) for _ in range(n)]


def test_identical_methods_are_unclear_and_a_planted_difference_is_found():
    """With intervals of Student's t."""
    assert interval([1.0, 3.0]) == pytest.approx((2, 2 - 12.706, 2 + 12.706))
    nothing = [verdict([Part("", normals(i), 0.0)]) for i in range(200)]
    planted = [verdict([Part("", normals(i, mean=3), 1.0)]) for i in range(200)]
    assert 180 <= nothing.count("unclear") < 200  # 95 % intervals: wrong about 1 time in 20
    assert planted.count("holds") >= 190 and "does not hold" not in planted


def test_differences_are_paired_by_seed():
    """What two methods of a seed share does not widen the interval. Control: of other seeds."""
    shared = [100 * x for x in normals(0)]
    runs = lambda seed, mean: [{"energy": x + y} for x, y in zip(shared, normals(seed, mean))]
    one_network = "one shared network, truncated fake"
    results = {table: {DMD2: runs(1, 3), one_network: runs(2, 0)} for table in claims.MAIN}
    assert verdict(claims.list_parts("9", results)) == "holds"
    results["ring"][DMD2].reverse()
    assert verdict(claims.list_parts("9", results)) == "unclear"
    del results["ring"][DMD2]  # not trained
    assert len(claims.list_parts("9", results)) == 2


def test_the_verdict_of_a_claim_is_that_of_its_worst_part():
    yes, unclear, no = (Part("", normals(3, mean), 1.0) for mean in (5, 1, -5))
    small = Part("", [x / 100 + 0.3 for x in normals(2)], 1.0)
    assert verdict([small]) == "too small to matter"
    assert verdict([small._replace(min_effect=0.1)]) == "holds"
    assert verdict([small._replace(differences=unclear.differences)]) == "unclear"
    assert verdict([yes, yes]) == "holds" and verdict([yes, small]) == "too small to matter"
    assert verdict([yes, small, unclear]) == "unclear"
    assert verdict([yes, no, unclear]) == "does not hold"


def test_a_shared_network_is_trained_by_both_phases_with_one_optimizer():
    equal, steps = [], []
    for name in ("one shared network", PHASED):
        *_, run = claims.train_method(Job("ring", name, 0, 1e-3, SCALE))
        first, second = (run.roles.student[k].parameters.values() for k in (1, 2))
        equal.append(all(map(torch.equal, first, second)))
        steps.append(run.optimizers["student2"].steps)
        assert run.finished
    assert equal == [True, False] and steps == [8, 4]


def test_memory_grows_with_vanilla_steps_and_not_with_phases():
    job = lambda name: Job("memory", name, 0, 1e-3)
    assert claims.run_memory(job("phased"))["growth"] == 1
    assert claims.run_memory(job("vanilla"))["growth"] > 5


def test_the_mean_of_the_target_is_the_velocity_and_of_the_naive_one_is_not():
    bias = lambda name: claims.run_matching(Job("matching ring", name, 0, 1e-3))["bias"]
    assert bias("Eq. 11") < 1e-9 and bias("naive") > 0.2


def test_distances_by_class_see_a_swap_that_all_samples_together_do_not():
    mixture, c = TOYS["ring"](), {"class": torch.arange(2000) % 2}
    draw = lambda seed, c: mixture.sample(2000, torch.Generator().manual_seed(seed), c)
    x, y, swapped = draw(0, c), draw(1, c), draw(1, {"class": 1 - c["class"]})
    assert abs(claims.compare(x, y, c)[0]) < 0.01 < 0.05 < claims.compare(x, swapped, c)[0]
    assert abs(claims.compare(x, swapped, None)[0]) < 0.01


@pytest.mark.parametrize("planted, word", [(0, "unclear"), (-1, "does not hold")])
def test_the_command_on_random_metrics_finds_only_what_is_planted(
    planted, word, monkeypatch, capsys, tmp_path
):
    """Claim 9 compares DMD2, whose metrics are larger by `planted`, with one shared network."""
    source = random.Random(1)
    names = sorted({c[4] for c in claims.COMPARISONS} | {*claims.METRICS})  # in one order
    fake = lambda job: (
        {x: source.gauss(planted * (job.name == DMD2), 0.1) for x in names}
        | {x: 1 + source.random() for x in claims.DEPTHS}
    )
    monkeypatch.setattr(claims, "run_jobs", lambda jobs, args: [fake(job) for job in jobs])
    argv = ["claims.py", "--quick", "--seeds", "5", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", argv)
    claims.main()
    text = capsys.readouterr().out
    row = next(line for line in text.splitlines() if line.startswith("| 9 |"))
    assert f" | {word} | " in row and (tmp_path / "claims.md").read_text() + "\n" == text
    assert planted or text.count(" | holds | ") == 0


def test_a_run_has_every_metric_that_the_claims_compare():
    metrics = claims.run_toy(Job("conditional", PHASED, 0, 1e-3, SCALE))
    compared = {c[4] for c in claims.COMPARISONS if "conditional" in c[1]} | set(claims.METRICS)
    assert compared <= set(metrics)
    assert metrics["depth 2"] == metrics["energy"] != metrics["depth 1"]  # what users draw


@pytest.mark.parametrize("flags", [[], ["--quick"], ["--digits"]])
def test_each_run_has_a_file_of_its_own(flags, monkeypatch, tmp_path):
    jobs = []
    monkeypatch.setattr(claims, "write_report", lambda asked, args: jobs.extend(asked))
    monkeypatch.setattr(sys, "argv", ["claims.py", "--out", str(tmp_path), *flags])
    claims.main()
    assert jobs and len({job.file(tmp_path) for job in jobs}) == len(jobs)


@pytest.mark.slow  # starts processes
def test_existing_runs_are_not_repeated(tmp_path):
    """A planted result stays; the run that is missing is made."""
    jobs = [Job("matching ring", "naive", seed, 1e-2) for seed in (0, 1)]
    jobs[1].file(tmp_path).parent.mkdir()
    jobs[1].file(tmp_path).write_text(json.dumps({"bias": "planted"}))
    made, kept = claims.run_jobs(jobs, SimpleNamespace(out=tmp_path))
    assert made["bias"] > 0.2 and kept["bias"] == "planted"


@pytest.mark.slow  # draws 150,000 digits
def test_a_run_on_digits_measures_every_depth():
    metrics = claims.run_digits(Job("digits", PHASED, 0, 1e-3, SCALE))
    assert metrics["frechet"] == metrics["depth 2"] < metrics["depth 1"]
    assert metrics["all depths"] < metrics["depth 1"] and metrics["coverage"] > 0.5
