"""From differences over seeds to a word: reproduced, contradicted or undecided.

A claim is cut into parts, each a paired difference (one number a seed) that has to be above a
smallest difference that matters, written down before the run. All parts must be above theirs for
`reproduced`; one that is as far on the other side is enough for `contradicted`.
"""

import math
from dataclasses import dataclass
from statistics import mean, stdev

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Part:
    """One paired difference d, in words, and the smallest that matters.

    Below zero, `matters` is what may be lost: d > -0.02 says "not worse by 0.02".
    """

    name: str
    d: list[float]  # one a seed
    matters: float


def t_cdf(x: float, df: int) -> float:
    """P(T <= x) of Student's t, by its finite sum for whole degrees of freedom.

    With theta = atan(x / sqrt(df)) and c = cos theta, A = P(|T| <= x):
    odd   A = 2/pi (theta + sin theta (c + 2/3 c^3 + (2 4)/(3 5) c^5 ...)), to c^(df - 2)
    even  A = sin theta (1 + 1/2 c^2 + (1 3)/(2 4) c^4 ...), to c^(df - 2)
    """
    theta, odd = math.atan(abs(x) / math.sqrt(df)), df % 2
    term, total = (math.cos(theta) if odd else 1.0), 0.0
    for i in range(2 + odd, df + 1, 2):
        total += term
        term *= (i - 1) / i * math.cos(theta) ** 2
    inside = math.sin(theta) * total
    inside = 2 / math.pi * (theta + inside) if odd else inside
    return 0.5 + math.copysign(inside / 2, x)


def t_quantile(p: float, df: int) -> float:
    """x with P(T <= x) = p, by bisection."""
    low, high = -1e3, 1e3
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if t_cdf(middle, df) < p else (low, middle)
    return high


def interval(d: list[float]) -> tuple[float, float, float]:
    """Mean of d over seeds and its 95 % t interval; a point where all are the same."""
    half = t_quantile((1 + CONFIDENCE) / 2, len(d) - 1) * stdev(d) / math.sqrt(len(d))
    return mean(d), mean(d) - half, mean(d) + half


def p_above(d: list[float], bound: float) -> float:
    """One-sided p of "the mean is at most the bound": small where d is surely above it."""
    error = stdev(d) / math.sqrt(len(d))
    if error == 0:  # counted, not sampled
        return float(mean(d) <= bound)
    return 1 - t_cdf((mean(d) - bound) / error, len(d) - 1)


def p_both(parts: list[Part]) -> tuple[float, float]:
    """p of `reproduced` and of `contradicted`.

    The first needs every part, so the worst p is that of all; the second needs one of n, which
    has n chances to come about by accident (Bonferroni).
    """
    reproduced = max(p_above(part.d, part.matters) for part in parts)
    against = min(p_above([-x for x in part.d], abs(part.matters)) for part in parts)
    return reproduced, min(1.0, len(parts) * against)


def holm(p: list[float]) -> list[bool]:
    """Which hypotheses are rejected, so that one error among all has a chance of 5 % at most."""
    order, rejected = sorted(range(len(p)), key=p.__getitem__), [False] * len(p)
    for rank, i in enumerate(order):
        if p[i] > (1 - CONFIDENCE) / (len(p) - rank):
            break
        rejected[i] = True
    return rejected


def verdicts(claims: list[list[Part]]) -> list[str]:
    """A word for each claim, with Holm's correction over them all."""
    both = [p_both(parts) for parts in claims]
    sure = holm([min(1.0, 2 * min(pair)) for pair in both])
    words = ["reproduced" if a < b else "contradicted" for a, b in both]
    return [word if known else "undecided" for word, known in zip(words, sure)]


def mark(part: Part) -> str:
    """Where a part's own interval lies: beyond what matters, on either side, inside, or unclear."""
    _, low, high = interval(part.d)
    if low > part.matters:
        return "yes"
    if high < -abs(part.matters):
        return "no"
    inside = -abs(part.matters) <= low and high <= abs(part.matters)
    return "no difference that matters" if inside else "unclear"


def text(part: Part) -> str:
    """ring: DMD2 - Phased +0.28 [+0.26, +0.30] > 0.001 yes"""
    numbers = "{:+.2g} [{:+.2g}, {:+.2g}]".format(*interval(part.d))
    return f"{part.name} {numbers} > {part.matters:g} {mark(part)}"
