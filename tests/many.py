"""Runs jobs for test_parallel.py, each on processes of its own, forked: torch is read once.

python tests/many.py JOBS.json, a list of {"processes", "nodes", "job": name below, its arguments}.
Writes what became of each, [[exit status, standard error] by process], beside it.
"""

import ctypes
import json
import os
import socket
import sys
import tempfile
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import torch._dynamo  # what FSDP reads at its first call, a hundred megabytes
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import train
from models import files, large, parallel, pictures, plan, weights
from models.draws import normal
from tests.test_crash import FailingCall


# -- jobs ----------------------------------------------------------------------------------------


def losses(out: str, context: int = 1, mistake: str = "", **settings) -> None:
    """Both phases of a run: its log, its roles' parameters, and the student on fixed inputs."""
    MISTAKES[mistake]()
    with parallel.processes("cpu", context, "test"):
        run = train.new_run(train.config(**settings), {}, torch.device("cpu"), Path(out))
        train.begin_phase(run, 1)
        rows, kept = [], {}
        for found in train.train(run):
            rows += found
            if run.i == run.cfg.iters:
                whole = {n: files.whole(x).clone() for n, x in train.tensors_of(run).items()}
                kept |= {f"phase{run.k}/{n}": x for n, x in whole.items()}
                kept |= {f"phase{run.k}/v{i}": v for i, v in enumerate(answers(run))}
        if parallel.here.index == 0:
            Path(out).mkdir(parents=True, exist_ok=True)
            save_file(kept, Path(out) / "kept.safetensors")
            (Path(out) / "rows.json").write_text(json.dumps(rows))


def answers(run) -> list:
    """v of each step of the student so far, on the same x_t."""
    c, shape = run.batch(2, "answers", 0)
    x_t = normal((2, *shape), "answers", "x")
    with torch.no_grad():
        return [net(x_t, torch.full((2,), 0.9), c) for net in run.student]


def command(argv: list, cut: int = 0, fail: int = 0, at: int = 0, folder: str = "") -> None:
    """train.py. cut: a signal comes at that question for one. Call `fail` fails on process `at`."""
    if cut:
        calls, usual = Counter(), parallel.any_of
        parallel.any_of = lambda n: calls.update("a") or usual(15 if calls["a"] == cut else n)
    pictures.sheet = lambda *_: b"a picture"
    train.curves = lambda log: b"curves"
    plan.cost = lambda *_: plan.Cost(*[1] * 6)  # seconds of counting what nobody reads here
    if fail and at == int(os.environ.get("RANK", 0)):
        patch = type("Patch", (), {"setattr": staticmethod(setattr)})
        calls = FailingCall(patch, Path(folder), fail)
    status = train.main(argv)
    if fail and at == int(os.environ.get("RANK", 0)) and calls.count < fail:
        status = 99  # there was no such call
    sys.exit(status)


class Sent(TorchDispatchMode):
    """Bytes that a ring would send for each collective, out of its tensors and its group."""

    def __init__(self):
        super().__init__()
        self.bytes = Counter()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name, n = str(operation), parallel.here.sharers
        tensors = [x for x in tree_leaves(args) if isinstance(x, torch.Tensor)]
        if "c10d._allgather_base_" in name:
            self.bytes["gathered"] += (n - 1) * min(x.nbytes for x in tensors)
        elif "c10d._reduce_scatter_base_" in name:
            self.bytes["summed"] += (n - 1) * min(x.nbytes for x in tensors)
        elif "c10d.allreduce_" in name:
            size = torch.distributed.ProcessGroup.unbox(args[1]).size()
            self.bytes["reduced"] += 2 * (size - 1) / size * sum(x.nbytes for x in tensors)
        return operation(*args, **(kwargs or {}))


def memory(out: str, small: bool = False, copies: bool = False, **settings):
    """An iteration of each phase (large: of the second): bytes of tensors, of the process, sent."""
    libc = ctypes.CDLL(None)
    libc.mallopt(-3, 2**20), libc.mallopt(-1, 2**20)  # what is freed goes back at once
    row = weights.TEACHERS["wan22-tiny"]
    if not small:
        size = dict(dim=1024, ffn_dim=4096, num_heads=8, num_layers=15, text_dim=64, text_len=16)
        weights.TEACHERS["wan22-tiny"] = row._replace(settings=size)
    cfg = train.config("wan22-tiny", steps=2, fake_updates=1, frames=1, size=("64x64",), **settings)
    found = []
    with parallel.processes("cpu", 1, "test"):
        held = train.moe.held(train.phases_of(cfg), False, 0.875)
        phases, shapes = train.phases_of(cfg), large.buckets(cfg)
        shape = plan.biggest(shapes)
        planned = [plan.memory(cfg, there, shape, "none", "first") for there in held]
        sent = [plan.traffic(cfg, *both, shapes, "first") for both in zip(phases, held)]
        before = peak()
        run = train.new_run(cfg, {}, torch.device("cpu"), Path("nowhere"))
        usual, seen = train.apply, {}

        def apply(run, name, *rest):
            every = {role: run.roles.parameters_of(role) for role in run.trained}
            grads = [p.grad for ps in every.values() for p in ps.values() if p.grad is not None]
            seen[name] = bytes_of(grads)
            return usual(run, name, *rest)

        train.apply = apply
        extra = []
        if not small:
            run.roles.reset("student1")  # which phase 1 would have
        for k in (1, 2) if small else (2,):
            train.begin_phase(run, k)
            run.i = 0
            extra += [weights.random("wan22-tiny")] if copies else []
            Path("/proc/self/clear_refs").write_text("5")  # peak from here on
            train.iteration(run)
            most = peak() - before
            with Sent() as counted:  # which keeps tensors for longer
                train.iteration(run) if small else None
            roles = [p for role in run.trained for p in run.roles.parameters_of(role).values()]
            moments = [v for opt in run.optimizers.values() for v in opt.second.values()]
            base = [p for net in bases(run) for p in net.parameters() if not p.requires_grad]
            size = [bytes_of(some) for some in (base, [*roles, *moments])]
            del base, roles, moments  # old moments must not wait here for the next phase
            found.append(
                dict(
                    base=size[0], roles=size[1],
                    gradients=max(seen.values()), peak=most,
                    sent=counted.bytes, planned=planned[k - 1]._asdict(), traffic=sent[k - 1],
                )
            )  # fmt: skip
        every = parallel.gather(found)
        if parallel.here.index == 0:
            Path(out).write_text(json.dumps(every))


def bases(run) -> list:
    """The frozen networks that are in memory."""
    names = run.meter.velocity.__code__.co_freevars
    network = run.meter.velocity.__closure__[names.index("network")].cell_contents
    return list(network.networks.values())


def bytes_of(tensors: list) -> int:
    """Of what this process has of them."""
    return sum(parallel.part(x.detach()).nbytes for x in tensors)


def peak() -> int:
    """The most memory of the process, as Linux tells it."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line for line in status.splitlines() if "VmHWM" in line).split()[1])


def unsummed():
    parallel.summed = lambda grad: grad


def same_passes():
    parallel.deal = lambda passes: passes[:: parallel.here.shares]


def own_tokens():
    parallel.to_heads = lambda x, streams: x
    parallel.to_tokens = lambda x, streams: x


def means():
    usual = parallel.place

    def place(net, device):
        usual(net, device)
        for module in (net, *parallel.blocks_of(net)) if parallel.here.processes > 1 else ():
            module.set_gradient_divide_factor(float(parallel.here.processes))

    parallel.place = place


def unrotated():
    parallel.cut_tokens.__globals__["moved"], usual = moved_wrongly, parallel.moved
    moved_wrongly.usual = usual


def tokens(out: str, teacher: str) -> None:
    """Bytes that one forward of a sample exchanges in attention, and the plan of them."""
    with parallel.processes("cpu", 2, "test"):
        run = train.new_run(train.config(teacher, dtype="bf16"), {}, torch.device("cpu"), Path(out))
        sent, usual = [0], parallel.moved

        def moved(x, then, now, shape):
            sent[0] += x.nbytes // 2 * (then is not None and now is not None)
            return usual(x, then, now, shape)

        parallel.moved = moved
        c, shape = run.batch(1, "tokens", 0)
        plan.TEXT = c["text"].shape[1]
        with torch.no_grad():
            run.roles.velocity("student1", torch.zeros(1, *shape), torch.ones(1), c)
        if parallel.here.index == 0:
            Path(out).write_text(json.dumps([sent[0], plan.exchanged(run.cfg, shape)]))


def perturbed(out: str, teacher: str, by: float) -> None:
    """v of a student of all parameters in bf16, whose norms moved by less than bf16 resolves."""
    with parallel.processes("cpu", 1, "test"):
        cfg = train.config(teacher, generator="full", dtype="bf16", size=("48x80",), frames=1)
        run = train.new_run(cfg, {}, torch.device("cpu"), Path(out))
        train.begin_phase(run, 1)
        for name, p in run.roles.parameters_of("student1").items():
            if "norm" in name and "blocks" in name:
                parallel.part(p.detach()).add_(by)
        v = answers(run)[0]
        if parallel.here.index == 0:
            save_file({"v": v}, out)


def moved_wrongly(x, then, now, shape):
    """The rope of the first tokens for everyone."""
    if x.is_complex():
        return x[: parallel.length(len(x))]
    return moved_wrongly.usual(x, then, now, shape)


MISTAKES = {"": lambda: None, "unsummed": unsummed, "same passes": same_passes, "means": means,
            "own tokens": own_tokens, "unrotated": unrotated}  # fmt: skip


# -- the launcher --------------------------------------------------------------------------------


def launch(processes: int = 1, nodes: int = 1, kill: int | None = None, job: str = "", **args):
    """Fork the processes of a job; [[exit status, standard error]]."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    several = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE=str(processes),
                   LOCAL_WORLD_SIZE=str(processes // nodes))  # fmt: skip
    children = []
    for index in range(processes):
        said = tempfile.TemporaryFile("w+")
        child = os.fork()
        if not child:
            if processes > 1:
                os.environ.update(several, RANK=str(index))
                os.environ["LOCAL_RANK"] = str(index % (processes // nodes))
            os.dup2(said.fileno(), 2)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            sys.stderr = open(2, "w", closefd=False)
            status = 1
            try:
                globals()[job](**args)
                status = 0
            except SystemExit as end:
                status = end.code
            except BaseException:
                sys.excepthook(*sys.exc_info())
            finally:
                sys.stderr.flush()
                os._exit(status)
        children.append((child, said))
    found = []
    for child, said in children:
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        said.seek(0)
        found.append([status, said.read()])
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    file = Path(sys.argv[1])
    file.with_suffix(".done").write_text(
        json.dumps([launch(**job) for job in json.loads(file.read_text())])
    )
