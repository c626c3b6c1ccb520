"""Memory and time of a run before it starts, at any size, without weights and without a GPU.

Run networks of 2 and 3 blocks on the meta device, count live bytes and FLOPs, and extrapolate: all
blocks are identical. Only matrix products count as FLOPs.
"""

import gc
import importlib
import math
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from config import Config
from models import lora, parallel
from models.parallel import Topology, blocks_of
from models.weights import build, dtype_named, teacher_spec

ASSUMED_FLOPS = 400e12  # per second, where there is no GPU to measure: bf16 on an H100
IN_FLIGHT = 3  # blocks that FSDP holds: as received, as used, and the next one

# -- one sample through one network --------------------------------------------------------------


class Flops(NamedTuple):
    """FLOPs of one sample through one network."""

    forward: float
    training: float  # of forward and backward
    recomputed: float  # what the checkpointing of blocks adds to it


class Activations(NamedTuple):
    """Bytes of one sample through one network, without weights, gradients and moments."""

    forward_peak: float  # of a forward without gradient
    saved: float  # what a forward with gradient keeps for backward
    backward_peak: float  # of a forward with gradient and its backward


@lru_cache(maxsize=64)
def cost(
    measure: Callable,
    teacher: str,
    shape: tuple,
    full: bool,
    rank: int,
    dtype: torch.dtype,
    checkpointing: bool,
    sharded: bool = False,
    int8: bool = False,
) -> Flops | Activations:
    """Flops or Activations of a role, a LoRA or all parameters (full), at this shape (C, ...).

    measure: count_flops or count_bytes; each takes seconds.
    sharded: FSDP gathers full parameters in dtype, so no layer casts them from float32.
    """
    layers = teacher_spec(teacher).settings["num_layers"]
    costs = []
    for n in (2, 3):
        net = teacher_network(teacher, dtype, int8, layers=n)
        net.checkpointing = checkpointing
        if full:
            (net if sharded else net.float()).requires_grad_(True)
        else:
            lora.add_adapter(net, "role", rank, device="meta")
        for p in net.parameters():
            if p.requires_grad:  # phase_memory counts gradients: discard each as it is made
                p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
        costs.append(measure(net, meta_inputs(net, shape), None if full else "role"))
    two, three = costs
    return type(two)(*(a + (b - a) * (layers - 2) for a, b in zip(two, three)))


def count_flops(net: nn.Module, inputs: tuple, adapter: str | None) -> Flops:
    """Run a network on the meta device and count its FLOPs."""
    with FlopCounterMode(display=False) as counter:
        v = net(*inputs, adapter)
        forward = counter.get_total_flops()
        v.backward(torch.empty_like(v))
    recomputed = forward if net.checkpointing else 0
    return Flops(forward, counter.get_total_flops() - recomputed, recomputed)


def count_bytes(net: nn.Module, inputs: tuple, adapter: str | None) -> Activations:
    """Run a network on the meta device and count the bytes of its activations."""
    known = [*tree_leaves(inputs), *net.parameters()]
    with MemoryTracker(known) as tracker, torch.no_grad():
        net(*inputs, adapter)
    forward_peak = tracker.peak
    with MemoryTracker(known) as tracker:
        v = net(*inputs, adapter)
        saved = tracker.now
        v.backward(torch.empty_like(v))
    return Activations(forward_peak, saved, tracker.peak)


class MemoryTracker(TorchDispatchMode):
    """Count the bytes of all tensors that operations make, except known ones: now and at most."""

    def __init__(self, known: list[Tensor]):
        super().__init__()
        self.now, self.peak, self.sizes = 0, 0, {}  # sizes: storage -> bytes
        self.known = {x.untyped_storage()._cdata for x in known}

    def __enter__(self):
        importlib.import_module("torch._dynamo")  # operations under a mode import it, slowly
        gc.collect()
        gc.freeze()  # the collections below skip what exists already
        return super().__enter__()

    def __exit__(self, *error):
        gc.unfreeze()
        super().__exit__(*error)

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out = operation(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                self.add(x.untyped_storage())
        gc.collect()  # recomputation leaves reference cycles under a dispatch mode
        self.peak = max(self.peak, self.now)
        return out

    def add(self, storage: torch.UntypedStorage) -> None:
        """Count a storage until it is freed."""
        key = storage._cdata
        if key not in self.known and key not in self.sizes:
            self.sizes[key] = storage.nbytes()
            self.now += storage.nbytes()
            weakref.finalize(storage, self.remove, key)

    def remove(self, key: int) -> None:
        """Stop counting a storage that was freed."""
        self.now -= self.sizes.pop(key)


def teacher_network(
    teacher: str, dtype: torch.dtype, int8: bool = False, layers: int | None = None
) -> nn.Module:
    """A teacher's network on the meta device, frozen, with this many blocks."""
    spec = teacher_spec(teacher)
    settings = spec.settings | ({"num_layers": layers} if layers else {})
    net = build(spec.network, settings, dtype).requires_grad_(False)
    return lora.store_int8(net) if int8 else net


def meta_inputs(net: nn.Module, shape: tuple) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """x_t, t and c of one sample with the longest prompt, on the meta device."""
    with torch.device("meta"):
        x, t = torch.empty(1, *shape), torch.empty(1)
        c = {"text": torch.empty(1, net.text_len, net.text_dim)}
        if net.image_channels:
            c["image"] = torch.empty(1, net.image_channels, *shape[1:])
        return x, t, c


# -- weights -------------------------------------------------------------------------------------


class RoleBytes(NamedTuple):
    """Bytes of a role's network in one process."""

    base: float  # frozen parameters
    role: float  # trained parameters, float32; gradients and second moments are as large
    gathered: float  # FSDP: parameters of other ranks at the peak, whole gradients of a block


@lru_cache(maxsize=64)
def role_bytes(
    teacher: str, full: bool, rank: int, dtype: torch.dtype, topology: Topology, int8: bool = False
) -> RoleBytes:
    """Bytes of a LoRA on a frozen network, or of a network whose parameters are all trained."""
    net = teacher_network(teacher, dtype, int8)
    if full:
        net.float().requires_grad_(True)
    else:
        lora.add_adapter(net, "role", rank, device="meta")
    ranks = topology.shard_group
    replicated = set(parallel.replicated_parameters(net))
    block_of = {p: i for i, block in enumerate(blocks_of(net)) for p in block.parameters()}
    stored = Counter()  # by requires_grad
    gathered = Counter()  # by block; None: outside
    gradients = Counter()
    for p in net.parameters():
        is_sharded = topology.processes > 1 and p not in replicated
        count = -(-len(p) // ranks) * p[0].numel() if is_sharded else p.numel()  # in this process
        stored[p.requires_grad] += count * p.element_size()
        if is_sharded:
            block = block_of.get(p)
            itemsize = p.element_size() if block is None else dtype.itemsize  # as it is gathered
            gathered[block] += ranks * count * itemsize
            gradients[block] += ranks * count * (itemsize + 4) if p.requires_grad else 0
    outside = gathered.pop(None, 0)
    weights_gathered = outside + IN_FLIGHT * max(gathered.values(), default=0)
    gradients_gathered = max(gradients.values(), default=0)
    return RoleBytes(stored[False], stored[True], weights_gathered + gradients_gathered)


# -- a run ---------------------------------------------------------------------------------------


def role_kind(cfg: Config, name: str) -> str:
    """What a role trains: "lora" or "full"."""
    return cfg.train_student if name.startswith("student") else cfg.train_fake


def role_cost(measure: Callable, cfg: Config, name: str, shape: tuple, sharded: bool = False):
    """Flops or Activations of a sample of this shape through a trained role."""
    full = role_kind(cfg, name) == "full"
    checkpointing = cfg.checkpointing
    options = cfg.rank, dtype_named(cfg.dtype), checkpointing, full and sharded
    return cost(measure, cfg.teacher, shape, full, *options, cfg.base == "int8")


def num_micro_batches(cfg: Config) -> int:
    """Number of micro-batches of a batch."""
    return math.ceil(cfg.batch / (cfg.micro_batch or cfg.batch))


class Memory(NamedTuple):
    """Peak bytes of a phase in one process, and what they are."""

    bases: float  # the teacher's networks
    roles: float  # parameters of all roles, second moments of the trained ones
    gradients: float  # of one role: the roles take turns
    activations: float
    gathered: float  # see RoleBytes

    @property
    def peak(self) -> float:
        return sum(self)


def phase_memory(cfg: Config, active, shape: tuple | None, topology: Topology) -> Memory:
    """Peak of a phase with these moe.ActiveRoles, in micro-batches of samples of this shape.

    shape None: without activations, which is quick.
    """
    options = cfg.rank, dtype_named(cfg.dtype), replace(topology, context_parallel=1)  # as cached
    bytes_of = lambda full: role_bytes(cfg.teacher, full, *options, cfg.base == "int8" and not full)
    size_of = lambda name: bytes_of(role_kind(cfg, name) == "full")
    bases = len(active.bases) * bytes_of(False).base
    names = {*active.frozen, *active.trained}
    if topology.processes > 1:  # FSDP shards a base together with the adapters of all phases
        loaded = [name for name, base in active.branch_of.items() if base in active.bases]
        names |= {name for name in loaded if role_kind(cfg, name) == "lora"}
    moments = sum(size_of(name).role for name in active.trained)  # the second ones
    roles = sum(size_of(name).role for name in names) + moments
    samples = (cfg.micro_batch or cfg.batch) / topology.context_parallel
    peaks = update_activations(cfg, active.trained, shape, topology.processes > 1)
    memories = []  # while each of the roles is updated
    for name, activations in peaks.items():
        size = size_of(name)
        memories.append(Memory(bases, roles, size.role, samples * activations, size.gathered))
    return max(memories, key=lambda memory: memory.peak)


def update_activations(
    cfg: Config, trained: list[str], shape: tuple | None, sharded: bool
) -> dict[str, float]:
    """Peak bytes of activations of one sample while each of the roles is updated."""
    if shape is None:
        return dict.fromkeys(trained, 0.0)
    costs = {name: role_cost(count_bytes, cfg, name, shape, sharded) for name in trained}
    forward_peak = max(x.forward_peak for x in costs.values())  # rollouts, v_real, v_fake
    peaks = {name: max(forward_peak, x.backward_peak) for name, x in costs.items()}
    student = costs[trained[0]]
    if not cfg.truncate:  # the graphs of all steps of the phase
        steps = cfg.steps // cfg.phases
        waiting = steps * student.saved
        others = (steps - 1) * student.saved
    elif not cfg.checkpointing:
        waiting = student.saved
        others = 0
    else:  # rollout keeps only the input of the step while teacher and fake are called
        waiting = 0
        others = 0
    peaks[trained[0]] = max(waiting + forward_peak, others + student.backward_peak)
    return peaks


def step_flops(cfg: Config, phase, buckets: dict[tuple, float]) -> tuple[float, float]:
    """Expected FLOPs of an iteration of a phase, all samples: useful, recomputed in backward."""
    # forwards without gradient: the rollouts of the fake; those of the student's update but for the
    # steps that it trains; v_real, twice with CFG; v_fake. Then the training of student and fake
    truncated = cfg.truncate
    trained = 1 if truncated else phase.num_steps
    complete = phase.first + phase.num_steps  # steps of a rollout
    mean = phase.first + (1 + phase.num_steps) / 2 if truncated else complete
    rollouts = 1 if cfg.reuse_rollouts else cfg.fake_updates
    student_forwards = rollouts * (complete if cfg.fake_rollout == "complete" else mean)
    student_forwards += mean - trained
    teacher_forwards = 1 + any(scale != 1 for scale in cfg.guidance)
    step_recomputed = truncated and cfg.checkpointing  # see rollout
    useful = recomputed = 0.0
    for shape, probability in buckets.items():  # the expectation over shapes
        student, fake = (role_cost(count_flops, cfg, x, shape) for x in ("student1", "fake1"))
        n = cfg.batch * probability
        useful += n * (student_forwards * student.forward + trained * student.training)
        useful += n * (teacher_forwards * student.forward + fake.forward)
        useful += n * cfg.fake_updates * fake.training
        recomputed += n * (cfg.fake_updates * fake.recomputed + trained * student.recomputed)
        recomputed += n * step_recomputed * student.forward
    return useful, recomputed


# -- the device ----------------------------------------------------------------------------------


def find_gpus(device: torch.device) -> tuple[int, float]:
    """How many GPUs there are beside this device, and bytes to plan with on this one."""
    if device.type == "cuda":
        return torch.cuda.device_count(), room_of(torch.cuda.mem_get_info(device)[0])
    if device.type == "mps":
        return 1, room_of(torch.mps.recommended_max_memory())
    return 0, room_of(0)


def room_of(free: float) -> float:
    """Bytes to plan with where `free` bytes are free."""
    return 0.95 * free - 3e9  # gaps; kernels' workspaces and what is not planned


def room_of_card(gigabytes: int) -> float:
    """Bytes to plan with on an idle card that is sold with so many GB."""
    return room_of(gigabytes * 2**30 - 5e8)


@lru_cache
def peak_flops(dtype: torch.dtype, device: str) -> float:
    """FLOP/s to compute MFU with: of a large matrix product on a GPU, assumed elsewhere."""
    print("counting FLOPs")  # as the callers do next; it takes seconds
    if torch.device(device).type != "cuda":
        return ASSUMED_FLOPS
    n = 8192
    count = 10
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.mm(a, b)  # a warm-up
    start.record()
    for _ in range(count):
        torch.mm(a, b)
    end.record()
    end.synchronize()
    return 2 * n**3 * count / (start.elapsed_time(end) / 1e3)  # ms


# -- the report ----------------------------------------------------------------------------------


def format_plan(
    cfg: Config,
    phases: list,
    active: list,
    buckets: dict[tuple, float],
    device: str,
    topology: Topology,
) -> str:
    """Memory and time as a table, one row per phase. active: moe.ActiveRoles of each phase."""
    rate = peak_flops(dtype_named(cfg.dtype), device)
    shape = max(buckets, key=math.prod)  # the largest decides on the memory
    parts = Memory._fields if topology.processes > 1 else Memory._fields[:-1]
    header = ["phase", *parts, "peak", "PFLOP", "recomputed", "s/iteration", "days"]
    memories = [phase_memory(cfg, roles, shape, topology) for roles in active]
    rows = []
    for phase, memory in zip(phases, memories):
        flops = step_flops(cfg, phase, buckets)
        seconds = sum(flops) / rate / topology.processes
        gigabytes = [getattr(memory, name) / 1e9 for name in (*parts, "peak")]
        petaflops = [x / 1e15 for x in flops]
        rows.append([phase.k, *gigabytes, *petaflops, seconds, seconds * cfg.iters / 86400])
    latents = f"{cfg.micro_batch or cfg.batch} x ({' x '.join(map(str, shape))}) latents"
    lines = [f"GB per process, of {topology.processes}, with micro-batches of {latents}"]
    lines += format_table(header, rows)
    total = sum(row[-1] for row in rows)
    days = f"{total:,.3g} days at {rate / 1e12:,.4g} TFLOP/s per process"
    bound = "a lower bound: only matrix products are counted"
    lines.append(f"{len(phases)} x {cfg.iters} iterations: {days}, {bound}")
    gpus, room = find_gpus(torch.device(device))
    if gpus:
        peak = max(memory.peak for memory in memories)
        verb = "fits" if peak < room else "does not fit"
        lines.append(f"{peak / 1e9:.1f} GB {verb} into the {room / 1e9:.1f} GB free on this GPU")
    return "\n".join(lines)


def format_table(header: list[str], rows: list[list[float]]) -> list[str]:
    """Lines of a table with aligned columns, of which the first is a phase."""
    number = lambda x: f"{x:,.1f}" if x >= 10 else f"{x:.3g}"
    cells = [header, *([str(k), *map(number, numbers)] for k, *numbers in rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    return ["  ".join(text.rjust(n) for text, n in zip(row, widths)) for row in cells]
