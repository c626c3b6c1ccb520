"""Memory and time of a run before it: counted on the meta device, at any size, without weights.

Networks of two and of three blocks run on tensors without contents, and every byte that lives and
every product is counted; blocks are alike, so that more of them follow. What a GPU's allocator and
its libraries take on top (about 1 GB) is not in it.
"""

import gc
import weakref
from collections import Counter
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from models import lora, parallel, speed
from models.bases import pieces
from models.parallel import blocks_of
from models.qwen_image import QwenImage
from models.weights import build, row_of

TEXT = 512  # tokens of a long prompt
SPARE = 1.5e9  # bytes of a GPU that its libraries take


class Live(TorchDispatchMode):
    """Bytes of all tensors that operations made and that still live: now, and at most."""

    def __init__(self, there: list):
        super().__init__()
        self.now, self.peak, self.bytes = 0, 0, {}
        self.there = {x.untyped_storage()._cdata for x in there}  # from before

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out = operation(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor):
                self.count(x.untyped_storage())
        gc.collect()  # a mode leaves cycles behind where checkpointing recomputes
        self.peak = max(self.peak, self.now)
        return out

    def count(self, storage) -> None:
        """A storage lives, unless it is known."""
        key = storage._cdata
        if key not in self.there and key not in self.bytes:
            self.bytes[key] = storage.nbytes()
            self.now += storage.nbytes()
            weakref.finalize(storage, self.free, key)

    def free(self, key) -> None:
        """A storage is gone."""
        self.now -= self.bytes.pop(key)


class Cost(NamedTuple):
    """One sample through one network. Bytes are beyond weights, gradients and moments."""

    forward: float  # operations of a forward
    training: float  # of forward and backward
    recomputed: float  # of those, once more with activation checkpointing
    idle: float  # peak bytes of a forward without gradient
    kept: float  # bytes that a recorded forward holds
    learning: float  # peak bytes of a recorded forward and its backward


@lru_cache(maxsize=64)
def cost(
    teacher: str, shape: tuple, own: bool, rank: int, dtype: torch.dtype, checkpointing: bool,
    cut: bool = False,
):  # fmt: skip
    """Cost of a sample of this shape (C, ...); own: of a role with parameters of its own.

    cut: over processes, which gather them in the dtype of the inside; nothing casts them again.
    """
    row = row_of(teacher)
    blocks = row.settings["num_layers"]
    how = shape, own, rank, dtype, checkpointing, cut
    with parallel.planned("1", 1):  # what is counted is one sample in one process
        two, three = (Cost(*_count(row, n, *how)) for n in (2, 3))
    return Cost(*(a + (b - a) * (blocks - 2) for a, b in zip(two, three)))


def _count(row, blocks: int, shape, own: bool, rank: int, dtype, checkpointing: bool, cut: bool):
    """The Cost of a network of so few blocks, by running it."""
    net = meta_network(row, dtype, blocks)
    net.checkpointing = checkpointing
    with torch.device("meta"):
        adapter = None if own else "role"
        if own:
            (net if cut else net.float()).requires_grad_(True)
        else:
            lora.start_adapter(net, adapter, ("plan",), rank)
        x, t, c = torch.empty(1, *shape), torch.empty(1), conditions(net, shape)
    for p in net.parameters():
        if p.requires_grad:  # gradients are counted elsewhere: here each goes as it has come
            p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    there = [x, t, *c.values(), *net.parameters()]
    with FlopCounterMode(display=False) as flops:
        v = net(x, t, c, adapter)
        forward = flops.get_total_flops()
        v.backward(torch.empty_like(v))
    total, recomputed = flops.get_total_flops(), forward if checkpointing else 0
    del v
    gc.collect()
    gc.freeze()  # what is there already need not be looked at after every operation
    try:  # not together with the counter, whose hooks keep tensors alive
        with Live(there) as live, torch.no_grad():
            net(x, t, c, adapter)
        idle = live.peak
        with Live(there) as live:
            v = net(x, t, c, adapter)
            kept = live.now
            v.backward(torch.empty_like(v))
        return forward, total - recomputed, recomputed, idle, kept, live.peak
    finally:
        gc.unfreeze()


def meta_network(row, dtype: torch.dtype, blocks: int | None = None) -> nn.Module:
    """A teacher's network on the meta device, frozen, each parameter in the dtype it is kept in."""
    settings = row.settings | ({"num_layers": blocks} if blocks else {})
    return build(row.network, settings, dtype).requires_grad_(False)


def conditions(net: nn.Module, shape: tuple) -> dict:
    """Conditions of one sample, of the longest text."""
    if isinstance(net, QwenImage):
        return {"text": torch.empty(1, TEXT, net.txt_in.in_features)}
    c = {"text": torch.empty(1, net.text_len, net.text_embedding[0].in_features)}
    image = net.patch_embedding.in_channels - shape[0]
    return c | ({"image": torch.empty(1, image, *shape[1:])} if image else {})


# -- a run ---------------------------------------------------------------------------------------


class Sizes(NamedTuple):
    """Bytes of what one expert of a teacher brings."""

    base: int  # the frozen network
    block: int  # one of its blocks
    outside: int  # what is not in blocks
    pinned: int  # the base in pinned host memory
    pinned_blocks: int  # its blocks there
    lora: int  # an adapter, float32
    own: int  # parameters of a role's own, float32


def sizes(teacher: str, rank: int, dtype: torch.dtype) -> Sizes:
    """The Sizes of a teacher."""
    net = meta_network(row_of(teacher), dtype)
    count = lambda ps: sum(p.numel() * p.element_size() for p in ps)
    pinned = lambda ps: pieces([p.numel() * p.element_size() for p in ps])
    base, block = count(net.parameters()), count(blocks_of(net)[0].parameters())
    outside = base - block * len(blocks_of(net))
    held = pinned(net.parameters()), pinned(blocks_of(net).parameters())
    own = 4 * sum(p.numel() for p in net.parameters())
    adapter = count(lora.start_adapter(net, "role", ("plan",), rank, device="meta").values())
    return Sizes(base, block, outside, *held, adapter, own)


class Shared(NamedTuple):
    """Bytes of a network in one of the processes that share it. Of one process: nothing is sent."""

    mine: float  # parameters
    learnt: float  # of those, what one role learns, float32
    gathered: float  # what is there of all at most while it is at work
    gradients: float  # of a block's whole gradients, before they are summed and cut
    sent: float  # to gather all, once
    summed: float  # sent to sum the gradients of one role


IN_FLIGHT = 3  # blocks: as it came, as it is used, the next as it comes


@lru_cache(maxsize=64)
def shared(teacher: str, own: bool, adapters: int, rank: int, dtype, here) -> Shared:
    """own: of a role with parameters of its own; else of a base with so many adapters.

    Sent is what a ring sends: (n - 1) / n of a whole, for a sum over nodes twice that.
    """
    net = meta_network(row_of(teacher), dtype)
    if own:
        net.float().requires_grad_(True)
    for i in range(adapters):
        lora.add_adapter(net, str(i), rank, device="meta")
    roles = net.named_parameters() if own else lora.parameters(net, "0").items() if adapters else ()
    learns, kept = {p for _, p in roles}, set(parallel.kept(net))
    blocks = {p: i for i, block in enumerate(blocks_of(net)) for p in block.parameters()}
    n, mine, learnt, sent, summed = here.sharers, 0, 0, 0, 0
    gathered, gradients = Counter(), Counter()  # by block; None: outside
    for p in net.parameters():
        piece, block = -(-len(p) // n) * p[0].numel(), blocks.get(p)
        cut = here.processes > 1 and p not in kept
        mine += p.element_size() * (piece if cut else p.numel())
        learnt += 4 * (piece if cut else p.numel()) * (p in learns)
        if cut:
            size = p.element_size() if block is None else dtype.itemsize
            gathered[block] += n * piece * size
            sent += (n - 1) * piece * size
        if cut and p in learns:
            gradients[block] += n * piece * (size + 4)
            summed += 4 * piece * (n - 1 + 2 * (here.nodes - 1) / here.nodes)
        elif p in learns:
            summed += 2 * (here.processes - 1) / here.processes * p.nbytes
    inside = max((x for block, x in gathered.items() if block is not None), default=0)
    most = max(gradients.values(), default=0)
    return Shared(mine, learnt, gathered[None] + IN_FLIGHT * inside, most, sent, summed)


def shared_of(cfg, held, role: str) -> Shared:
    """Of the network that a role is on, or is; `teacher1` is on the first expert's."""
    dtype, full = dtype_named(cfg.dtype), kind(cfg, role) == "full" and role[0] != "t"
    adapters = 0 if full else adapters_on(cfg, held, held.homes.get(role, int(role[-1])))
    return shared(cfg.teacher, full, adapters, cfg.rank, dtype, parallel.here)


def adapters_on(cfg, held, e: int) -> int:
    """How many adapters hang on a base: of a shared one all of the run, from its loading on."""
    return sum(home == e and kind(cfg, role) == "lora" for role, home in held.homes.items())


class Memory(NamedTuple):
    """Peak bytes of a phase in a process: device, pinned host memory, and parts of the former."""

    peak: float
    host: float
    bases: float
    roles: float  # parameters and moments
    gradients: float  # of the one role that learns
    gathered: float  # what several processes have of others, and whole gradients of a block
    activations: float


def memory(cfg, held, shape: tuple, offload: str, record: str) -> Memory:
    """The peak of a phase (moe.Held), in micro-batches of cfg.micro_batch samples of this shape."""
    dtype, rank, here = dtype_named(cfg.dtype), cfg.rank, parallel.here
    size = sizes(cfg.teacher, rank, dtype)
    base = shared(cfg.teacher, False, 0, rank, dtype, here).mine
    bases = len(held.experts) * base
    on_device = {
        "none": bases,
        "expert": base,
        "blocks": len(held.experts) * (size.outside + 2 * size.block),
    }[offload]
    host = (
        len(held.experts)
        * {"none": 0, "expert": size.pinned, "blocks": size.pinned_blocks}[offload]
    )
    weight = lambda role: weight_of(cfg, role)
    roles = sum(map(weight, held.frozen)) + 2 * sum(map(weight, held.trained))
    if here.processes > 1:  # adapters of other phases are there too
        rest = [role for role, home in held.homes.items() if home in held.experts]
        rest = [r for r in rest if r not in held.frozen + held.trained and kind(cfg, r) == "lora"]
        roles += sum(map(weight, rest))
    of = lambda role: cost_of(cfg, shape, role)
    student, *fakes = held.trained
    more = (cfg.steps // cfg.phases - 1 if cfg.truncate == "off" else 0) * of(student).kept
    asked = max(of(role).idle for role in held.trained)
    waiting = of(student).kept + more + asked if record == "first" else asked
    updates = {student: max(waiting, of(student).learning + more)}
    updates |= {fake: max(asked, of(fake).learning) for fake in fakes}
    copies = {role: shared_of(cfg, held, role) for role in held.trained}
    extra = {role: x.gathered + x.gradients for role, x in copies.items()}
    many = cfg.micro_batch / here.context
    total = lambda role: weight(role) + many * updates[role] + extra[role]
    worst = max(updates, key=total)
    peak = on_device + roles + total(worst)
    activations = many * updates[worst]
    return Memory(peak, host, on_device, roles, weight(worst), extra[worst], activations)


def weight_of(cfg, role: str) -> float:
    """Bytes of a role's parameters in a process; as many are its gradients, and its moments."""
    own = kind(cfg, role) == "full"
    dtype, layout = dtype_named(cfg.dtype), parallel.here
    return shared(cfg.teacher, own, int(not own), cfg.rank, dtype, layout).learnt


def cost_of(cfg, shape: tuple, role: str) -> Cost:
    """The Cost of a sample of this shape through a role."""
    own, checkpointing = kind(cfg, role) == "full", cfg.checkpointing == "on"
    cut = own and parallel.here.processes > 1
    return cost(cfg.teacher, shape, own, cfg.rank, dtype_named(cfg.dtype), checkpointing, cut)


def kind(cfg, role: str) -> str:
    """lora or full: what a role is."""
    return cfg.generator if role.startswith("student") else cfg.fake


def dtype_named(name: str) -> torch.dtype:
    """bf16 or float32."""
    return {"bf16": torch.bfloat16, "float32": torch.float32}[name]


class Work(NamedTuple):
    """Operations of an iteration of a phase, all samples: wanted, and recomputed."""

    wanted: float
    again: float


def work(cfg, phase, shapes: dict[tuple, float], record: str) -> Work:
    """The expectation over truncation depths and over shapes (shape -> probability)."""
    wanted = again = 0.0
    guided = max(g != 1 for g in cfg.guidance)  # twice the forwards
    steps = phase.depths if cfg.truncate == "off" else (1 + phase.depths) / 2  # of the phase
    learned = phase.depths if cfg.truncate == "off" else 1
    rollouts = 1 if cfg.reuse_rollouts else cfg.fake_updates
    for shape, share in shapes.items():
        args = shape, cfg.rank, dtype_named(cfg.dtype), cfg.checkpointing == "on"
        student, fake = (
            cost(cfg.teacher, args[0], k == "full", *args[1:]) for k in (cfg.generator, cfg.fake)
        )
        asked = rollouts * (phase.first + steps) + phase.first + steps - learned
        wanted += share * (asked * student.forward + cfg.fake_updates * fake.training)
        wanted += share * ((1 + guided) * student.forward + fake.forward)
        wanted += share * learned * student.training
        again += share * (cfg.fake_updates * fake.recomputed + learned * student.recomputed)
        again += share * learned * student.forward * (record == "last")
    return Work(cfg.batch * wanted, cfg.batch * again)


def traffic(cfg, phase, held, shapes: dict[tuple, float], record: str) -> float:
    """Bytes that a process sends in an iteration of a phase, in expectation over depths."""
    guided = max(g != 1 for g in cfg.guidance)
    steps = phase.depths if cfg.truncate == "off" else (1 + phase.depths) / 2
    learned = phase.depths if cfg.truncate == "off" else 1
    rollouts = 1 if cfg.reuse_rollouts else cfg.fake_updates
    student, fake, teacher = (
        shared_of(cfg, held, role) for role in (*held.trained[:2], "teacher1")
    )
    asked = rollouts * (phase.first + steps) + phase.first + steps - learned
    asked += learned * (record == "last")
    sent = asked * student.sent + (1 + guided) * teacher.sent + fake.sent
    for role, times in ((fake, cfg.fake_updates), (student, learned)):
        sent += times * (2 * role.sent + role.summed)  # once more in backward
    calls = asked + 2 + guided + (cfg.fake_updates + learned) * (2 + (cfg.checkpointing == "on"))
    tokens = sum(share * exchanged(cfg, shape) for shape, share in shapes.items())
    passes = -(-cfg.batch // cfg.micro_batch) / parallel.here.shares
    return passes * (sent + cfg.micro_batch * calls * tokens)


def exchanged(cfg, shape: tuple) -> float:
    """Bytes that a process sends of a sample's tokens in a forward: q, k, v and back, in blocks."""
    settings, share = row_of(cfg.teacher).settings, parallel.here.context
    wide = settings.get("dim") or settings["num_attention_heads"] * settings["attention_head_dim"]
    qwen = "attention_head_dim" in settings
    count = torch.Size(shape[1:]).numel() // 4 + (TEXT if qwen else 0)
    each = 4 * settings["num_layers"] * wide * dtype_named(cfg.dtype).itemsize
    return count / share * each * (share - 1) / share


def room_of(device) -> float:
    """Bytes of a GPU; 0 where there is none."""
    cuda = torch.device(device).type == "cuda"
    return torch.cuda.get_device_properties(device).total_memory if cuda else 0.0


def record_of(cfg, held: list, shapes: dict[tuple, float], device) -> str:
    """`first` unless asked for `last`, offloading, or without the memory for it."""
    if cfg.record != "auto":
        return cfg.record
    if cfg.offload != "none" or not room_of(device):
        return "last" if cfg.offload != "none" else "first"
    worst = max(memory(cfg, here, biggest(shapes), "none", "first").peak for here in held)
    return "first" if worst < room_of(device) - SPARE else "last"


@lru_cache
def rate_of(dtype: torch.dtype, device: str) -> float:
    """Operations a second of a large product here, measured once."""
    return speed.rate(dtype, device)


def report(cfg, phases, held: list, shapes: dict, device: str, rate: float) -> str:
    """The plan as text. rate: operations a second; 0 to measure it here."""
    rate = rate or rate_of(dtype_named(cfg.dtype), device)
    record, largest, here = record_of(cfg, held, shapes, device), biggest(shapes), parallel.here
    lines, days = [], 0.0
    if here.processes > 1:
        nodes = f"{here.nodes} nodes of {here.sharers}" if here.nodes > 1 else f"{here.sharers}"
        tokens = f", {here.context} to a sample" if here.context > 1 else ""
        lines.append(f"\nin each process of {nodes}{tokens}:")
    for phase, there in zip(phases, held):
        w = work(cfg, phase, shapes, record)
        seconds = (w.wanted + w.again) / rate / here.processes
        sent = traffic(cfg, phase, there, shapes, record)
        lines += [f"\nphase {phase.k}{'':22}weights  gradients  moments   GB"]
        lines += memory_lines(cfg, there, largest, record) + work_lines(cfg, w, rate, seconds, sent)
        days += seconds * cfg.iters / 86400
    lines.append(
        f"\n{len(phases)} x {cfg.iters} iterations: {days:,.3g} days at that rate, which products "
        f"alone may reach; {disk(cfg, held[-1])}"
    )
    return "\n".join(lines + options(cfg, held, largest, record, room_of(device)))


def memory_lines(cfg, held, shape: tuple, record: str) -> list[str]:
    """What a phase holds, a line a network."""
    m, weight = memory(cfg, held, shape, cfg.offload, record), lambda r: weight_of(cfg, r)
    base = shared(cfg.teacher, False, 0, cfg.rank, dtype_named(cfg.dtype), parallel.here).mine
    lines = [f"  base {e}, frozen{'':12}{gb(base)}" for e in held.experts]
    lines += [f"  {r + ', frozen':27}{gb(weight(r))}" for r in held.frozen]
    lines += [
        f"  {r + ', ' + kind(cfg, r):27}{gb(weight(r))}{gb(weight(r), 11)}{gb(weight(r), 9)}"
        for r in held.trained
    ]
    lines.append(f"  activations{'':16}{gb(m.activations)}   {cfg.micro_batch} x {text(shape)}")
    if parallel.here.processes > 1:
        lines.append(f"  gathered from others{'':7}{gb(m.gathered)}   and a block's gradients")
    where = "" if cfg.offload == "none" else f", {m.host / 1e9:.1f} in pinned host memory"
    return [*lines, f"  peak{'':23}{gb(m.peak)}   one role has gradients at a time{where}"]


def work_lines(cfg, w: Work, rate: float, seconds: float, sent: float) -> list[str]:
    """What an iteration computes, and what a process sends meanwhile."""
    lines = [
        f"  an iteration of {cfg.batch} samples: {w.wanted / 1e12:,.4g} Tflop and "
        f"{w.again / 1e12:,.4g} recomputed; {seconds:,.3g} s at {rate / 1e12:,.4g} Tflop/s"
    ]
    if parallel.here.processes > 1:
        speed = f"{sent / seconds / 1e9:,.3g} GB/s"
        lines.append(f"  each sends {sent / 1e9:,.1f} GB meanwhile: {speed}")
    return lines


def disk(cfg, last) -> str:
    """What the folder of a run takes, of all processes; last: the Held of the last phase."""
    size = sizes(cfg.teacher, cfg.rank, dtype_named(cfg.dtype))
    whole = lambda role: size.own if kind(cfg, role) == "full" else size.lora
    students = sum(map(whole, [r for r in last.frozen + last.trained if r[0] == "s"]))
    state = sum(map(whole, last.frozen)) + 2 * sum(map(whole, last.trained))
    total = 2 * state + (1 + cfg.keep) * students  # an old state stays until the new one is whole
    return (
        f"disk: {total / 1e9:,.3g} GB (state 2 x {state / 1e9:.3g}, "
        f"1 + {cfg.keep} students of {students / 1e9:.3g})"
    )


def options(cfg, held: list, shape: tuple, record: str, room: float) -> list[str]:
    """What would need how much: a line for each way to spend memory."""
    if parallel.here.processes > 1:
        return []
    lines = ["\nways to hold it (GB on the device at the worst phase):"]
    for offload, way in (
        ("none", "first"),
        ("none", "last"),
        ("expert", "last"),
        ("blocks", "last"),
    ):
        ms = [memory(cfg, here, shape, offload, way) for here in held]
        peak, host = max(m.peak for m in ms), max(m.host for m in ms)
        fits = "" if not room else "   fits" if peak < room - SPARE else "   does not fit"
        asked = "   <- this one" if (offload, way) == (cfg.offload, record) else ""
        lines.append(
            f"  --offload {offload:6} --record {way:5}{gb(peak)}   host {host / 1e9:5.1f}"
            + (fits + asked)
        )
    if room:
        lines[0] = lines[0].replace(":", f", of {room / 1e9:.1f}:")
    share = memory(cfg, held[-1], shape, "none", "last").activations
    lines.append(
        f"  of these activations are {gb(share, 0)} GB: they go with the largest --size, --frames "
        "and --micro-batch"
    )
    return lines


def biggest(shapes) -> tuple:
    """The shape of the most latents."""
    return max(shapes, key=lambda shape: torch.Size(shape).numel())


def gb(count: float, width: int = 8) -> str:
    """Bytes as GB; small networks get the digits they need."""
    value = count / 1e9
    return f"{value:{width}.1f}" if value >= 10 else f"{value:{width}.3g}"


def text(shape: tuple) -> str:
    """(16, 21, 60, 104) -> 16 x 21 x 60 x 104 latents."""
    return " x ".join(map(str, shape)) + " latents"
