"""Claims about the loop: it is the method, it is exact about who learns, and it repeats itself."""

import itertools
import weakref
from dataclasses import replace

import pytest
import torch

import losses
import train
from models.adamw import AdamW
from models.files import UserError
from models.draws import normal, stream
from sample import recorded, rollout, trajectory
from sde import diffuse, step
from toy import toy2d
from toy.mixtures import energy

SMALL = dict(iters=3, warmup=2, batch=16, fake_updates=2)


def weights(run, role):
    return {name: p.detach().clone() for name, p in run.roles.parameters_of(role).items()}


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


def test_one_phase_with_weight_one_is_dmd2_written_out(new_run):
    """The same draws through ten lines that know nothing of phases: equal step for step."""
    run = new_run(
        phases=1, steps=2, weight="one", depths="drawn", warmup=0, iters=6, batch=32, lr_decay=0.0
    )
    G, F = (toy2d.network(run.cfg) for _ in "GF")
    for mine, role in ((G, "student1"), (F, "fake1")):
        mine.load_state_dict(weights(run, role))
    adam = {
        net: torch.optim.AdamW(net.parameters(), lr, betas=(0.0, 0.999), weight_decay=0.0)
        for net, lr in ((G, 1e-3), (F, 2e-3))
    }

    def samples(where):  # two steps, 1 -> 0.5 -> 0, cut after one of them
        x, j = (
            normal((32, 2), *where, 0, "z"),
            int(2 * torch.rand((), generator=stream(*where, "depth")).item()),
        )
        with torch.no_grad():
            x = x - 0.5 * G(x, torch.ones(32)) if j else x
        t_j = 0.5 if j else 1.0
        return x - t_j * G(x, torch.full((32,), t_j))

    def noised(x, where):
        u, eps = torch.rand(32, generator=stream(*where, 0, "t")), normal((32, 2), *where, 0, "eps")
        t = 0.02 + 0.96 * u
        return t, eps, (1 - t[:, None]) * x + t[:, None] * eps

    teacher = toy2d.teacher(run.cfg)
    for i, _ in enumerate(itertools.islice(train.train(run), 6)):
        for update in range(5):
            x = samples((0, 1, i, update)).detach()
            t, eps, x_t = noised(x, (0, 1, i, update))
            weight = (10 * t**2).clamp(max=1)[:, None]
            (weight * (F(x_t, t) - (eps - x)) ** 2).mean().backward()
            adam[F].step(), adam[F].zero_grad()
        x = samples((0, 1, i, 5))
        t, eps, x_t = noised(x.detach(), (0, 1, i, 5))
        with torch.no_grad():
            gradient = teacher(x_t, t) - F(x_t, t)
        (x * gradient).mean().backward()
        adam[G].step(), adam[G].zero_grad()
        for mine, role in ((G, "student1"), (F, "fake1")):
            torch.testing.assert_close(mine.state_dict(), weights(run, role), rtol=1e-3, atol=2e-5)


def test_the_ten_lines_of_dmd2_would_tell_another_weight(new_run):
    """Negative control of the test above: its tolerance does not cover a changed loss."""
    settings = dict(phases=1, steps=2, depths="drawn", warmup=0, iters=6, batch=32, lr_decay=0.0)
    ends = []
    for weight in ("one", "x0"):
        run = new_run(**settings, weight=weight)
        list(train.train(run))
        ends.append(weights(run, "student1"))
    with pytest.raises(AssertionError):
        torch.testing.assert_close(*ends, rtol=1e-3, atol=2e-5)


def test_without_momentum_adamw_needs_no_first_moment():
    """Ours is torch's AdamW with betas (0, 0.999) and no decay; with momentum it would not be."""
    made = []
    for make in ("ours", 0.0, 0.9):
        p = torch.nn.Parameter(torch.linspace(-1, 1, 11))
        optimizer = (
            AdamW({"p": p}, 1e-2)
            if make == "ours"
            else torch.optim.AdamW([p], 1e-2, (make, 0.999), weight_decay=0)
        )
        for i in range(20):
            p.grad = torch.sin(p.detach() * i + i)
            optimizer.step(1.0) if make == "ours" else optimizer.step()
        made.append(p.detach())
    torch.testing.assert_close(made[0], made[1], rtol=1e-5, atol=1e-6)
    assert (made[0] - made[2]).abs().max() > 1e-3


@pytest.mark.parametrize("phases", [2, 4])
def test_only_the_active_expert_and_its_fake_get_gradients(new_run, monkeypatch, phases):
    """In phase 2 the generator's loss reaches student2 alone, the fake's fake1 alone."""
    run = new_run(**SMALL, phases=phases)
    train.begin_phase(run, 2)
    run.i, reached, kept = 0, {}, train.apply

    def watch(run, name, values, about):
        gradients = {role: run.roles.parameters_of(role).values() for role in run.trained}
        reached[name] = [r for r, ps in gradients.items() if any(p.grad is not None for p in ps)]
        return kept(run, name, values, about)

    monkeypatch.setattr(train, "apply", watch)
    train.iteration(run)
    assert reached == {"fake1": ["fake1"], "student2": ["student2"]}
    assert set(run.optimizers) == {"fake1", "student2"} and "student1" in run.trained


def test_a_frozen_expert_is_bit_identical_afterwards(new_run):
    """Phase 2 leaves student1 alone, and starts student2 and the fake from the teacher."""
    run = new_run(**SMALL)
    first = weights(run, "student1")
    frozen = None
    for row, *_ in train.train(run):
        if row["phase"] == 1 and run.i == run.cfg.iters:
            frozen = weights(run, "student1")
        if row["phase"] == 2 and row["iteration"] == -2:
            assert same(weights(run, "student2"), first)
    assert not same(first, frozen) and same(frozen, weights(run, "student1"))
    assert not same(first, weights(run, "student2"))


def test_each_phase_starts_its_fake_and_its_expert_from_the_teacher_again(new_run):
    """F_k from the teacher, not from F_{k-1}; the moments of AdamW are new as well."""
    run = new_run(**SMALL)
    start = weights(run, "fake1")
    for _ in itertools.islice(train.train(run), SMALL["iters"] + SMALL["warmup"]):
        pass
    assert run.k == 1 and not same(start, weights(run, "fake1"))
    old, kept = weakref.ref(run.optimizers["fake1"]), train.AdamW
    with pytest.MonkeyPatch.context() as patch:  # no room for moments of two phases at once
        patch.setattr(train, "AdamW", lambda *a: [kept(*a), gone.append(old() is None)][0])
        gone = []
        train.begin_phase(run, 2)
    assert gone == [True, True]
    assert same(start, weights(run, "fake1")) and same(start, weights(run, "student2"))
    assert all(not moment.any() for moment in run.optimizers["fake1"].second.values())


def test_a_teacher_of_two_experts_has_a_fake_beside_each(new_run, monkeypatch):
    """Phase 1 asks the high-noise one alone; each update of phase 2 trains exactly one of two."""
    preset = replace(train.PRESETS["toy2d"], boundary=lambda cfg: 0.6)
    monkeypatch.setitem(train.PRESETS, "toy2d", preset)
    run = new_run(**SMALL | dict(fake_updates=1, iters=12))
    trained = {1: set(), 2: set()}
    before = {role: weights(run, role) for role in ("fake1", "fake2")}
    for row, *_ in train.train(run):
        after = {role: weights(run, role) for role in before}
        changed = [role for role in before if not same(before[role], after[role])]
        if row["iteration"] > -run.cfg.warmup:  # where a phase begins, both are reset
            assert len(changed) == 1
            trained[row["phase"]].update(changed)
        before = after
    assert trained == {1: {"fake1"}, 2: {"fake1", "fake2"}}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        dict(depths="drawn"),
        dict(fake_per_depth=True),
        dict(phases=4),
        dict(truncate="off", phases=1),
        dict(reuse_rollouts=True),
        dict(classes="on", guidance=(2.0,)),
        dict(interval="disjoint", shift=3.0),
    ],
)
def test_two_runs_are_bit_identical_and_another_seed_is_not(new_run, settings):
    """For every way of Fig. 1 that the flags can ask for."""
    ends = []
    for seed in (0, 0, 1):
        run = new_run(**SMALL, **settings, seed=seed)
        rows = list(itertools.chain(*train.train(run)))
        assert all(row["loss"] is not None and not row["skipped"] for row in rows)
        ends.append(train.tensors_of(run))
    assert same(ends[0], ends[1]) and not same(ends[0], ends[2])


def test_rollouts_in_one_go_are_those_of_one_after_the_other(new_run):
    """Five rollouts together, as small networks do them, or each for itself."""
    run = new_run(**SMALL)
    apart = [train.simulate(run, [(update, 0, 16)])[0] for update in range(5)]
    for a, b in zip(train.fake_rollouts(run, 5), apart, strict=True):
        torch.testing.assert_close(a[0], b[0], rtol=1e-4, atol=1e-5)
        assert torch.equal(a[2], b[2])
    shared = list(train.fake_rollouts(new_run(**SMALL, reuse_rollouts=True), 3))
    assert len(shared) == 3 and torch.equal(shared[0][0], shared[2][0])


def test_passes_of_any_size_see_the_same_samples(new_run):
    """4 x 4 and 1 x 16: every sample has a stream of its own."""
    small, large = (
        torch.cat([x for x, *_ in train.fake_rollouts(new_run(**SMALL, micro_batch=size), 2)])
        for size in (4, 16)
    )
    torch.testing.assert_close(small, large, rtol=1e-4, atol=1e-5)


def test_accumulated_passes_make_the_gradient_of_their_mean(new_run):
    """Two passes of 8: the gradient is the mean over both, not their sum."""
    found = {}
    kept = train.apply
    train.apply = lambda run, name, *_: found.update({name: weights_grad(run)})
    try:
        run = new_run(**SMALL | dict(batch=16, micro_batch=8))
        train.generator_update(run, 0)
    finally:
        train.apply = kept
    run = new_run(**SMALL | dict(batch=16, micro_batch=8))
    total = 0
    for first in (0, 8):
        [(x_s, c, depth)] = train.simulate(run, [(0, first, 8)])
        t, eps = train.renoise(run, train.draw_part(run, 0), 0, first, x_s)
        x_t = diffuse(x_s.detach(), 0.5, t, eps)
        with torch.no_grad():
            v_real, v_fake = (
                run.roles.velocity("teacher1", x_t, t),
                run.roles.velocity("fake1", x_t, t),
            )
        total = (
            total
            + 0.5
            * losses.distribution_matching(
                x_s, losses.dmd_gradient(x_s, x_t, 0.5, t, v_real, v_fake, "xs")
            ).mean()
        )
    total.backward()
    torch.testing.assert_close(found["student1"], weights_grad(run))


def weights_grad(run):
    return {name: p.grad.clone() for name, p in run.roles.parameters_of("student1").items()}


@pytest.mark.parametrize("truncate", ["on", "off"])
def test_truncation_records_one_step_and_its_absence_all(new_run, truncate):
    """Graph nodes of the generator's step: one network's worth, or one for each of the steps."""
    run = new_run(**SMALL, phases=1, truncate=truncate)
    [(x_s, _, _)] = train.simulate(run, [(0, 0, 16)])
    todo, seen = [x_s.grad_fn], set()
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo += [parent for parent, _ in node.next_functions]
    silu = sum(node.name() == "SiluBackward0" for node in seen)
    assert silu == (3 if truncate == "on" else 12)


def rolled_out(run, z, depth):
    """x_{t_2} of these truncation depths."""
    x, t = rollout(run.student, run.times, run.phases[1], z, None, depth)
    return recorded(run.student, run.phases[1], x, t, None)


def test_the_rollout_is_what_sampling_will_do(new_run):
    """The deepest truncation of the last phase is the sampler's output itself."""
    run = new_run(**SMALL)
    list(train.train(run))
    z, last = normal((8, 2), "z"), torch.full((8,), 2)
    x_s = rolled_out(run, z, last)
    *_, x = trajectory(run.student, run.times, z)
    torch.testing.assert_close(x_s, x)
    first = rolled_out(run, z, torch.ones_like(last))
    *_, x_half = trajectory(run.student[:2], run.times[:3], z)
    v = run.student[2](x_half, torch.full((8,), 0.5))
    torch.testing.assert_close(first, step(x_half, 0.5, 0.0, v))


@pytest.mark.parametrize("max_skips", [0, 1])
def test_what_is_not_finite_never_reaches_an_optimizer(new_run, max_skips):
    """The update is skipped; after max_skips in a row the run stops and says where."""
    run = new_run(**SMALL, max_skips=max_skips)
    teacher = run.roles.velocity
    run.roles = run.roles._replace(
        velocity=lambda role, *a: teacher(role, *a) * (float("nan") if role == "teacher1" else 1)
    )
    run.i, before = 0, weights(run, "student1")
    with pytest.raises(UserError, match=f"phase 1, iteration {max_skips}: .* of student1"):
        for row in train.train(run):
            pass
    assert same(before, weights(run, "student1")) and run.skips["student1"] == max_skips + 1


def test_measuring_the_lag_tells_a_lagging_fake_and_leaves_the_run_as_it_was(new_run):
    """A fake that is off catches up in 20 updates, visibly; one that was trained only jitters."""
    run = new_run(**SMALL | dict(iters=40, warmup=200, batch=128))
    for _ in itertools.islice(train.train(run), 210):
        pass
    before, counters = (
        {k: v.clone() for k, v in train.tensors_of(run).items()},
        train.counters_of(run),
    )
    now, later = train.fake_lag(run)
    assert same(before, train.tensors_of(run)) and counters == train.counters_of(run)
    with torch.no_grad():
        run.roles.parameters_of("fake1")["last.bias"].add_(0.5)  # a fake that is off
    worse, better = train.fake_lag(run)
    assert worse - better > 5 * abs(now - later)


def end_of_phase_1(new_run, **settings):
    run = new_run(**settings)
    for row, *_ in train.train(run):
        if row["phase"] == 1 and run.i == run.cfg.iters:
            break
    *_, x = trajectory(run.student[:2], run.times[:3], normal((10_000, 2), "z"))
    return energy(x.detach(), toy2d.mixture(run.cfg).sample_at(0.5, 10_000, stream("exact")))


def test_the_biased_target_harms_the_end_of_phase_1(new_run):
    """Energy of x_{t_1} to exact x_{t_1}: at least 3 times worse. The last phase would hide it."""
    good, bad = (
        end_of_phase_1(new_run, iters=250, warmup=100, target=target)
        for target in ("unbiased", "biased")
    )
    assert good < 0.006 and bad > 3 * good
