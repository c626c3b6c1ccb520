"""One run on many processes: who computes which passes, and where the tensors are. All of it.

Passes of a batch are dealt out. Parameters, gradients and moments are cut by rows over the
processes of a node (FSDP2), and every node has them all (HSDP). With --context-parallel P, groups
of P share the tokens of each sample. Gradients and losses are sums: the numbers are those of one
process. Others call the functions below, which do nothing where there is one process.
"""

import contextlib
import hashlib
import json
import os
import select
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from models import files
from models.files import Interrupted, UserError, first_line


@dataclass(frozen=True)
class Layout:
    """Where this process stands."""

    processes: int = 1
    nodes: int = 1
    context: int = 1  # processes that share the tokens of a sample
    index: int = 0

    @property
    def shares(self) -> int:
        """Parts that the passes of a batch are dealt into."""
        return self.processes // self.context

    @property
    def sharers(self) -> int:
        """Processes that a tensor is cut over: those of a node."""
        return self.processes // self.nodes


here = Layout()
groups: dict = {}  # of torch.distributed: "cut" and "tokens" (meshes), "passes", "patient", "store"


# -- joining and leaving -------------------------------------------------------------------------


def quiet() -> None:
    """Of processes that torchrun started one speaks; tracebacks of the others still show."""
    if int(os.environ.get("RANK", 0)):
        sys.stdout = sys.stderr = open(os.devnull, "w")
        sys.excepthook = lambda *error: traceback.print_exception(*error, file=sys.__stderr__)


def alone(program: str) -> None:
    """Raise UserError under torchrun."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError(f"this is for one process: python {program}, without torchrun")


@contextmanager
def planned(text: str, context: int):
    """Inside, this stands where a run on `8`, or `4x8` of 4 nodes, would: for plans. UserError.

    Without a text: as many as torchrun started.
    """
    global here
    count, each = (int(os.environ.get(f"{name}WORLD_SIZE", 1)) for name in ("", "LOCAL_"))
    text = text or f"{count // each}x{each}"
    numbers = text.split("x")
    if len(numbers) > 2 or not all(n.isdecimal() and 0 < int(n) < 10**5 for n in numbers):
        raise UserError(f"--processes {text} is not a number, as 8, or NODESxEACH, as 4x8")
    nodes, each = map(int, numbers if len(numbers) == 2 else ("1", *numbers))
    before, here = here, laid_out(nodes * each, each, context)
    try:
        yield
    finally:
        here = before


def laid_out(count: int, each: int, context: int, index: int = 0) -> Layout:
    """count processes, `each` a node. Raises UserError where they cannot be laid out."""
    if count % each:
        raise UserError(f"{count} processes are not {each} on every node; nodes must be alike")
    if context < 1 or each % context:
        raise UserError(
            f"--context-parallel {context} does not divide the processes of a node, here {each}; "
            "torchrun starts them, and --dry-run plans for --processes"
        )
    return Layout(count, count // each, context, index)


@contextmanager
def processes(device: str, context: int, program: str):
    """Inside, this process is one of those that torchrun started; or the only one."""
    global here
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        here = laid_out(1, 1, context)
        yield
        return
    files.writes = not int(os.environ["RANK"])
    try:
        here = join(device, context, program)
        meshes(device)
        yield
        gather(None)  # nobody leaves while another can still fail
        dist.destroy_process_group()
    except BaseException as error:
        line = tell(error)
        if line != str(error):
            raise UserError(line) from error
        raise
    finally:
        files.writes, here = True, Layout()


def join(device: str, context: int, program: str) -> Layout:
    """Meet the others. Raises UserError where they cannot be laid out."""
    if device not in ("cpu", "cuda"):
        raise UserError("several processes run on --device cuda, or cpu")
    store, index, count = next(dist.rendezvous("env://"))
    groups["store"] = dist.PrefixStore("run", store)
    threading.Thread(target=watch, args=(listen(), program), daemon=True).start()
    local, each = (int(os.environ[name]) for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"))
    if device == "cuda":
        if local >= torch.cuda.device_count():
            raise UserError(f"{each} processes on a node of {torch.cuda.device_count()} GPUs")
        torch.cuda.set_device(local)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo",
        store=dist.PrefixStore("join", store),
        rank=index,
        world_size=count,
        timeout=timedelta(hours=1),  # disks differ, and all wait for the slowest to load
    )
    # for what one does while the others wait: embedding prompts takes hours
    groups["patient"] = dist.new_group(backend="gloo", timeout=timedelta(days=7))
    numbers = [None] * count
    dist.all_gather_object(numbers, each, group=groups["patient"])
    if len(set(numbers)) > 1:
        raise UserError(
            f"nodes of {min(numbers)} and of {max(numbers)} processes; all must be alike"
        )
    return laid_out(count, each, context, index)


def meshes(device: str) -> None:
    """Who shares what with whom."""
    from torch.distributed.device_mesh import init_device_mesh  # a second to read, for some only

    by_node = (here.sharers,) if here.nodes == 1 else (here.nodes, here.sharers)
    names = ("node", "cut")[-len(by_node) :]
    groups["cut"] = init_device_mesh(device, by_node, mesh_dim_names=names)
    both = (here.shares, here.context)
    mesh = init_device_mesh(device, both, mesh_dim_names=("passes", "tokens"))
    groups["passes"], groups["tokens"] = mesh["passes"].get_group(), mesh["tokens"]


def tell(error: BaseException) -> str:
    """What to say of an error; all others end too, and the first of them says the same."""
    if "store" not in groups or isinstance(error, (SystemExit, KeyboardInterrupt, Interrupted)):
        return str(error)
    groups["told"] = True  # from here on this process speaks for itself
    mine = str(error) if isinstance(error, UserError) else first_line(error)
    if is_lost(error):  # why the other one ended it may have said
        for _ in range(20):
            if heard():
                break
            time.sleep(0.1)
        mine = heard() or f"{LOST} ({mine[:120]})"
    with contextlib.suppress(RuntimeError):
        if not heard():
            groups["store"].set("failed", mine)
    return mine if is_lost(error) else str(error)


def heard() -> str:
    """The line of the process that failed first."""
    for _ in range(3):
        try:
            store = groups["store"]
            return store.get("failed").decode() if store.check(["failed"]) else ""
        except RuntimeError:
            time.sleep(0.1)
    return LOST  # nobody is there to ask


LOST = "another process ended; --resume goes on from the last state"


def is_lost(error: BaseException) -> bool:
    """Whether a collective found nobody at its other end."""
    words = "Connection closed", "Connection reset", "closed by peer", "remote process exited"
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)


def listen() -> int:
    """A file that a byte is written to when a signal comes, also while a collective waits."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    signal.signal(signal.SIGTERM, lambda *_: None)  # until Stop listens, and after: watch decides
    return reading


def watch(signals: int, program: str, patience: float = 20.0) -> None:
    """Ends this process where it would wait for ever: another failed, or nobody reads a signal.

    torchrun kills what has not ended 30 seconds after its signal, without a word.
    """
    deadline = float("inf")
    while time.monotonic() < deadline:
        if select.select([signals], [], [], 0.2)[0]:
            os.read(signals, 64)
            deadline = min(deadline, time.monotonic() + patience)
        if line := heard():
            time.sleep(0.5)
            return None if "told" in groups else say(program, line, 2)
    say(program, "stopped inside an iteration; --resume goes on from the last state", 143)


def say(program: str, line: str, status: int) -> None:
    """One line, and the end."""
    sys.stdout.flush()
    print(f"{program}: {line}", file=sys.stderr, flush=True)
    os._exit(status)


def launcher() -> str:
    """How this run was started: what stands before train.py."""
    nodes = f"--nnodes {here.nodes} ..." if here.nodes > 1 else "--standalone"
    several = f"torchrun {nodes} --nproc-per-node {here.sharers}"
    return several if here.processes > 1 else "python"


# -- agreeing ------------------------------------------------------------------------------------


def once(work: Callable):
    """work() on one process; its result, or its UserError, is everyone's."""
    if here.processes == 1:
        return work()
    found = [None, None]
    if here.index == 0:
        try:
            found[0] = work()
        except UserError as error:
            found[1] = error
    dist.broadcast_object_list(found, group=groups["patient"])
    if found[1] is not None:
        raise found[1]
    return found[0]


def gather(value) -> list:
    """Everyone's value."""
    if here.processes == 1:
        return [value]
    values = [None] * here.processes
    dist.all_gather_object(values, value, group=groups["patient"])
    return values


def any_of(number: int) -> int:
    """The largest of everyone's: whether a signal came to anybody."""
    return max(gather(number))


def deal(passes: list) -> list:
    """The passes of a batch that are this process's: every so many-th."""
    return passes[here.index // here.context :: here.shares]


def total(*tensors: Tensor) -> list[Tensor]:
    """Sums over all passes, of sums over this process's."""
    if here.shares == 1:
        return list(tensors)
    flat = torch.cat([x.flatten() for x in tensors])
    dist.all_reduce(flat, group=groups["passes"])
    parts = flat.split([x.numel() for x in tensors])
    return [part.view_as(x) for part, x in zip(parts, tensors)]


# -- tensors that are cut ------------------------------------------------------------------------


def place(net: nn.Module, device) -> None:
    """Make room for a network's tensors: FSDP2, a group of parameters a block.

    A block is gathered in the dtype of the inside and its gradients are summed in float32; what is
    outside of blocks stays in its own dtype. What a port uses in float32 inside of blocks is
    small: everyone has it, and its gradients are summed as they come.
    """
    if here.processes == 1:
        net.to_empty(device=device)
        return
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    blocks, small = blocks_of(net), set(kept(net))
    how = dict(mesh=groups["cut"], reshard_after_forward=True, ignored_params=small)
    inside = MixedPrecisionPolicy(net.dtype, torch.float32, cast_forward_inputs=False)
    for block in blocks:
        fully_shard(block, mp_policy=inside, **how)
    fully_shard(net, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False), **how)
    for module in (net, *blocks):  # sums, not means
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    net.to_empty(device=device)  # which makes new parameters, without the hooks of old ones
    for p in kept(net):
        if p.requires_grad:
            p.register_hook(summed)


def blocks_of(net: nn.Module) -> nn.ModuleList:
    """The blocks of either transformer."""
    return net.blocks if hasattr(net, "blocks") else net.transformer_blocks


def kept(net: nn.Module) -> list[nn.Parameter]:
    """Norms, and modulation that is float32, inside of blocks: used in float32 where they learn."""
    small = lambda name: any(part in name for part in ("norm", *net.float32))
    return [p for block in blocks_of(net) for name, p in block.named_parameters() if small(name)]


def summed(grad: Tensor) -> Tensor:
    """A gradient, over all processes."""
    grad = grad.contiguous()
    dist.all_reduce(grad)
    return grad


def rows(x: Tensor) -> tuple[int, int]:
    """From which row to which this process has a tensor."""
    if not is_cut(x):
        return 0, len(x)
    each = -(-len(x) // here.sharers)
    first = min(len(x), each * x.device_mesh.get_local_rank(mesh_dim=-1))
    return first, min(len(x), first + each)


def part(x: Tensor) -> Tensor:
    """What this process has of a tensor."""
    return x.to_local() if is_cut(x) else x


def is_cut(x: Tensor) -> bool:
    """Whether this is a DTensor, of which every process has a part."""
    return hasattr(x, "to_local")


@torch.no_grad()
def put(x: Tensor, source) -> None:
    """Write this process's rows of `source`, all of which can be asked for by source[a:b]."""
    first, end = rows(x)
    part(x).copy_(source[first:end])


def norm(grads: list[Tensor]) -> Tensor:
    """The root of the sum of all squares."""
    if here.processes == 1:
        return torch.nn.utils.get_total_norm(grads)
    mine = [part(g) for g in grads if is_cut(g)]
    square = torch.nn.utils.get_total_norm(mine).square()
    dist.all_reduce(square, group=groups["cut"].get_group(mesh_dim=-1))
    rest = [g for g in grads if not is_cut(g)]
    return (square + torch.nn.utils.get_total_norm(rest).to(square.device).square()).sqrt()


# -- tokens that are cut -------------------------------------------------------------------------


def cut_tokens(x: Tensor, dim: int = 1) -> Tensor:
    """This process's part of the tokens, which are dimension `dim` of x."""
    return x if here.context == 1 else moved(x, None, dim, x.shape)


def all_tokens(x: Tensor, count: int) -> Tensor:
    """All `count` tokens (B, L, D) again, on every process, from each one's part of them."""
    return x if here.context == 1 else moved(x, 1, None, (len(x), count, x.shape[2]))


def to_heads(x: Tensor, streams: tuple) -> Tensor:
    """All tokens of some heads, (B, L, H / P, d), from some tokens of all heads, (B, L / P, H, d).

    streams: how many tokens there are of each kind, every kind being cut by itself.
    """
    if here.context == 1 or not streams:
        return x
    parts = x.split([length(n) for n in streams], 1)
    whole = [(len(x), n, *x.shape[2:]) for n in streams]
    return torch.cat([moved(y, 1, 2, n) for y, n in zip(parts, whole)], 1)


def to_tokens(x: Tensor, streams: tuple) -> Tensor:
    """Some tokens of all heads again."""
    if here.context == 1 or not streams:
        return x
    shape = lambda y: (*y.shape[:2], y.shape[2] * here.context, y.shape[3])
    return torch.cat([moved(y, 2, 1, shape(y)) for y in x.split(streams, 1)], 1)


def moved(x: Tensor, then: int | None, now: int | None, shape: tuple) -> Tensor:
    """A tensor of this shape, cut along dimension `now` in place of `then` (None: not cut).

    x and the result are this process's part of it. With gradient.
    """
    from torch.distributed.tensor import DTensor, Replicate, Shard

    then, now = (Replicate() if dim is None else Shard(dim) for dim in (then, now))
    mesh, stride = groups["tokens"], torch.empty(shape, device="meta").stride()
    there = DTensor.from_local(
        x.contiguous(), mesh, [then], run_check=False, shape=torch.Size(shape), stride=stride
    )
    return there.redistribute(mesh, [now]).to_local()


def length(count: int) -> int:
    """How many of `count` tokens are this process's, as torch.chunk cuts them."""
    each = -(-count // here.context)
    return max(0, min(each, count - each * (here.index % here.context)))


# -- state ---------------------------------------------------------------------------------------


def write_state(folder: Path, name: str, tensors: dict[str, Tensor], about: dict) -> None:
    """Every process writes its rows; then one file, replaced at once, says which belong together.

    The state is that of before or of now, whoever fails and whenever.
    """
    file, digest = f"{name}.{here.index + 1}of{here.sharers}.safetensors", None
    if here.index < here.sharers:  # one node has all
        mine = {n: x for n, x in tensors.items() if here.index == 0 or is_cut(x)}
        where = {n: [rows(x)[0], len(x)] for n, x in mine.items()}
        about_part = {"kind": "part of a state", "rows": where}
        mine = {n: part(x) for n, x in mine.items()}
        digest = files.write_tensors(folder / file, mine, about_part, everyone=True)
    parts = {file: digest for file, digest in gather((file, digest)) if digest}
    if here.index == 0:
        about = about | {"parts": parts}
        files.write_json(folder / "state.json", about | {"digest": check_of(about)})
        for old in [*folder.glob("*.safetensors"), *folder.glob("*.tmp")]:
            if old.name not in parts:
                with contextlib.suppress(OSError):  # what stays is only in the way
                    old.unlink()


class Rows:
    """A tensor in the files of a state: rows[a:b] reads as much, wherever it lies."""

    def __init__(self):
        self.shape, self.slices = torch.Size(), {}  # first row -> slice of a file

    def add(self, first: int, count: int, piece) -> None:
        """A file has these rows of `count`."""
        self.shape = torch.Size((count, *piece.get_shape()[1:]))
        self.slices[first] = piece

    def __getitem__(self, wanted: slice) -> Tensor:
        found = []
        for first, piece in sorted(self.slices.items()):
            a, b = max(wanted.start, first), min(wanted.stop, first + piece.get_shape()[0])
            found += [piece[a - first : b - first]] if a < b else []
        return torch.cat(found) if found else torch.empty(0, *self.shape[1:])


def check_of(about: dict) -> str:
    """A digest of plain JSON values."""
    return hashlib.blake2b(json.dumps(about, sort_keys=True).encode(), digest_size=16).hexdigest()


def read_state(folder: Path, settings: dict, what_to_do: str) -> tuple[dict[str, Rows], dict]:
    """Tensors by name, not read yet, and `about`, of write_state on any number of processes.

    Raises UserError if a file is missing, garbled, or of another run.
    """
    about = files.read_json(folder / "state.json", what_to_do)
    if about.pop("digest", "") != check_of(about) or about.get("kind") != "state":
        raise UserError(f"{folder / 'state.json'} is damaged, or no state; {what_to_do}")
    if about.get("settings") != settings:
        raise UserError(f"{folder} is of another run; {what_to_do}")
    found: dict[str, Rows] = {}
    for i, (name, digest) in enumerate(about["parts"].items()):
        file, of = files.opened(folder / name, "part of a state", what_to_do)
        mine = i % here.sharers == here.index % here.sharers  # looked at by one of a node
        if of["digest"] != digest or (mine and files.digest(file) != digest):
            raise UserError(f"{folder / name} is damaged; {what_to_do}")
        for key, (first, count) in of["rows"].items():
            found.setdefault(key, Rows()).add(first, count, file.get_slice(key))
    return found, about
