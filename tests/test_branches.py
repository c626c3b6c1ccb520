"""A teacher of two branches on exact ground: the ring, whose branches meet at t = 0.6."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import train
from models.common import normal, stream
from sde import diffuse
from toy import toy2d
from toy.mixtures import energy, mode_coverage

BOUNDARY = 0.6


@pytest.fixture(scope="module")
def starts():
    """Tensors of a network fitted to the exact velocity on each branch's times only."""
    cfg = train.make_config(boundary=BOUNDARY)
    mixture, tensors = toy2d.load_mixture(cfg), {}
    for branch, (low, high) in ((1, (BOUNDARY, 1.0)), (2, (0.0, BOUNDARY))):
        torch.manual_seed(0)
        net = toy2d.make_network(cfg)
        optimizer = torch.optim.Adam(net.parameters(), 1e-2)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 1000)
        for i in range(1000):
            x_0 = mixture.sample(512, stream("branches", i))
            t = low + (high - low) * torch.rand(512, generator=stream("branches", i, "t"))
            x_t = diffuse(x_0, 0.0, t, normal(x_0.shape, "branches", i, "eps"))
            F.mse_loss(net(x_t, t), mixture.velocity(x_t, t)).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        tensors[branch] = net.state_dict()
    return tensors


@pytest.fixture
def train_two_branches(starts, monkeypatch):
    """train_two_branches(start, swapped): energy and modes of a student of 100 iterations a phase.

    start    the branch whose network expert 2 starts from
    swapped  whether the student's updates of phase 2 ask the fake of the other branch
    """

    def measure(start: int = 2, swapped: bool = False) -> tuple[float, float]:
        cfg = train.make_config(boundary=BOUNDARY, iters=100)
        phases, cpu = train.phases_of(cfg), torch.device("cpu")
        roles, second = (toy2d.roles_from(cfg, phases, cpu, starts[b]) for b in (1, 2))
        roles.fakes[2, 0] = second.fakes[2, 0]
        if start == 2:
            roles.student[2] = second.student[2]
        velocity = toy2d.load_mixture(cfg).velocity
        own_times = {1: lambda t: t >= BOUNDARY, 2: lambda t: t < BOUNDARY}
        for branch, is_own in own_times.items():  # NaN at the other's times would end the run
            roles.teacher[branch].velocity = lambda x, t, c=None, is_own=is_own: velocity(
                x, t
            ).where(is_own(t)[:, None], math.nan)

        def fake_of(run, interval, batch):
            is_student = not torch.is_grad_enabled()
            other = 3 - interval.branch if swapped and is_student and run.k == 2 else None
            return run.roles.fakes[other or interval.branch, 0]

        monkeypatch.setattr(train, "fake_of", fake_of)
        run = train.make_run(cfg, cpu, Path(), roles)
        train.begin_phase(run, 1)
        rows = [row for rows in train.train(run) for row in rows]
        assert {row["role"] for row in rows} == {"fake1", "fake2", "student1", "student2"}
        assert not any(row["skipped"] for row in rows)
        (*_, x), _ = toy2d.sample_nets(cfg, run.nets, run.times, 5000, cpu)
        mixture = toy2d.load_mixture(cfg)
        return energy(x, mixture.sample(5000, stream("exact"))), mode_coverage(x, mixture)[0]

    return measure


@pytest.mark.slow
def test_two_branches_distil_as_one(train_two_branches):
    """Controls: expert 2 starts from the high-noise branch; or asks the wrong fake."""
    distance, modes = train_two_branches()
    wrong_start, _ = train_two_branches(start=1)
    wrong_fake, lost = train_two_branches(swapped=True)
    print(f"energy {distance:.4f}; wrong start {wrong_start:.4f}; fakes swapped {wrong_fake:.4f}")
    assert distance < 0.005 and modes > 7.9
    assert wrong_start > 0.01
    assert wrong_fake > 0.02 and lost < 7.5
