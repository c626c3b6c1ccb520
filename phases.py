"""N steps become K phases: when each phase starts and ends, where it re-noises, how it is sampled.

The example of the paper: 4 steps, 2 phases, shift 5. Phase k ends at s = t_k.

               noise                                            data
    t          1          0.9375       0.8333       0.625          0
    steps      |--- 1st ----|--- 2nd ----|--- 3rd ----|--- 4th ----|
    experts    |-------- expert 1 -------|-------- expert 2 -------|
    phase 1    |<- re-noises in (s, 1) ->|  s = 0.8333
    phase 2    |<------- s = 0, re-noises in (s, 1): nested ------>|
                                         |<- disjoint: (s, 0.833) >|
    Wan2.2     |-- high-noise net --|-- low-noise net, t < 0.875 --|

Here t_k is the end of phase k. Expert k turns samples of p(x_{t_{k-1}}) into samples of
p(x_{t_k}): its target is the data diffused to t_k, not clean data. Nested intervals all reach up to
t = 1: early samples are far from the teacher's data, where its score is wrong, and only high noise
makes the two overlap. Wan2.2's teacher has two networks, for t >= 0.875 and below. All steps of
phase 1 belong to the first, so the second is not even loaded: times that it draws below 0.875 are
clipped to it, as in the paper (16.7 % of (s, 1); 13.8 % with our margin). Phase 2 draws from both.

`phases` selects the method:

    K = N       one step per phase: Phased DMD as in Fig. 1(c), nothing to truncate
    1 < K < N   several steps per phase, truncated: Fig. 1(d); 4 steps in 2 phases is the paper's
    K = 1       DMD2 without its GAN, Fig. 1(b); without truncation vanilla few-step DMD, Fig. 1(a)
    K = N = 1   one-step DMD
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sde import shift_time, step, unshift_time

# kept free at both ends of a re-noising interval, in u. Near t = s > 0 the fake's target is nearly
# pure noise, near t = 0 the weight of Eq. 10 grows; at t = 1 no information is left
MARGIN = 0.02


@dataclass(frozen=True)
class Interval:
    """Times at which a phase re-noises and one branch of the teacher serves.

    A phase has one, or one per branch.
    """

    branch: int  # 1 is the high-noise network, 2 the low-noise one
    u: tuple[float, float]  # unshifted times, low and high
    floor: float = 0.0  # times below are clipped to it, as the paper does at Wan2.2's boundary


@dataclass(frozen=True)
class Phase:
    """Phase k: its expert takes the steps first .. end - 1, from t[0] to s = t[-1]."""

    k: int  # 1 .. K, from noise to data
    first: int
    end: int
    t: tuple[float, ...]  # the times of its steps, and its end s
    intervals: tuple[Interval, ...]  # where it re-noises: one per branch of the teacher in use

    @property
    def s(self) -> float:
        """The time at which the phase ends."""
        return self.t[-1]

    @property
    def num_steps(self) -> int:
        """Its number of steps, and so of truncation depths."""
        return self.end - self.first


def step_times(steps: int, shift: float) -> tuple[float, ...]:
    """The N + 1 times of N steps, 1 to 0: even in u, then shifted (5: 1 .9375 .8333 .625 0)."""
    return (1.0, *(shift_time(1 - i / steps, shift) for i in range(1, steps)), 0.0)


def make_phases(
    steps: int,
    phases: int,
    shift: float = 1.0,
    interval: str = "nested",
    boundary_t: float | None = None,
    fix_t: float = 0.0,
) -> list[Phase]:
    """The phases of a student of N steps. Raises ValueError for settings that make none.

    interval    nested: re-noise in (s, 1), the paper's choice; disjoint: in (s, start of the phase)
    boundary_t  where the teacher changes from branch 1 to branch 2; None if it has one branch
    fix_t       re-noise at this one t, in every phase (Fig. 11); 0 for the interval
    """
    if steps % phases:
        divisors = [k for k in range(1, steps + 1) if steps % k == 0]
        raise ValueError(
            f"--phases: expected a divisor of --steps {steps} {divisors}, got {phases}"
        )
    times = step_times(steps, shift)
    n = steps // phases
    result = []
    for k in range(1, phases + 1):
        t = times[(k - 1) * n : k * n + 1]
        u_end = unshift_time(t[0], shift) if interval == "disjoint" else 1.0
        u = (unshift_time(t[-1], shift) + MARGIN, u_end - MARGIN)
        if fix_t and fix_t <= t[-1]:
            raise ValueError(
                f"--fix-t: expected more than {t[-1]:.4g}, where phase {k} ends, got {fix_t}"
            )
        if fix_t:
            u = unshift_time(fix_t, shift)
            intervals = (Interval(branch_at(fix_t, boundary_t), (u, u)),)
        elif u[0] < u[1]:
            intervals = split_at_boundary(t, u, shift, boundary_t)
        else:
            raise ValueError(
                f"--interval: expected more than {2 * MARGIN} between the ends in u, phase {k} has "
                f"{u[1] - u[0] + 2 * MARGIN:.3g}: no room; use fewer --steps or --phases"
            )
        result.append(Phase(k, (k - 1) * n, k * n, t, intervals))
    return result


def branch_at(t: float, boundary_t: float | None) -> int:
    """The branch of the teacher at time t: 1 down to the boundary and including it, then 2."""
    return 1 if boundary_t is None or t >= boundary_t else 2


def split_at_boundary(
    t: tuple[float, ...], u: tuple[float, float], shift: float, boundary_t: float | None
) -> tuple[Interval, ...]:
    """Split the re-noising interval u of the steps at t between the branches of the teacher."""
    if boundary_t is None:
        return (Interval(1, u),)
    if min(t[:-1]) >= boundary_t:  # all steps belong to branch 1: branch 2 is not even loaded
        return (Interval(1, u, floor=boundary_t),)
    u_boundary = unshift_time(boundary_t, shift)
    high = Interval(1, (max(u_boundary, u[0]), u[1]))
    low = Interval(2, (u[0], min(u_boundary, u[1])))
    return tuple(part for part in (high, low) if part.u[0] < part.u[1])


def pick_interval(phase: Phase, r: float) -> Interval:
    """Draw an interval with probability proportional to its length in u, by r ~ U(0, 1).

    So an update calls one branch of the teacher and not two; over all, t has the same distribution.
    """
    high, low = phase.intervals[0], phase.intervals[-1]  # the same if there is one
    lengths = [interval.u[1] - interval.u[0] for interval in (high, low)]
    return high if r * sum(lengths) < lengths[0] else low


def renoise_times(interval: Interval, r: Tensor, shift: float) -> Tensor:
    """Times t (B,) for r ~ U(0, 1) (B,): uniform in u, then shifted, then clipped to the floor."""
    low, high = interval.u
    return shift_time(low + (high - low) * r, shift).clamp(min=interval.floor)


def split_batch(
    batch: int, micro_batch: int, depths: int, mixed: bool, r: float
) -> list[tuple[int, int | None]]:
    """(size, truncation depth) of the micro-batches of a batch, for one draw r ~ U(0, 1).

    depths  how many truncation depths there are; 0: no truncation, the depth is None
    mixed   the micro-batches take turns, so that every batch holds all depths; else one depth is
            drawn for the whole batch, as in the paper
    micro_batch 0 makes the fewest micro-batches: one, or one per depth.
    """
    if micro_batch:
        sizes = [min(micro_batch, batch - first) for first in range(0, batch, micro_batch)]
    else:
        count = depths if mixed and depths else 1
        sizes = [batch // count + (m < batch % count) for m in range(count)]
    if not depths:
        return [(n, None) for n in sizes]
    return [(n, 1 + (m % depths if mixed else int(r * depths))) for m, n in enumerate(sizes)]


# -- sampling ------------------------------------------------------------------------------------


def full_time(t: float, x: Tensor) -> Tensor:
    """The time t for every sample of x, (B,) float32."""
    return torch.full((len(x),), t, device=x.device)


def trajectory(
    nets: Sequence[Callable], times: Sequence[float], z: Tensor, c: dict | None = None
) -> Iterator[Tensor]:
    """The few-step pipeline: yield x (B, ...) at each of the times, z first. Step i calls nets[i].

    The student is [expert 1, expert 1, expert 2, expert 2]; a teacher is one network, repeated.
    """
    x = z
    yield x
    for net, t, t_next in zip(nets, times[:-1], times[1:], strict=True):
        x = step(x, t, t_next, net(x, full_time(t, x), c))
        yield x


def rollout(
    nets: Sequence[Callable],
    times: Sequence[float],
    phase: Phase,
    z: Tensor,
    c: dict | None,
    depth: int | None,
    checkpointing: bool = False,
) -> Tensor:
    """Backward simulation (Eq. 9): from noise z to x_s at the end of the phase, (B, ...).

    The student samples as it will after training: earlier experts, then the phase's own steps.
    depth j (SGTS): the j-th step of the phase jumps straight to s and is the only one with a
    gradient; those before it have none, so memory does not grow with the number of steps. None:
    all steps of the phase have a gradient.
    checkpointing: keep only the input of the truncated step, and compute it again in backward.
    """
    first = phase.first + (depth - 1 if depth else 0)  # the first step with a gradient
    with torch.no_grad():
        *_, x = trajectory(nets[:first], times[: first + 1], z, c)  # the last x
    end, t = (first + 1, (times[first], phase.s)) if depth else (phase.end, phase.t)

    def finish(x: Tensor) -> Tensor:
        *_, x_s = trajectory(nets[first:end], t, x, c)
        return x_s

    if checkpointing and depth and torch.is_grad_enabled():
        return checkpoint(finish, x, use_reentrant=False, preserve_rng_state=False)
    return finish(x)


# -- for people ----------------------------------------------------------------------------------


def format_phases(phases: list[Phase], shift: float) -> str:
    """The phases as a table to print; times are x 1000, as model cards write them."""
    rows = ["phase  steps at t x 1000          ends at  re-noises in"]
    for phase in phases:
        steps = " ".join(f"{1000 * t:.4g}" for t in phase.t[:-1])
        intervals = " and ".join(format_interval(part, shift) for part in phase.intervals)
        rows.append(f"{phase.k:5}  {steps:26}  {1000 * phase.s:7.4g}  {intervals}")
    return "\n".join(rows)


def format_interval(interval: Interval, shift: float) -> str:
    """Format an interval: (844.2, 995.9), clipped to 875."""
    low, high = (1000 * shift_time(u, shift) for u in interval.u)
    text = f"({low:.4g}, {high:.4g})"
    if interval.floor:
        text += f", clipped to {1000 * interval.floor:.4g}"
    return text if interval.branch == 1 else f"{text} by the low-noise branch"
