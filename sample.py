"""The few-step sampler, for a student, its phases while training, and a teacher alike."""

import hashlib
from typing import Callable, Iterator

import torch
from torch import Tensor

from moe import select
from phases import Phase
from sde import step


def stream(*where) -> torch.Generator:
    """A random stream that is a function of `where` alone: (seed, phase, iteration, update, ...).

    No global state, so none is saved: a resumed run needs its counters only. On the CPU, so that
    a seed means the same numbers on every device.
    """
    digest = hashlib.blake2b(repr(where).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


def normal(shape, *where) -> Tensor:
    """Standard normal numbers of the stream `where`, float32 on the CPU."""
    return torch.randn(shape, generator=stream(*where))


def times_of(t: float, x: Tensor) -> Tensor:
    """The time t for every sample of x, (B,) float32."""
    return torch.full((len(x),), t, device=x.device)


def trajectory(nets: list[Callable], times, z: Tensor, c=None) -> Iterator[Tensor]:
    """x at every one of the times, z first: step i of the solver asks nets[i]. (B, ...) each.

    The student is [expert 1, expert 1, expert 2, expert 2] at its own times, a teacher is the same
    network at every step: nothing else differs.
    """
    x = z
    yield x
    for net, t, t_next in zip(nets, times[:-1], times[1:], strict=True):
        x = step(x, t, t_next, net(x, times_of(t, x), c))
        yield x


def rollout(
    nets: list[Callable], times, phase: Phase, z: Tensor, c, depth: Tensor, truncate: bool = True
) -> Tensor:
    """x_{t_k} from z as the student will make it: backward simulation with truncation (SGTS).

    Earlier experts, and the phase's steps before the last of each sample's `depth` (B,), run
    without gradient. The last one is recorded and jumps to the end of the phase. Without
    truncation every step of the phase is recorded and memory grows with their number.
    """
    with torch.no_grad():
        for x in trajectory(nets[: phase.first], times[: phase.first + 1], z, c):
            pass
    if not truncate:
        for x in trajectory(nets[phase.first : phase.last], phase.t, x, c):
            pass
        return x
    with torch.no_grad():
        for i in range(phase.depths - 1):
            rows = (depth > i + 1).nonzero()[:, 0].to(x.device)  # depth is on the CPU: no wait
            if len(rows):
                t, head = phase.t[i], x[rows]
                v = nets[phase.first](head, times_of(t, head), select(c, rows))
                x = x.index_copy(0, rows, step(head, t, phase.t[i + 1], v))
    t = torch.tensor(phase.t)[depth - 1].to(x.device)  # (B,) where each recorded step begins
    return step(x, t, phase.s, nets[phase.first](x, t, c))
