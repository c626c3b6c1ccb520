"""Which expert owns a step or a time, and the roles that networks play.

A student is a list of experts, one for each phase, routed by the *index* of a step: routing by t
disagrees with it at large shifts. A teacher or a fake may be several networks, routed by t.
A role ("teacher", "student1", "fake1") is an argument of a call and never a state of a network:
a state would be read again when activation checkpointing recomputes, and be wrong by then.
"""

from functools import partial
from typing import Callable, NamedTuple

import torch
from torch import Tensor, nn

from phases import Phase


class Roles(NamedTuple):
    """The networks of a run, whatever they share: three functions of a role's name.

    velocity(role, x_t, t, c)  v (B, ...) float32 at x_t (B, ...), t (B,), conditions c
    parameters_of(role)        {name: parameter} of what training the role changes
    reset(role)                start the role from the teacher again, in place
    """

    velocity: Callable[..., Tensor]
    parameters_of: Callable[[str], dict[str, nn.Parameter]]
    reset: Callable[[str], None]


def student_role(k: int) -> str:
    """The student's expert of phase k."""
    return f"student{k}"


def fake_role(expert: int, depth: int | None = None) -> str:
    """The fake beside the teacher's expert; with a fake for each truncation depth, that one."""
    return f"fake{expert}" + (f".depth{depth}" if depth else "")


def fake_roles(phase: Phase, per_depth: bool) -> list[str]:
    """Every fake that a phase trains."""
    depths = range(1, phase.depths + 1) if per_depth else [None]
    return [fake_role(part.expert, depth) for part in phase.parts for depth in depths]


def run_roles(phases: list[Phase], per_depth: bool) -> list[str]:
    """Every trained role of a run, each once."""
    fakes = [role for phase in phases for role in fake_roles(phase, per_depth)]
    return [student_role(phase.k) for phase in phases] + list(dict.fromkeys(fakes))


def separate_networks(
    names: list[str], make: Callable[[], nn.Module], start: dict, teacher
) -> Roles:
    """Roles with a network each, all from the tensors `start`; the teacher is a function."""
    networks = {name: make() for name in names}

    def velocity(role, x_t, t, c=None):
        return teacher(x_t, t, c) if role == "teacher" else networks[role](x_t, t, c)

    def reset(role):
        networks[role].load_state_dict(start)

    for name in names:
        reset(name)
    return Roles(velocity, lambda role: dict(networks[role].named_parameters()), reset)


def by_step(velocity: Callable, phases: list[Phase]) -> list[Callable]:
    """The student's network of each of the N steps: v = nets[i](x_t, t, c)."""
    owners = [student_role(phase.k) for phase in phases for _ in range(phase.depths)]
    return [partial(velocity, role) for role in owners]


def by_time(high: Callable, low: Callable, boundary_t: float) -> Callable:
    """A network that asks `high` for samples with t >= boundary_t and `low` for the others.

    It waits for the device to know who is whose; the loop draws one expert for an update instead.
    """

    def net(x_t, t, c=None):
        v = torch.empty_like(x_t, dtype=torch.float32)
        for expert, mine in ((high, t >= boundary_t), (low, t < boundary_t)):
            if mine.any():
                v[mine] = expert(x_t[mine], t[mine], select(c, mine))
        return v

    return net


def by_depth(nets: list[Callable], depth: Tensor) -> Callable:
    """A network that asks nets[j - 1] for the rows of truncation depth j; depth (B,) on the CPU."""

    def net(x_t, t, c=None):
        v = torch.empty_like(x_t, dtype=torch.float32)
        for j in depth.unique().tolist():
            mine = (depth == j).nonzero()[:, 0].to(x_t.device)
            v[mine] = nets[j - 1](x_t[mine], t[mine], select(c, mine))
        return v

    return net


def select(c: dict | None, rows) -> dict | None:
    """Conditions of some rows of the batch (a slice, a mask or indices)."""
    return c and {name: value[rows] for name, value in c.items()}


def concatenate(cs: list[dict | None]) -> dict | None:
    """Conditions of several batches as one."""
    return cs[0] and {name: torch.cat([c[name] for c in cs]) for name in cs[0]}


def move(c: dict | None, device) -> dict | None:
    """Conditions on another device."""
    return c and {name: value.to(device) for name, value in c.items()}
