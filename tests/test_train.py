"""Claims about the loop: it is the method, it trains what it should, and it repeats itself."""

import itertools

import pytest
import torch

import moe
import train
from losses import dmd_gradient, dmd_loss
from models import adamw
from models.adamw import AdamW
from models.common import UserError, normal, stream, uniform
from phases import rollout, trajectory
from sde import diffuse, step
from toy import toy2d

SMALL = dict(iters=3, warmup=2, batch=16, fake_updates=2)


def role_of(run, name):
    roles = [*run.roles.student.values(), *run.roles.fakes.values()]
    return next(role for role in roles if role.name == name)


def weights(run, name):
    return {key: p.detach().clone() for key, p in role_of(run, name).parameters.items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def train_all(run):
    return list(itertools.chain(*train.train(run)))


DMD2 = dict(
    phases=1,
    steps=2,
    depths="drawn",
    warmup=0,
    iters=6,
    batch=32,
    lr_decay=0.0,
    kl_weight="none",
)


def test_one_phase_is_dmd2_written_out(new_run):
    """The same draws through ten lines that know nothing of phases: equal step for step."""
    run = new_run(**DMD2)
    student, fake = (toy2d.make_network(run.cfg) for _ in range(2))
    pairs = ((student, "student1", 1e-3), (fake, "fake1", 2e-3))
    optimizers = []
    for net, name, lr in pairs:
        net.load_state_dict(weights(run, name))
        settings = dict(betas=(0.0, 0.999), eps=adamw.EPS, weight_decay=0.0)
        optimizers.append(torch.optim.AdamW(net.parameters(), lr, **settings))
    student_adam, fake_adam = optimizers

    def samples(key, second):  # the steps 1 -> 0.5 -> 0, or without `second` the jump 1 -> 0
        rng = stream(*key, 0)
        x, t = torch.randn(32, 2, generator=rng), 0.5 if second else 1.0
        with torch.no_grad():
            x = x - 0.5 * student(x, torch.ones(32)) if second else x
        return x - t * student(x, torch.full((32,), t)), rng

    def noised(x, rng):
        t = 0.02 + 0.96 * torch.rand(32, generator=rng)
        eps = torch.randn(32, 2, generator=rng)
        return t, eps, (1 - t[:, None]) * x + t[:, None] * eps

    teacher = toy2d.exact_teacher(run.cfg)
    for i, _ in enumerate(train.train(run)):
        for u in range(5):
            x, rng = samples((0, 1, i, u), second=True)  # as users will draw them
            t, eps, x_t = noised(x.detach(), rng)
            weight = (10 * t**2).clamp(max=1)[:, None]
            (weight * (fake(x_t, t) - (eps - x.detach())) ** 2).mean().backward()
            fake_adam.step(), fake_adam.zero_grad()
        key = 0, 1, i, 5
        x, rng = samples(key, second=uniform((), *key, "depth") >= 0.5)
        t, eps, x_t = noised(x.detach(), rng)
        with torch.no_grad():
            gradient = teacher(x_t, t) - fake(x_t, t)
        (x * gradient).mean().backward()
        student_adam.step(), student_adam.zero_grad()
        for net, name, _ in pairs:
            torch.testing.assert_close(net.state_dict(), weights(run, name), rtol=1e-3, atol=2e-5)


def test_the_ten_lines_of_dmd2_would_tell_another_weight(new_run):
    """Negative control of the test above: its tolerance does not cover a changed loss."""
    ends = []
    for weight in ("none", "xs"):
        run = new_run(**DMD2 | dict(kl_weight=weight))
        train_all(run)
        ends.append(weights(run, "student1"))
    with pytest.raises(AssertionError):
        torch.testing.assert_close(*ends, rtol=1e-3, atol=2e-5)


def test_without_momentum_adamw_needs_no_first_moment():
    """Ours is torch's AdamW with betas (0, 0.999) and no decay; with momentum it is not."""
    ends = []
    for beta in ("ours", 0.0, 0.9):
        p = torch.nn.Parameter(torch.linspace(-1, 1, 11))
        if beta == "ours":
            ours = AdamW({"p": p}, 1e-2)
        else:
            theirs = torch.optim.AdamW([p], 1e-2, (beta, 0.999), weight_decay=0)
        for i in range(20):
            p.grad = torch.sin(p.detach() * i + i)
            ours.step(1.0, torch.tensor(True)) if beta == "ours" else theirs.step()
        ends.append(p.detach())
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-5, atol=1e-6)
    assert (ends[0] - ends[2]).abs().max() > 1e-3


@pytest.mark.parametrize("eps", [adamw.EPS, 1e-20])
def test_no_gradient_is_too_small_for_the_optimizer(monkeypatch, eps):
    """Down to 1e-15 eps does not matter, 0 / 0 is 0, and where a square is lost nothing explodes.

    Some devices round numbers below 1e-38 to 0. Negative control: there 1e-20 is too small an eps.
    """
    monkeypatch.setattr(adamw, "EPS", eps)
    p = torch.nn.Parameter(torch.zeros(31))
    optimizer = AdamW({"p": p}, 1.0)
    p.grad = 10.0 ** torch.arange(0, -31, -1)
    p.grad[-1] = 0.0
    try:
        if not torch.set_flush_denormal(True):
            pytest.skip("this CPU keeps the numbers below 1e-38")
        optimizer.step(1.0, torch.tensor(True))
    finally:
        torch.set_flush_denormal(False)
    torch.testing.assert_close(p[:16].detach(), -torch.ones(16), rtol=0.1, atol=0)
    assert p[-1] == 0 and (p.abs().max() <= 1.001) == (eps > 1e-20), p


@pytest.mark.parametrize(
    "settings",
    [
        {},
        dict(fake_rollout="per-depth"),
        dict(truncate=False, phases=1),
        dict(reuse_rollouts=True, micro_batch=8),
        dict(classes=True, guidance=(2.0,)),
        dict(interval="disjoint", shift=3.0),
    ],
    ids=str,
)
def test_two_runs_are_bit_identical_and_another_seed_is_not(new_run, settings):
    """For every way of Fig. 1 that the flags offer."""
    ends = []
    for seed in (0, 0, 1):
        run = new_run(**SMALL, **settings, seed=seed)
        rows = train_all(run)
        assert all(row["grad_norm"] > 0 and not row["skipped"] for row in rows)
        ends.append(train.state_tensors(run))
    assert same(ends[0], ends[1]) and not same(ends[0], ends[2])


def test_accumulated_micro_batches_make_the_gradient_of_their_mean(new_run, monkeypatch):
    """Two micro-batches of 8: the gradient is the mean over both, not their sum."""
    settings = SMALL | dict(batch=16, micro_batch=8)
    run, gradients = new_run(**settings), {}
    grads = lambda run: {k: p.grad.clone() for k, p in run.roles.student[1].parameters.items()}
    monkeypatch.setattr(train, "step_optimizers", lambda run, *_: gradients.update(grads(run)))
    train.update_student(run, 0)
    run, total = new_run(**settings), 0.0
    for batch in train.micro_batches(run, 0):
        x_s = rollout(run.nets, run.times, run.phase, batch.z, batch.c, batch.depth)
        t, eps = train.renoise(run, train.choose_interval(run, 0), x_s, batch.rng)
        x_t = diffuse(x_s.detach(), 0.5, t, eps)
        with torch.no_grad():
            v_real, v_fake = run.roles.teacher[1](x_t, t), run.roles.fakes[1, 0](x_t, t)
        gradient = dmd_gradient(x_s, x_t, 0.5, t, v_real, v_fake, "xs")
        total = total + 0.5 * dmd_loss(x_s, gradient).mean()
    total.backward()
    torch.testing.assert_close(gradients, grads(run))


@pytest.mark.parametrize("truncate,steps", [(True, 1), (False, 4)])
def test_truncation_records_one_step_and_its_absence_all(new_run, truncate, steps):
    """Count the activations in the graph of x_s: three per recorded step of the network."""
    run = new_run(**SMALL, phases=1, truncate=truncate)
    batch = next(train.micro_batches(run, 0))
    x_s = rollout(run.nets, run.times, run.phase, batch.z, batch.c, batch.depth)
    todo, seen = [x_s.grad_fn], set()
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo += [parent for parent, _ in node.next_functions]
    assert sum(node.name() == "SiluBackward0" for node in seen) == 3 * steps


def test_the_rollout_is_what_sampling_will_do(new_run):
    """The deepest truncation of the last phase is the sampler's output itself."""
    run = new_run(**SMALL)
    train_all(run)
    z, phase = normal((8, 2), "z"), run.phases[1]
    *_, x = trajectory(run.nets, run.times, z)
    torch.testing.assert_close(rollout(run.nets, run.times, phase, z, None, 2), x)
    *_, x_half = trajectory(run.nets[:2], run.times[:3], z)
    v = run.nets[2](x_half, torch.full((8,), 0.5))
    jump = step(x_half, 0.5, 0.0, v)
    torch.testing.assert_close(rollout(run.nets, run.times, phase, z, None, 1), jump)
    assert not torch.allclose(jump, x)


def test_what_is_not_finite_never_reaches_an_optimizer(new_run, monkeypatch):
    """The update is skipped; after MAX_SKIPS in a row the run stops and says where."""
    monkeypatch.setattr(train, "MAX_SKIPS", 1)
    run = new_run(**SMALL)
    teacher = run.roles.teacher[1]
    run.roles.teacher[1] = moe.Role("teacher1", lambda *args: teacher(*args) * float("nan"))
    run.i, before = 0, weights(run, "student1")
    with pytest.raises(UserError, match="phase 1, iteration 1: 2 updates of student1 in a row"):
        train_all(run)
    assert same(before, weights(run, "student1"))
    assert not any(moment.any() for moment in run.optimizers["student1"].second.values())
