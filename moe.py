"""Roles: the parts that networks play, and which network of the teacher each of them starts from.

The student is a mixture of experts over time: one expert per phase, chosen by the *index* of the
step. The teacher, and with it the fake, has one or two branches (Wan2.2: a high-noise and a
low-noise network), chosen by t. A role is called as v = role(x_t, t, c). Its name, such as
"teacher1", "student2" or "fake1", names its adapter and its tensors in a checkpoint: students are
numbered by phase, teachers and fakes by branch.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from phases import Phase, branch_at


@dataclass
class Role:
    """A network as the method sees it: v = role(x_t, t, c), and the parameters that train.

    velocity    v (B, ...) float32 at x_t (B, ...), t (B,), under the conditions c. For a role on a
                shared network it passes the adapter's name down the call. It never sets it as a
                state of the network: blocks that are recomputed in backward would read it too late.
    initialise  start the role from the teacher, in place, and return {name: parameter}
    """

    name: str
    velocity: Callable[..., Tensor]
    initialise: Callable[[], dict[str, nn.Parameter]] | None = None
    parameters: dict[str, nn.Parameter] = field(default_factory=dict)

    def __call__(self, x_t: Tensor, t: Tensor, c: dict | None = None) -> Tensor:
        return self.velocity(x_t, t, c)

    def start(self) -> None:
        """Start from the teacher's weights. The first call also allocates the parameters."""
        self.parameters = self.initialise()


class Roles(NamedTuple):
    """All roles of a run. `depth` is 0 where one fake serves all truncation depths."""

    teacher: dict[int, Role]  # by branch; guidance included
    student: dict[int, Role]  # by phase
    fakes: dict[tuple[int, int], Role]  # by branch and depth


# -- which role is on which branch ----------------------------------------------------------------


def start_branch(phase: Phase, boundary_t: float | None) -> int:
    """The branch of the phase's last step: its expert starts from this network."""
    return branch_at(phase.t[-2], boundary_t)


def fake_keys(phase: Phase, per_depth: bool) -> list[tuple[int, int]]:
    """(branch, depth) of every fake that a phase trains."""
    depths = range(1, phase.num_steps + 1) if per_depth else [0]
    return [(interval.branch, depth) for interval in phase.intervals for depth in depths]


def fake_name(branch: int, depth: int) -> str:
    """fake1, or fake1-depth2."""
    return f"fake{branch}" + (f"-depth{depth}" if depth else "")


def trained_names(
    phases: list[Phase], per_depth: bool, boundary_t: float | None = None
) -> dict[str, int]:
    """Name -> branch that it starts from, for every trained role of a run."""
    students = {f"student{phase.k}": start_branch(phase, boundary_t) for phase in phases}
    keys = [key for phase in phases for key in fake_keys(phase, per_depth)]
    return students | {fake_name(*key): key[0] for key in keys}


class ActiveRoles(NamedTuple):
    """What a phase keeps in memory. Wan2.2 needs branch 1 in phase 1 and both in phase 2."""

    bases: list[int]  # branches of the teacher
    frozen: list[str]  # experts of earlier phases
    trained: list[str]  # the expert of this phase, then its fakes
    branch_of: dict[str, int]  # every trained role of the run -> its branch


def active_roles(
    phases: list[Phase], k: int, per_depth: bool, boundary_t: float | None
) -> ActiveRoles:
    """The active roles of phase k."""
    names = trained_names(phases, per_depth, boundary_t)
    frozen = [f"student{i}" for i in range(1, k)]
    fakes = [fake_name(*key) for key in fake_keys(phases[k - 1], per_depth)]
    trained = [f"student{k}", *fakes]
    return ActiveRoles(sorted({names[n] for n in frozen + trained}), frozen, trained, names)


# -- making roles ---------------------------------------------------------------------------------


def separate_roles(
    phases: list[Phase],
    per_depth: bool,
    make_network: Callable[[], nn.Module],
    start: dict[str, Tensor],
    teacher: Callable[..., Tensor],
) -> Roles:
    """A network of its own for every trained role, from the tensors `start`; for small networks.

    teacher: v = teacher(x_t, t, c), which may be an exact formula; both branches, if it has two.
    """

    def make_role(name: str) -> Role:
        network = make_network()

        def initialise() -> dict[str, nn.Parameter]:
            network.load_state_dict(start)
            return dict(network.named_parameters())

        return Role(name, network, initialise)

    teachers = {branch: Role(f"teacher{branch}", teacher) for branch in (1, 2)}
    return collect_roles(phases, per_depth, teachers, make_role)


def collect_roles(
    phases: list[Phase], per_depth: bool, teacher: dict[int, Role], make_role: Callable[[str], Role]
) -> Roles:
    """The roles of all phases, each made once: phases may share the names of their fakes."""
    keys = dict.fromkeys(key for phase in phases for key in fake_keys(phase, per_depth))
    return Roles(
        teacher,
        {phase.k: make_role(f"student{phase.k}") for phase in phases},
        {key: make_role(fake_name(*key)) for key in keys},
    )


def student_nets(roles: Roles, phases: list[Phase]) -> list[Role]:
    """The student's network of each step: v = nets[i](x_t, t, c). Routed by index, not by t."""
    return [roles.student[phase.k] for phase in phases for _ in range(phase.num_steps)]


def chunked(net: Callable, size: int) -> Callable:
    """The same network, called with at most `size` samples at a time to limit memory."""

    def call(x_t: Tensor, t: Tensor, c: dict | None = None) -> Tensor:
        chunks = [slice(i, i + size) for i in range(0, len(x_t), size)]
        return torch.cat([net(x_t[rows], t[rows], index_cond(c, rows)) for rows in chunks])

    return call


# -- conditions: None, or a flat dict of tensors with the batch first -----------------------------


def index_cond(c: dict | None, rows: slice | Tensor) -> dict | None:
    """The conditions of some samples of the batch."""
    return None if c is None else {name: value[rows] for name, value in c.items()}


def cond_to(c: dict | None, device: torch.device) -> dict | None:
    """The conditions on another device."""
    return None if c is None else {name: to_device(x, device) for name, x in c.items()}


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """A tensor on another device; pinned, so that the host need not wait for the copy."""
    is_gpu = torch.device(device).type == "cuda"
    return (x.pin_memory() if is_gpu else x).to(device, non_blocking=True)
