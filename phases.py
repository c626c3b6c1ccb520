"""N steps in K phases: who takes which step, where each phase ends, at which times it re-noises.

One dial, `phases`, and everything here follows from it:

    K = N       one step a phase: Phased DMD as in Fig. 1(c), nothing to truncate
    1 < K < N   several steps a phase, with truncation: Fig. 1(d); 4 steps in 2 phases is the paper
    K = 1       DMD2 without its GAN, Fig. 1(b); without truncation it is vanilla DMD, Fig. 1(a)
    K = N = 1   DMD
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from sde import shift, unshift


@dataclass(frozen=True)
class Part:
    """A piece of a re-noising interval that one expert of the teacher (and of the fake) owns."""

    expert: int  # of the teacher, counted from noise to data; 1 where there is only one
    u: tuple[float, float]  # unshifted times
    floor: float = 0.0  # draws below this t are clipped to it


@dataclass(frozen=True)
class Phase:
    """Phase k: its student expert takes steps first .. last - 1, from t[0] to s = t[-1]."""

    k: int  # 1 .. K, from noise to data
    first: int
    last: int
    t: tuple[float, ...]  # the times of its steps, and the time s where it ends
    parts: tuple[Part, ...]  # where it re-noises: one part, or one for each expert of the teacher

    @property
    def s(self) -> float:
        return self.t[-1]

    @property
    def depths(self) -> int:
        """How many truncation depths there are: one for each step."""
        return self.last - self.first


def step_times(steps: int, S: float) -> tuple[float, ...]:
    """1 = t_0 > ... > t_N = 0: uniform in u, then shifted. Shift 5: 1, .9375, .8333, .625, 0."""
    return (1.0, *(shift(1 - i / steps, S) for i in range(1, steps)), 0.0)


def make_phases(
    steps: int,
    phases: int,
    S: float = 1.0,
    interval: str = "nested",
    margin: float = 0.02,
    boundary_t: float | None = None,
    boundary: str = "clip",
    fix_t: float = 0.0,
) -> list[Phase]:
    """The phases of an N-step student. Raises ValueError where phases do not divide steps.

    interval    nested: (s, 1), the paper's; disjoint: (s, start of the phase), as in TDM
    margin      kept from both ends of each interval, in u
    boundary_t  the time at which the teacher changes from its high-noise expert 1 to expert 2
    boundary    what a phase does that only the high-noise expert serves: clip its draws to the
                boundary (the paper), or draw `inside` (boundary, end) from the start
    fix_t       re-noise at this t alone, in every phase (Fig. 11); 0 for the interval
    """
    if steps % phases:
        near = [k for k in range(1, steps + 1) if steps % k == 0]
        raise ValueError(f"--phases {phases} does not divide --steps {steps}; use one of {near}")
    times, n = step_times(steps, S), steps // phases
    made = []
    for k in range(1, phases + 1):
        t = times[(k - 1) * n : k * n + 1]
        u_end = unshift(t[0], S) if interval == "disjoint" else 1.0
        u = (unshift(t[-1], S) + margin, u_end - margin)
        if u[0] >= u[1] and not fix_t:
            raise ValueError(
                f"phase {k} leaves no room to re-noise: fewer steps, fewer phases, or nested"
            )
        if fix_t and fix_t <= t[-1]:
            raise ValueError(f"--fix-t {fix_t} is not above {t[-1]:.4g}, where phase {k} ends")
        u = (unshift(fix_t, S),) * 2 if fix_t else u
        made.append(Phase(k, (k - 1) * n, k * n, t, _cut(t, u, S, boundary_t, boundary)))
    return made


def _cut(t, u, S: float, boundary_t, boundary: str) -> tuple[Part, ...]:
    """Cut the interval u at the teacher's boundary, if it has one."""
    if boundary_t is None:
        return (Part(1, u),)
    cut = unshift(boundary_t, S)
    if min(t[:-1]) >= boundary_t:  # every step is the high-noise expert's: the other one stays out
        return (
            Part(1, u, floor=boundary_t) if boundary == "clip" else Part(1, (max(cut, u[0]), u[1])),
        )
    parts = Part(1, (max(cut, u[0]), u[1])), Part(2, (u[0], min(cut, u[1])))
    return tuple(part for part in parts if part.u[0] <= part.u[1])


def pick_part(phase: Phase, r: float) -> Part:
    """The part that one draw r ~ U(0, 1) chooses, with probability its share of the interval.

    One network for a whole update in place of two; the law of t stays that of the whole interval.
    """
    if len(phase.parts) == 1:
        return phase.parts[0]
    widths = [part.u[1] - part.u[0] for part in phase.parts]
    for part, width in zip(phase.parts, widths):
        r -= width / sum(widths)
        if r < 0:
            return part
    return phase.parts[-1]


def renoise_times(part: Part, r: Tensor, S: float) -> Tensor:
    """t (B,) for r ~ U(0, 1) (B,): uniform in the unshifted part, then shifted, then clipped."""
    low, high = part.u
    return shift(low + (high - low) * r, S).clamp(min=part.floor)


def truncation_depths(phase: Phase, rows: range, r: float, mixed: bool, batch: int) -> Tensor:
    """For some rows of a batch: which step of the phase is recorded and jumps to its end. (B,)

    Drawn once for the whole batch, as the paper does; `mixed` gives every depth an equal share of
    it instead, and r only says who goes first where the shares cannot be equal.
    """
    drawn = int(r * phase.depths)
    if not mixed:
        return torch.full((len(rows),), 1 + drawn)
    turn = drawn if batch % phase.depths else 0
    return 1 + (torch.arange(rows.start, rows.stop) + turn) % phase.depths


def table(phases: list[Phase], S: float) -> str:
    """The phases as a table to print: times are x 1000, as model cards write them."""
    rows = ["phase  expert  steps at t x 1000          ends at  re-noises in"]
    for phase in phases:
        steps = " ".join(f"{1000 * t:.4g}" for t in phase.t[:-1])
        rows.append(
            f"{phase.k:5}  {phase.k:6}  {steps:26}  {1000 * phase.s:7.4g}  {_intervals(phase, S)}"
        )
    return "\n".join(rows)


def _intervals(phase: Phase, S: float) -> str:
    """(800, 994) clipped to 875 by expert 1, ..."""
    texts = []
    for part in phase.parts:
        low, high = (1000 * shift(u, S) for u in part.u)
        text = f"({low:.4g}, {high:.4g})" + (
            f", clipped to {1000 * part.floor:.4g}" if part.floor else ""
        )
        texts.append(
            text + (f" by teacher expert {part.expert}" if part.expert > 1 or part.floor else "")
        )
    return " and ".join(texts)
