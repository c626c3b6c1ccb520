"""The preset toy2d: an exact mixture is the teacher, and every number has an exact reference."""

import io
import math

import torch
from torch import Tensor

from models.mlp import MLP
from moe import by_step
from phases import step_times
from sample import normal, stream, trajectory
from sde import diffuse
from toy.mixtures import TOYS, Mixture, energy, from_points, modes


def mixture(cfg) -> Mixture:
    """The distribution that cfg.toy or cfg.points names."""
    return from_points(cfg.points, cfg.bandwidth) if cfg.points else TOYS[cfg.toy]()


def network(cfg) -> MLP:
    """The network that fake and student are."""
    target = mixture(cfg)
    return MLP(target.means.shape[1], classes=target.classes if cfg.classes == "on" else 0)


def teacher(cfg):
    """v_real = teacher(x_t, t, c): exact, guided where classes and a scale are given."""
    target = mixture(cfg)
    if cfg.guidance == 1 or cfg.classes == "off":
        return target.velocity
    return lambda x_t, t, c=None: target.guided(x_t, t, c, cfg.guidance)


def data(cfg):
    """data(iteration, m) -> conditions, null conditions, shape of one sample."""
    target = mixture(cfg)

    def batch(n: int, *where):
        return classes_of(target, n, *where) if cfg.classes == "on" else None, None, target.means.shape[1:]

    return batch


def classes_of(target: Mixture, n: int, *where) -> dict:
    """Uniformly drawn classes of n samples."""
    return {"class": torch.randint(target.classes, (n,), generator=stream(*where, "class"))}


def start(cfg, bar, steps: int = 1500, batch: int = 1024) -> dict[str, Tensor]:
    """The network fitted to the exact velocity: what a pretrained teacher's weights are at scale.

    From a fixed seed of its own: every run on the same mixture starts from the same network.
    """
    target, where = mixture(cfg), ("start", cfg.toy, cfg.classes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # of nn.Linear's initialisation alone
        net = network(cfg)
    optimizer = torch.optim.Adam(net.parameters(), 1e-2, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for i in bar(range(steps)):
        c = classes_of(target, batch, *where, i) if cfg.classes == "on" else None
        x_0, t = target.sample(batch, stream(*where, i, "x_0"), c), torch.rand(batch, generator=stream(*where, i, "t"))
        x_t = diffuse(x_0, 0.0, t, normal(x_0.shape, *where, i, "eps"))
        loss = (net(x_t, t, c) - target.velocity(x_t, t, c)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return net.state_dict()


def evaluate(cfg, student, phases) -> dict:
    """Numbers of metrics.json."""
    target, n = mixture(cfg), cfg.eval_samples
    times = step_times(cfg.steps, cfg.shift)
    z = normal((n, target.means.shape[1]), "evaluate", cfg.seed)
    with torch.no_grad():
        *_, x = trajectory(student, times, z)
    y = target.sample(n, stream("exact"))
    number, precision = modes(x, target)
    return {"energy": energy(x, y), "modes": number, "precision": precision}


def picture(cfg, student, phases): pass
