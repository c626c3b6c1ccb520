"""Which expert owns a step or a time, and the roles that networks play.

A student is a list of experts, one for each phase, routed by the *index* of a step: routing by t
disagrees with it at large shifts. A teacher or a fake may be several networks, routed by t.
A role ("teacher1", "student1", "fake1") is an argument of a call and never a state of a network:
a state would be read again when activation checkpointing recomputes, and be wrong by then.
"""

import re
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

    The number in a role is its phase if it is a student, else its expert of the teacher.
    """

    velocity: Callable[..., Tensor]
    parameters_of: Callable[[str], dict[str, nn.Parameter]]
    reset: Callable[[str], None]


def teacher_role(expert: int) -> str:
    """The teacher's expert, guidance included."""
    return f"teacher{expert}"


def student_role(k: int) -> str:
    """The student's expert of phase k."""
    return f"student{k}"


def fake_role(expert: int, depth: int | None = None) -> str:
    """The fake beside the teacher's expert; with a fake for each truncation depth, that one."""
    return f"fake{expert}" + (f"-depth{depth}" if depth else "")


def fake_roles(phase: Phase, per_depth: bool) -> list[str]:
    """Every fake that a phase trains."""
    depths = range(1, phase.depths + 1) if per_depth else [None]
    return [fake_role(part.expert, depth) for part in phase.parts for depth in depths]


def run_roles(phases: list[Phase], per_depth: bool) -> list[str]:
    """Every trained role of a run, each once."""
    fakes = [role for phase in phases for role in fake_roles(phase, per_depth)]
    return [student_role(phase.k) for phase in phases] + list(dict.fromkeys(fakes))


def expert_at(t: float, boundary_t: float | None) -> int:
    """The teacher's expert that owns the time t: 1 down to the boundary, which is its own."""
    return 1 if boundary_t is None or t >= boundary_t else 2


def expert_of(role: str, phases: list[Phase], boundary_t: float | None) -> int:
    """The teacher's expert that a role is, is trained beside, or starts from.

    A student starts from the one that owns the last step of its phase.
    """
    kind, number = re.match(r"([a-z]+)(\d+)", role).groups()
    is_student = kind == "student"
    return expert_at(phases[int(number) - 1].t[-2], boundary_t) if is_student else int(number)


class Held(NamedTuple):
    """What a phase has in memory."""

    experts: list[int]  # of the teacher: the networks that its roles are, or start from
    frozen: list[str]  # students of earlier phases
    trained: list[str]  # its student, then its fakes
    homes: dict[str, int]  # every role of the run -> the expert whose network it is on


def held(phases: list[Phase], per_depth: bool, boundary_t: float | None) -> list[Held]:
    """The Held of each phase: of Wan2.2's first the high-noise expert alone, of its second both."""
    found, roles = [], run_roles(phases, per_depth)
    homes = {role: expert_of(role, phases, boundary_t) for role in roles}
    for phase in phases:
        earlier = [student_role(k) for k in range(1, phase.k)]
        trained = [student_role(phase.k), *fake_roles(phase, per_depth)]
        experts = {homes[role] for role in (*earlier, *trained)}
        found.append(Held(sorted(experts), earlier, trained, homes))
    return found


def separate_networks(
    names: list[str], make: Callable[[], nn.Module], start: dict | None, teacher
) -> Roles:
    """Roles with a network each, all from the tensors `start`; the teacher is a function."""
    networks = {name: make() for name in names}

    def velocity(role, x_t, t, c=None):
        return networks[role](x_t, t, c) if role in networks else teacher(x_t, t, c)

    def reset(role):
        networks[role].load_state_dict(start)

    for name in names if start else ():
        reset(name)
    return Roles(velocity, lambda role: dict(networks[role].named_parameters()), reset)


def shared_networks(
    network: Callable[[int], nn.Module],
    expert: Callable[[str], int],
    adapt: Callable[[nn.Module, str], dict | None],
    copy: Callable[[nn.Module, nn.Module | None], nn.Module],
    guided: Callable,
) -> Roles:
    """Roles on the frozen networks of a teacher, each of which is in memory once.

    network(e)        the teacher's expert e, ready to be called
    expert(role)      expert_of, whose network the role is on
    adapt(net, role)  start an adapter of that name, return its parameters; None for a role that
                      has parameters of its own, which
    copy(net, old)    makes from the network's, in the place of old ones
    guided(e)         v = f(net, x_t, t, c) of the teacher's expert e
    """
    adapters, own = {}, {}  # parameters, networks, of the roles that have been asked for

    def velocity(role, x_t, t, c=None):
        if role in own:
            return own[role](x_t, t, c)
        net = network(expert(role))
        if role.startswith("teacher"):
            return guided(expert(role))(net, x_t, t, c)
        return net(x_t, t, c, adapter=role)

    def reset(role):
        net = network(expert(role))
        parameters = adapt(net, role)
        if parameters is None:
            own[role] = copy(net, own.get(role))
        else:
            adapters[role] = parameters

    def parameters_of(role):
        if role not in adapters and role not in own:
            reset(role)
        return dict(own[role].named_parameters()) if role in own else adapters[role]

    return Roles(velocity, parameters_of, reset)


def owners(phases: list[Phase]) -> list[str]:
    """The student's role that takes each of the N steps."""
    return [student_role(phase.k) for phase in phases for _ in range(phase.depths)]


def by_step(velocity: Callable, phases: list[Phase]) -> list[Callable]:
    """The student's network of each of the N steps: v = nets[i](x_t, t, c)."""
    return [partial(velocity, role) for role in owners(phases)]


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


def in_passes(net: Callable, size: int) -> Callable:
    """The same network, asked for `size` samples at a time: memory is that of one pass."""

    def sliced(x_t, t, c=None):
        rows = [slice(i, i + size) for i in range(0, len(x_t), size)]
        return torch.cat([net(x_t[row], t[row], select(c, row)) for row in rows])

    return sliced


def select(c: dict | None, rows) -> dict | None:
    """Conditions of some rows of the batch (a slice, a mask or indices)."""
    return c and {name: value[rows] for name, value in c.items()}


def concatenate(cs: list[dict | None]) -> dict | None:
    """Conditions of several batches as one."""
    return cs[0] and {name: torch.cat([c[name] for c in cs]) for name in cs[0]}


def move(c: dict | None, device) -> dict | None:
    """Conditions on another device."""
    return c and {name: value.to(device) for name, value in c.items()}
