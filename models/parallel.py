"""One run on several processes: FSDP2, replicas of it on several nodes, and context parallelism.

The micro-batches of a batch are divided among the ranks. Parameters, gradients and moments are
sharded by rows over the ranks of a node (FSDP2); every node has a replica (HSDP). With
--context-parallel P, groups of P ranks share the tokens of a sample. Gradients and losses are
sums, so the numbers are those of one process. With one process the functions below do nothing.

This is the only module that imports torch.distributed. DTensor and FSDP are imported where they
are used: that takes a second, and most runs have one process.
"""

import os
import re
import shlex
import signal
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from models import common, runs
from models.common import Interrupted, UserError, is_rank0, torchrun_ranks


@dataclass(frozen=True)
class Topology:
    """How many ranks there are, and which one this is."""

    processes: int = 1
    nodes: int = 1
    context_parallel: int = 1  # ranks that share the tokens of a sample
    rank: int = 0

    @property
    def data_parallel(self) -> int:
        return self.processes // self.context_parallel  # parts that a batch is divided into

    @property
    def shard_group(self) -> int:
        return self.processes // self.nodes  # ranks that a tensor is sharded over


WAIT_SECONDS = 10  # for other ranks, without a word
TIMEOUT = timedelta(hours=1)  # disks differ, and all ranks wait for the slowest to load
SINGLE = Topology()  # one process
topology = SINGLE  # of this run; only `distributed` sets it
groups: dict = {}  # "store"; "shards" and "tokens" (meshes); "data", "long_timeout" (groups)


# -- joining and leaving -------------------------------------------------------------------------


def silence_other_ranks() -> None:
    """Print only on rank 0 of the processes that torchrun started."""
    if not is_rank0():
        sys.stdout = sys.stderr = open(os.devnull, "w")


def require_single_process(program: str) -> None:
    """Raise UserError under torchrun."""
    if torchrun_ranks()[1] > 1:
        raise UserError(f"{program} runs in one process: python {program}, without torchrun")


def make_topology(text: str, context: int) -> Topology:
    """Return the topology of `8` processes or `4x8` (nodes x GPUs); by default as torchrun has it.

    Raises UserError if these numbers do not divide each other.
    """
    rank, started, _, per_node = torchrun_ranks()
    text = text or f"{started // per_node}x{per_node}"
    match = re.fullmatch(r"(?:([1-9]\d{0,3})x)?([1-9]\d{0,3})", text)
    if not match:
        raise UserError(f"--processes: expected a number such as 8, or NODESxN, got {text}")
    nodes, per_node = int(match[1] or 1), int(match[2])
    if context < 1 or per_node % context:
        expected = f"a divisor of {per_node}, the processes of a node"
        advice = "start more with torchrun --nproc-per-node, or plan more with --processes"
        raise UserError(f"--context-parallel: expected {expected}, got {context}; {advice}")
    return Topology(nodes * per_node, nodes, context, rank)


@contextmanager
def distributed(device: str, context: int, program: str):
    """Be one of the ranks that torchrun started, or the only process.

    If a rank fails, it prints its error and exits, and torchrun ends the others.
    """
    global topology
    if torchrun_ranks()[1] == 1:
        yield
        return
    try:
        topology = make_topology("", context)
        join(device)
        make_groups(device)
        for number in (signal.SIGTERM, signal.SIGINT):  # runs.Stop catches them while training.
            signal.signal(number, lambda *_: None)  # torchrun repeats them until the process ends
        yield
        gather(None)  # a barrier: no rank leaves while another can still fail
        dist.destroy_process_group()
    except Interrupted:  # on every rank, in the same iteration
        dist.destroy_process_group()
        raise
    except Exception as error:
        if is_connection_lost(error):
            command = f"{launch_command(topology, program)} --resume"
            error = UserError(f"another process ended; continue from the checkpoint: {command} ...")
        # one line of the rank that failed first; the others have the same error, or lost that rank
        sys.stderr = sys.__stderr__ if is_first_failure() else open(os.devnull, "w")
        raise error
    finally:
        topology = SINGLE


def join(device: str) -> None:
    """Meet the other ranks."""
    rank, processes, local_rank, per_node = torchrun_ranks()
    if device not in ("cpu", "cuda"):
        raise UserError(f"--device: expected cuda or cpu under torchrun, got {device}")
    line = f"rank {rank} waits for the others of {processes}; without torchrun, unset WORLD_SIZE"
    timer = threading.Timer(WAIT_SECONDS, lambda: print(line, file=sys.__stderr__))
    timer.start()
    try:
        groups["store"], *_ = next(dist.rendezvous("env://"))
    finally:
        timer.cancel()
    if device == "cuda":
        if local_rank >= torch.cuda.device_count():
            gpus = torch.cuda.device_count()
            raise UserError(f"expected one GPU per process, got {per_node} processes, {gpus} GPUs")
        torch.cuda.set_device(local_rank)
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    options = dict(rank=rank, world_size=processes, timeout=TIMEOUT)
    dist.init_process_group(backend, store=dist.PrefixStore("init", groups["store"]), **options)
    # for what rank 0 does while the others wait: to embed the prompts takes hours
    groups["long_timeout"] = dist.new_group(backend="gloo", timeout=timedelta(days=7))
    counts = sorted(set(gather(per_node)))
    if len(counts) > 1:
        raise UserError(f"expected as many processes on every node, got {counts}")


def make_groups(device: str) -> None:
    """Make the groups of ranks that share a tensor, a batch, or the tokens of a sample."""
    axes = {"node": topology.nodes} if topology.nodes > 1 else {}
    axes["shard"] = topology.shard_group
    groups["shards"] = init_device_mesh(device, tuple(axes.values()), mesh_dim_names=tuple(axes))
    sizes = topology.data_parallel, topology.context_parallel
    mesh = init_device_mesh(device, sizes, mesh_dim_names=("data", "tokens"))
    groups["data"] = mesh["data"].get_group()
    groups["tokens"] = mesh["tokens"]
    for group in (*groups["shards"].get_all_groups(), *mesh.get_all_groups()):
        dist.distributed_c10d._set_pg_timeout(TIMEOUT, group)  # new groups have 10 or 30 minutes


def is_connection_lost(error: Exception) -> bool:
    """Return whether a collective failed because the process of another rank has ended."""
    words = "Connection closed", "Connection reset", "closed by peer", "remote process exited"
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)


def is_first_failure() -> bool:
    """Return whether no other rank has failed before this one."""
    if "store" not in groups:
        return is_rank0()
    time.sleep(0 if is_rank0() else 1)  # if all ranks raise the same error, rank 0 prints it
    with suppress(RuntimeError):  # the process with the store may have ended
        return groups["store"].add("failures", 1) == 1
    return False


def launch_command(topology: Topology, program: str) -> str:
    """How to start these ranks, without other flags. The program's path is as it was typed."""
    nodes = f"--nnodes {topology.nodes} ..." if topology.nodes > 1 else "--standalone"
    command = f"torchrun {nodes} --nproc-per-node {topology.shard_group}"
    typed = sys.argv[0] if os.path.basename(sys.argv[0]) == program else program
    command = f"{command if topology.processes > 1 else 'python'} {shlex.quote(typed)}"
    context = topology.context_parallel
    return f"{command} --context-parallel {context}" if context > 1 else command


# -- agreement -----------------------------------------------------------------------------------


def on_rank0(work: Callable):
    """Call work() on rank 0. Its result, or its UserError, is that of every rank."""
    if topology.processes == 1:
        return work()
    outcome = [None, None]  # result, error
    if topology.rank == 0:
        try:
            outcome[0] = work()
        except (UserError, Interrupted) as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome, group=groups["long_timeout"])
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def gather(value) -> list:
    """The value of every rank."""
    if topology.processes == 1:
        return [value]
    values = [None] * topology.processes
    dist.all_gather_object(values, value, group=groups["long_timeout"])
    return values


def max_over_ranks(number: int) -> int:
    """The largest number of any rank, e.g. of the signals that they received."""
    return max(gather(number))


def my_share(micro_batches: list) -> list:
    """The micro-batches that this rank computes. Ranks that share tokens have the same ones."""
    return micro_batches[topology.rank // topology.context_parallel :: topology.data_parallel]


def all_reduce_sum(x: Tensor) -> Tensor:
    """Sum x over all micro-batches, in place, given the sum over those of this rank."""
    if topology.data_parallel > 1:
        dist.all_reduce(x, group=groups["data"])
    return x


# -- sharded parameters --------------------------------------------------------------------------


def shard_and_allocate(net: nn.Module, device: torch.device) -> None:
    """Allocate the tensors of a network on the meta device, sharded block by block (FSDP2).

    A block is gathered in the network's dtype, and its gradients are summed in float32. What is
    outside the blocks keeps its dtype. Small float32 parameters are replicated.
    """
    if topology.processes == 1:
        net.to_empty(device=device)
        return
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    blocks = blocks_of(net)
    replicated = set(replicated_parameters(net))
    options = dict(mesh=groups["shards"], reshard_after_forward=True, ignored_params=replicated)
    precision = MixedPrecisionPolicy(net.dtype, torch.float32, cast_forward_inputs=False)
    for block in blocks:
        fully_shard(block, mp_policy=precision, **options)
    fully_shard(net, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False), **options)
    for module in (net, *blocks):  # sums instead of FSDP's means: losses are weighted by n / batch
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    net.to_empty(device=device)  # makes new parameters, so hooks come after it
    for p in replicated_parameters(net):
        if p.requires_grad:
            p.register_hook(all_reduce_grad)


def blocks_of(net: nn.Module) -> nn.ModuleList:
    """The transformer blocks of a port."""
    return net.blocks if hasattr(net, "blocks") else net.transformer_blocks


def replicated_parameters(net: nn.Module) -> list[nn.Parameter]:
    """Small parameters inside the blocks that are used in float32: norms, Wan's modulation.

    Sharded, they would be gathered in bf16, which loses the small steps of their training.
    """
    is_small = lambda name: any(part in name for part in ("norm", *net.float32))
    return [p for block in blocks_of(net) for name, p in block.named_parameters() if is_small(name)]


def all_reduce_grad(grad: Tensor) -> Tensor:
    """Sum the gradient of a replicated parameter over all ranks."""
    grad = grad.contiguous()
    dist.all_reduce(grad)
    return grad


def is_sharded(x: Tensor) -> bool:
    """Return whether x is a DTensor, of which this rank has some rows."""
    return hasattr(x, "to_local")


def local(x: Tensor) -> Tensor:
    """The rows of a tensor that this rank has."""
    return x.to_local() if is_sharded(x) else x


def local_rows(x: Tensor) -> tuple[int, int]:
    """First row that this rank has of a tensor, and the row after its last, as FSDP2 chunks it."""
    if not is_sharded(x):
        return 0, len(x)
    rows_per_rank = -(-len(x) // topology.shard_group)
    first = min(len(x), rows_per_rank * x.device_mesh.get_local_rank(mesh_dim=-1))
    return first, min(len(x), first + rows_per_rank)


def full_tensor(x: Tensor) -> Tensor:
    """All rows of a tensor. A collective: every rank must call it."""
    return x.full_tensor() if is_sharded(x) else x


@torch.no_grad()
def copy_to_local(x: Tensor, source) -> None:
    """Copy this rank's rows from `source`, of which source[a:b] returns rows."""
    first, end = local_rows(x)
    local(x).copy_(source[first:end])


def grad_norm(grads: list[Tensor]) -> Tensor:
    """L2 norm of all gradients together, sharded and replicated."""
    if topology.processes == 1:
        return torch.nn.utils.get_total_norm(grads)
    shards = [local(g) for g in grads if is_sharded(g)]
    replicated = [g for g in grads if not is_sharded(g)]
    square = torch.nn.utils.get_total_norm(shards).square()
    dist.all_reduce(square, group=groups["shards"].get_group(mesh_dim=-1))
    return (square + torch.nn.utils.get_total_norm(replicated).to(square).square()).sqrt()


# -- context parallelism: P ranks share the L tokens of a sample ---------------------------------


def has_all_tokens(x: Tensor) -> bool:
    """Whether tokens are not shared: P is 1, or models/plan.py measures the whole network."""
    return topology.context_parallel == 1 or x.is_meta


def shard_tokens(x: Tensor, dim: int = 1) -> Tensor:
    """This rank's tokens, which are dimension `dim` of x: L -> L / P."""
    return x if has_all_tokens(x) else redistribute(x, None, dim, x.shape)


def gather_tokens(x: Tensor, count: int) -> Tensor:
    """All tokens on every rank: (B, L / P, D) -> (B, L, D), L = count."""
    return x if has_all_tokens(x) else redistribute(x, 1, None, (len(x), count, x.shape[2]))


def tokens_to_heads(x: Tensor, token_counts: tuple[int, ...]) -> Tensor:
    """All tokens of some heads from some tokens of all: (B, L / P, H, d) -> (B, L, H / P, d).

    Attention is by head, so this is where tokens are exchanged (as in DeepSpeed-Ulysses).
    token_counts: number of tokens of each kind (text, image). Each kind is sharded by itself.
    """
    if has_all_tokens(x) or not token_counts:
        return x
    parts = x.split([local_length(count) for count in token_counts], 1)
    shapes = [(len(x), count, *x.shape[2:]) for count in token_counts]
    return torch.cat([redistribute(y, 1, 2, shape) for y, shape in zip(parts, shapes)], 1)


def heads_to_tokens(x: Tensor, token_counts: tuple[int, ...]) -> Tensor:
    """The inverse: (B, L, H / P, d) -> (B, L / P, H, d)."""
    if has_all_tokens(x) or not token_counts:
        return x
    shape = lambda y: (*y.shape[:2], y.shape[2] * topology.context_parallel, y.shape[3])
    return torch.cat([redistribute(y, 2, 1, shape(y)) for y in x.split(token_counts, 1)], 1)


def redistribute(x: Tensor, before: int | None, after: int | None, shape: tuple) -> Tensor:
    """Shard a tensor along dimension `after` instead of `before` (None: replicated).

    x and the result are the local parts of a tensor of this shape. Differentiable.
    """
    from torch.distributed.tensor import DTensor, Replicate, Shard

    before, after = (Replicate() if dim is None else Shard(dim) for dim in (before, after))
    mesh = groups["tokens"]
    stride = torch.empty(shape, device="meta").stride()
    options = dict(run_check=False, shape=torch.Size(shape), stride=stride)
    whole = DTensor.from_local(x.contiguous(), mesh, [before], **options)
    return whole.redistribute(mesh, [after]).to_local()


def local_length(count: int) -> int:
    """How many of `count` tokens this rank has, as torch.chunk divides them."""
    per_rank = -(-count // topology.context_parallel)
    return max(0, min(per_rank, count - per_rank * (topology.rank % topology.context_parallel)))


# -- checkpoints ---------------------------------------------------------------------------------


def write_state(folder: Path, name: str, tensors: dict[str, Tensor], metadata: dict) -> None:
    """Write a checkpoint: a file per rank with its rows, then state.json, which lists the files.

    state.json is replaced in one step, and older files are removed after it. So there is a whole
    checkpoint at any time, this one or the one before.
    """
    rank = topology.rank
    file = None
    if rank < topology.shard_group:  # the ranks of one node have all rows
        file = f"{name}.{rank + 1}of{topology.shard_group}.safetensors"
        shards = {key: x for key, x in tensors.items() if rank == 0 or is_sharded(x)}
        rows = {key: [local_rows(x)[0], len(x)] for key, x in shards.items()}
        shards = {key: local(x) for key, x in shards.items()}
        header = {"kind": "checkpoint shard", "rows": rows}
        common.write_tensors(folder / file, shards, header)
    files = [file for file in gather(file) if file]  # a barrier, too: all of them are on disk
    if rank == 0:
        common.write_json(folder / "state.json", metadata | {"files": files})
        for path in folder.glob("phase*"):
            if path.name not in files and re.fullmatch(rf"{runs.STATE_FILES}(\.tmp)?", path.name):
                with suppress(OSError):  # an old file costs space only
                    path.unlink()


class StoredTensor:
    """A tensor in the files of a checkpoint: x[a:b] reads these rows, whichever files have them."""

    def __init__(self, count: int, slices: dict):
        self.slices = slices  # first row -> rows in a file
        self.shape = torch.Size((count, *next(iter(slices.values())).shape[1:]))

    def __getitem__(self, wanted: slice) -> Tensor:
        pieces = [torch.empty(0, *self.shape[1:])]
        for first, rows in sorted(self.slices.items()):
            a, b = max(wanted.start, first), min(wanted.stop, first + rows.shape[0])
            if a < b:
                pieces.append(rows[a - first : b - first])
        return torch.cat(pieces)


def read_state(folder: Path, settings: dict, advice: str) -> tuple[dict[str, StoredTensor], dict]:
    """Open the checkpoint of any number of ranks. Returns {name: StoredTensor} and its metadata."""
    metadata = common.read_json(folder / "state.json", advice)
    counts = {}
    slices = defaultdict(dict)
    with common.reading(folder / "state.json", advice):
        if metadata["kind"] != "state" or not runs.is_same_run(metadata["settings"], settings):
            raise UserError(f"{folder} belongs to another run or version; {advice}")
        for name in metadata["files"]:
            file, header = common.open_tensors(folder / name, "checkpoint shard", advice)
            for key, (first, counts[key]) in header["rows"].items():
                slices[key][first] = file[key]
        for key, count in counts.items():
            if sum(rows.shape[0] for rows in slices[key].values()) != count:
                raise UserError(f"{folder} does not have all rows of {key}; {advice}")
        return {key: StoredTensor(count, slices[key]) for key, count in counts.items()}, metadata
